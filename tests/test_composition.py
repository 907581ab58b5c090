"""Several files as one: positions, weights, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.composition import compose
from nectar_mlx.mlxlm.positions import shifted
from tests import oracle, toys

N = 60
ARCHITECTURES = ("llama", "qwen2", "phi3", "gemma3_text", "gpt_oss")
TAIL = toys.random_tokens(7, seed=9)


def files(model, count=2, *, make=toys.exact, same=5, **options):
    """Files whose prefixes begin with the same tokens."""
    head = toys.random_tokens(same, seed=99)
    return [make(model, [*head, *toys.random_tokens(N - same + i, seed=i)], **options) for i in range(count)]


def logits(model, cache):
    return np.array(model(mx.array([TAIL]), cache=cache))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_further_on_answers_alike(architecture):
    """Attention knows distances alone, so a text that is moved with its question gives the same logits."""
    model = toys.toy(architecture)
    (one,) = files(model, 1)
    moved = compose([one], model, preamble=5)
    assert moved.start == one.start
    np.testing.assert_allclose(logits(model, moved.make_cache()), logits(model, one.make_cache()), atol=2e-4)
    # Two copies, end to end: 1/2 (e^L + e^L), and those of the second are where the question expects them.
    second = compose([one, one], model, preamble=5)
    assert second.start == 2 * one.start - 5
    keys, n = second.banks[0].parameters["keys"] + second.banks[0].offset[:, None], one.start
    layer = one.geometry.fitted[0]
    again = shifted(model, layer, keys[:, n:], -(n - 5))
    np.testing.assert_allclose(again, keys[:, :n], atol=2e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_side_by_side_weigh_as_one(architecture):
    model = toys.toy(architecture)
    (one,) = files(model, 1, make=toys.picked, nodes=10)
    copies = compose([one] * 3, model, preamble=5, end_to_end=False)
    assert copies.start == one.start
    np.testing.assert_allclose(logits(model, copies.make_cache()), logits(model, one.make_cache()), atol=2e-4)


def test_two_texts_are_one_softmax():
    """Against float64 numpy: the keys of both, the second's moved, each with a bias of -log 2."""
    model = toys.toy("llama")
    first, second = files(model)
    both = compose([first, second], model)
    queries = mx.random.normal((2, 4, 16), key=mx.random.key(3)) * 3
    for layer, bank in enumerate(both.banks):
        a, b = [f.banks[layer] for f in (first, second)]
        keys = [x.parameters["keys"].astype(mx.float32) + x.offset[:, None] for x in (a, b)]
        keys[1] = shifted(model, layer, keys[1], N - 5)
        values = [x.parameters["values"] for x in (a, b)]
        joined = mx.concatenate(keys, 1)
        bias = np.full(joined.shape[:2], -np.log(2))
        output, log_normalizer = oracle.attention(
            queries, joined, mx.concatenate(values, 1), scale=bank.scale, bias=bias
        )
        part = bank(queries)
        common = bank.scale * (queries * bank.offset[:, None]).sum(-1)
        np.testing.assert_allclose(part.output, output, atol=1e-4)
        np.testing.assert_allclose(part.log_normalizer + common, log_normalizer, atol=1e-3)
    assert both.start == 5 + (N - 5) + (N + 1 - 5)


def test_what_cannot_be_composed():
    with pytest.raises(NectarError, match="no file"):
        compose([], toys.toy("llama"))
    one = toys.exact(model := toys.toy("llama", max_position_embeddings=100), toys.random_tokens(N))
    assert compose([one], model, preamble=5).start == N
    with pytest.raises(NectarError, match="together the texts take 115 tokens, and the model's window has 100"):
        compose([one, one], model, preamble=5)
    for preamble in (-1, N + 1):
        with pytest.raises(NectarError, match=f"have {N} in common"):
            compose([one, one], model, preamble=preamble)
    with pytest.raises(NectarError, match="different models"):
        compose([toys.exact(toys.toy(a), toys.random_tokens(N)) for a in ("llama", "qwen3")], toys.toy("llama"))
    with pytest.raises(NectarError, match="another model than the one given"):
        compose([one, one], toys.toy("llama", num_hidden_layers=2), preamble=5)
