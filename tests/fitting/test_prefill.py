"""Reading: sparse attention against dense attention under the mask, fused attention in pieces against whole."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core import attention
from nectar_mlx.fitting import prefill, prefill_attention
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.sparse import Fixed
from tests import toys


def visible(pattern, length, heads):
    """Under the pattern, or among the first tokens of the text: [heads, T, T]."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    return np.array(pattern.mask(length, length, heads=heads)) | ((j < prefill_attention.FIRST) & (j <= i))


def under_the_mask(queries, keys, values, *, pattern, scale):
    T, S = queries.shape[2], keys.shape[2]
    mask = mx.array(visible(pattern, S, queries.shape[1])[:, S - T :])
    return attention.causal(queries, keys, values, scale=scale, mask=mask[None])


@pytest.mark.parametrize("pattern", [Fixed(32, summary=8, overlap=True), Fixed(16, summary=4), Fixed(8, summary=8)])
@pytest.mark.parametrize("length, read", [(300, 300), (301, 64), (40, 7), (9, 9), (1, 1), (16, 1)])
def test_reading_sparsely_is_attention_under_the_mask(pattern, length, read):
    mx.random.seed(length)
    q = mx.random.normal((1, 6, length, 8))
    k, v = (mx.random.normal((1, 2, length, 8)) for _ in range(2))
    for start in range(0, length, read):
        stop = min(length, start + read)
        arrays = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        ours = prefill_attention.sparse(*arrays, pattern=pattern, scale=0.5)
        expected = under_the_mask(*arrays, pattern=pattern, scale=0.5)
        np.testing.assert_allclose(ours.output, expected.output, atol=1e-5)
        np.testing.assert_allclose(ours.log_normalizer, expected.log_normalizer, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
def test_a_model_reads_through_the_pattern(architecture, monkeypatch):
    model = toys.toy(architecture)
    geometry = attention_patch.route(model)
    tokens = toys.random_tokens(700)
    ours = prefill.read_text(model, tokens, geometry, prefill="fixed")
    monkeypatch.setattr(prefill_attention, "sparse", under_the_mask)
    expected = prefill.read_text(model, tokens, geometry, prefill="fixed")
    dense = prefill.read_text(model, tokens, geometry)
    for bank, other in zip(ours.banks, expected.banks, strict=True):
        np.testing.assert_allclose(bank.parameters["keys"], other.parameters["keys"], atol=1e-3)
    if len(ours.banks) > 1:  # the first layer's keys do not depend on any attention
        assert not np.allclose(ours.banks[-1].parameters["keys"], dense.banks[-1].parameters["keys"], atol=1e-2)


def test_a_short_text_is_read_as_ever():
    """Two blocks that see each other whole: nothing is left out."""
    model = toys.toy("llama")
    geometry = attention_patch.route(model)
    tokens = toys.random_tokens(60)
    assert 2 * prefill_attention.pattern_for(len(tokens)).stride >= len(tokens)
    ours, dense = (prefill.read_text(model, tokens, geometry, prefill=way) for way in ("fixed", "dense"))
    for bank, other in zip(ours.banks, dense.banks, strict=True):
        np.testing.assert_allclose(bank.parameters["keys"], other.parameters["keys"], atol=1e-4)


@pytest.mark.parametrize("max_scores", [1, 3000, 1 << 24])
def test_fused_attention_in_pieces_is_the_same(max_scores):
    q = mx.random.normal((1, 4, 70, 16))
    k, v = (mx.random.normal((1, 2, 130, 16)) for _ in range(2))
    for mask, sinks in (("causal", None), ("causal", mx.array([0.5, -1.0, 2.0, 0.0])), (None, None)):
        whole = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
        pieces = prefill_attention.fused(q, k, v, scale=0.3, mask=mask, sinks=sinks, max_scores=max_scores)
        assert mx.allclose(pieces, whole, atol=1e-5)


def test_a_reading_cache_never_grows():
    cache = prefill_attention.ReadingCache(1000)
    for start in range(0, 1000, 300):
        n = min(300, 1000 - start)
        keys, _ = cache.update_and_fetch(mx.ones((1, 2, n, 8)), mx.ones((1, 2, n, 8)))
        assert cache.keys.shape[2] == 1000 and keys.shape[2] == start + n
