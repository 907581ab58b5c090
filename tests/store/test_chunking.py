"""Chunks in a prefix, and heads that are joined and taken apart."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import store
from nectar_mlx.errors import NectarError
from nectar_mlx.heads import Quadrature
from nectar_mlx.store import Layout, chunking
from nectar_mlx.store.chunking import ChunkedPrefix

D, PREAMBLE, NODES, SCALE = 16, 2, (3, 5), 0.25
PREFIX = ChunkedPrefix(list(range(100, 112)), [3, 3, 4])


@pytest.mark.parametrize("tokens, room", [(1, 1), (10, 3), (11, 3), (9, 3), (100_000, 7_133), (7, 100)])
def test_chunks_are_equal_but_for_a_token(tokens, room):
    lengths = chunking.split(tokens, room)
    assert sum(lengths) == tokens and max(lengths) <= room
    assert max(lengths) - min(lengths) <= 1 and lengths[-1] == max(lengths)
    assert len(lengths) == -(-tokens // room)


def test_a_prefix_is_its_preamble_and_its_chunks():
    assert (PREFIX.preamble, PREFIX.start) == (2, 6)
    assert [PREFIX.body(n) for n in range(3)] == [[102, 103, 104], [105, 106, 107], [108, 109, 110, 111]]
    assert list(PREFIX.texts()) == [[100, 101, *PREFIX.body(n)] for n in range(3)]
    whole = ChunkedPrefix([7, 8, 9])
    assert (whole.preamble, whole.start, list(whole.texts())) == (3, 3, [])


@pytest.mark.parametrize("lengths", [[0, 5], [13], [-1]])
def test_chunks_that_cannot_be_are_an_error(lengths):
    with pytest.raises(NectarError, match="damaged"):
        ChunkedPrefix.checked(PREFIX.ids, lengths)


def nodes(count, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        "keys": rng.normal(size=(count, D)),
        "values": rng.normal(size=(count, D)),
        "bias": rng.normal(size=count),
    }
    return {name: mx.array(x.astype(np.float32)) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def parts():
    """Two heads of one layer: the preamble's, and each chunk's."""
    preamble = [nodes(PREAMBLE, k) for k in range(2)]
    return preamble, [[nodes(NODES[k], 10 * c + k + 2) for k in range(2)] for c in range(3)]


def test_joined_chunks_weigh_as_much_as_one(parts):
    preamble, chunks = parts
    queries = mx.random.normal((2, 6, D), key=mx.random.key(0))

    def answers(heads):
        return Quadrature.stack(heads, scale=SCALE)(queries)

    joined = answers(chunking.join(preamble, chunks))
    before, each = answers(preamble), [answers(heads) for heads in chunks]
    weights = [np.exp(np.array(p.log_normalizer, np.float64)) for p in (before, *each)]
    weights = [weights[0], *(w / 3 for w in weights[1:])]
    np.testing.assert_allclose(joined.log_normalizer, np.log(sum(weights)), atol=1e-4)
    output = sum(w[..., None] * np.array(p.output) for w, p in zip(weights, (before, *each), strict=True))
    np.testing.assert_allclose(joined.output, output / sum(weights)[..., None], atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8, None])
def test_what_is_taken_out_is_what_was_joined(parts, bits):
    preamble, chunks = parts
    layout = Layout(kind="quadrature", n_layers=1, n_kv_heads=2, head_dim=D, scale=SCALE, bits=bits)
    tensors = store.pack(layout, chunking.join(preamble, chunks))
    for number, heads in enumerate(chunks):
        taken = chunking.take(layout, tensors, PREFIX, number)
        assert taken["prefix"].tolist() == PREFIX.text(number)
        (bank,) = store.unpack(layout, taken)
        for head, before, own in zip(bank.unstack(), preamble, heads, strict=True):
            for name, tolerance in (("keys", 0.05), ("values", 0.05), ("bias", 4e-3)):
                expected = np.concatenate([before[name], own[name]])
                np.testing.assert_allclose(head[name], expected, atol=2e-3 if bits == 16 else tolerance)


def test_what_is_not_there_cannot_be_taken_out(parts):
    preamble, chunks = parts
    layout = Layout(kind="quadrature", n_layers=1, n_kv_heads=2, head_dim=D, scale=SCALE, bits=8)
    tensors = store.pack(layout, chunking.join(preamble, chunks))
    for number in (-1, 3):
        with pytest.raises(NectarError, match="there is no chunk"):
            chunking.take(layout, tensors, PREFIX, number)
    with pytest.raises(NectarError, match="not those of its chunks"):
        chunking.take(layout, tensors, ChunkedPrefix(PREFIX.ids, [3, 7]), 0)
