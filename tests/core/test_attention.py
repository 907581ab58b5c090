import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core import attention
from nectar_mlx.core import exp as fast_exp
from nectar_mlx.core.exp import exp, log_sum_exp, sigmoid
from tests.oracle import attention as oracle
from tests.oracle import repeat_heads


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def close(ours, truth, tolerance=2e-6):
    np.testing.assert_allclose(np.array(ours), truth, rtol=0, atol=tolerance * max(1.0, np.abs(truth).max()))


@pytest.mark.parametrize("S", [1, 2, 17, 300])
@pytest.mark.parametrize("D", [16, 80])
def test_weighted_equals_softmax_attention(S, D):
    q, k, v, b = normal(3, 7, D), normal(3, S, D, seed=1) * 3, normal(3, S, D, seed=2), normal(3, S, seed=3)
    part = attention.weighted(q, k, v, bias=b, scale=0.3)
    output, log_normalizer = oracle(q, k, v, scale=0.3, bias=b)
    close(part.output, output, 1e-5)  # scores of about 30 carry 2e-6 of rounding into the weights
    close(part.log_normalizer, log_normalizer)


def test_weighted_survives_scores_that_overflow_exp():
    q, k, v = normal(1, 4, 16) * 100, normal(1, 9, 16, seed=1) * 100, normal(1, 9, 16, seed=2)
    part = attention.weighted(q, k, v, scale=1.0)
    output, log_normalizer = oracle(q, k, v, scale=1.0)
    close(part.output, output, 1e-4)
    close(part.log_normalizer, log_normalizer, 1e-6)


def test_the_gradient_is_that_of_plain_softmax():
    arrays = normal(2, 6, 16), normal(2, 5, 16, seed=1), normal(2, 5, 16, seed=2), normal(2, 5, seed=3)
    a, c = normal(2, 6, 16, seed=4), normal(2, 6, seed=5)

    def ours(q, k, v, b):
        part = attention.weighted(q, k, v, bias=b, scale=0.25)
        return (part.output * a).sum() + (part.log_normalizer * c).sum()

    def plain(q, k, v, b):
        scores = 0.25 * q @ k.swapaxes(1, 2) + b[:, None]
        return ((mx.softmax(scores, axis=-1) @ v) * a).sum() + (mx.logsumexp(scores, axis=-1) * c).sum()

    for mine, theirs in zip(mx.grad(ours, (0, 1, 2, 3))(*arrays), mx.grad(plain, (0, 1, 2, 3))(*arrays), strict=True):
        close(mine, np.array(theirs), 1e-5)


def test_merging_parts_is_attending_to_all():
    q, k, v = normal(2, 5, 16), normal(2, 40, 16, seed=1) * 4, normal(2, 40, 16, seed=2)
    cuts = [slice(0, 1), slice(1, 9), slice(9, 40)]
    parts = [attention.weighted(q, k[:, c], v[:, c], scale=0.25) for c in cuts]
    output, log_normalizer = oracle(q, k, v, scale=0.25)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = attention.merge(attention.merge(parts[order[0]], parts[order[1]]), parts[order[2]])
        close(merged.output, output)
        close(merged.log_normalizer, log_normalizer)


def test_merging_with_an_empty_part_changes_nothing():
    part = attention.Partial(normal(2, 3, 4), normal(2, 3, seed=1))
    empty = attention.Partial(normal(2, 3, 4, seed=2), mx.full((2, 3), -1e30))
    for merged in (attention.merge(part, empty), attention.merge(empty, part)):
        close(merged.output, np.array(part.output))
        close(merged.log_normalizer, np.array(part.log_normalizer))


@pytest.mark.parametrize("B, H, K, T", [(1, 1, 1, 1), (2, 6, 2, 5), (3, 8, 8, 2), (1, 9, 3, 33)])
def test_grouping_puts_a_kv_heads_queries_side_by_side(B, H, K, T):
    q = normal(B, H, T, 4)
    grouped = attention.group(q, K)
    assert grouped.shape == (K, B * (H // K) * T, 4)
    assert mx.array_equal(attention.ungroup(grouped, B, T), q)
    assert mx.array_equal(grouped[K - 1, -1], q[B - 1, H - 1, T - 1])


def test_exact_in_chunks_is_exact(set_device):
    q, k, v = normal(3, 50, 16), normal(3, 21, 16, seed=1), normal(3, 21, 16, seed=2)
    whole = attention.exact(q, k, v, scale=0.25)
    set_device(max_scores=3 * 21 * 7)
    chunked = attention.exact(q, k, v, scale=0.25)
    close(chunked.output, np.array(whole.output))
    close(whole.output, oracle(q, k, v, scale=0.25)[0])


@pytest.mark.parametrize("chunk", [1 << 20, 40])
@pytest.mark.parametrize("B, H, K, T, S", [(1, 4, 4, 1, 9), (2, 6, 2, 5, 5), (2, 6, 3, 4, 11), (1, 2, 1, 13, 40)])
@pytest.mark.parametrize("kind", ["causal", "none", "bool", "heads", "additive"])
def test_causal_under_every_mask(set_device, chunk, B, H, K, T, S, kind):
    set_device(max_scores=chunk)
    q, k, v = normal(B, H, T, 16), normal(B, K, S, 16, seed=1), normal(B, K, S, 16, seed=2)
    rng = np.random.default_rng(3)
    visible = np.arange(S - T, S)[:, None] >= np.arange(S)
    mask = "causal"
    if kind == "none":
        mask, visible = None, np.ones((T, S), bool)
    elif kind != "causal":
        shape = (B, H, T, S) if kind == "heads" else (B, 1, T, S)
        visible = visible & (rng.random(shape) < 0.7) | (np.arange(S) == S - T)
        mask = mx.array(visible) if kind != "additive" else mx.array(np.where(visible, 0.0, -1e30).astype(np.float32))
    part = attention.causal(q, k, v, scale=0.25, mask=mask)
    output, log_normalizer = oracle(q, repeat_heads(k, H), repeat_heads(v, H), scale=0.25, mask=visible)
    close(part.output, output)
    close(part.log_normalizer, log_normalizer)


def test_half_precision_inputs_are_accumulated_in_float32():
    q, k, v = (normal(1, 4, 300, 64, seed=s).astype(mx.bfloat16) for s in range(3))
    part = attention.causal(q, k, v, scale=0.125)
    exact = attention.causal(*(x.astype(mx.float32) for x in (q, k, v)), scale=0.125)
    assert part.output.dtype == part.log_normalizer.dtype == mx.float32
    close(part.output, np.array(exact.output))


@pytest.mark.parametrize("linux_cpu", [True, False])
def test_log_sum_exp_is_that_of_float64(set_device, linux_cpu):
    set_device(linux_cpu=linux_cpu)
    given = np.random.default_rng(0).normal(size=(3, 5, 700)).astype(np.float32) * 30 + 90
    x = mx.array(given)
    top = given.max(-1).astype(np.float64)
    expected = top + np.log(np.exp(given - top[..., None]).sum(-1))
    np.testing.assert_allclose(np.array(log_sum_exp(x)), expected, rtol=1e-6)
    assert np.array_equal(np.array(x), given), "what is given stays as it is"


def test_the_fast_exponential_is_the_exponential():
    x = mx.array([-200.0, -30.5, -1e-3, 0.0, 1.0, 80.0])
    np.testing.assert_allclose(np.array(exp(x)), np.exp(np.array(x, dtype=np.float64)), rtol=3e-7, atol=1e-38)
    compiled = mx.compile(lambda x: exp(x) * 2)
    np.testing.assert_allclose(np.array(compiled(x)), 2 * np.exp(np.array(x, dtype=np.float64)), rtol=3e-6, atol=1e-38)


def test_sigmoid_and_its_slope():
    x = mx.array([-1e30, -90.0, -2.0, 0.0, 3.0, 90.0, 1e30])
    truth = 1 / (1 + np.exp(-np.clip(np.array(x, dtype=np.float64), -80, 80)))
    close(sigmoid(x), truth)
    slope = mx.grad(lambda x: sigmoid(x).sum())(x)
    close(slope, truth * (1 - truth), 1e-6)


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_weights_of_scores_in_any_layout_and_of_rows_far_apart(monkeypatch, set_device, far):
    """Some rows at a time; what a row gives does not depend on those beside it."""
    set_device(linux_cpu=True)
    monkeypatch.setattr(fast_exp, "_BLOCK", 40)
    scores = normal(3, 9, 5) * 10 + far * mx.arange(5)
    weights, top, total = fast_exp.exp_of_scores(scores.swapaxes(1, 2))
    truth = np.array(scores.swapaxes(1, 2), np.float64)
    log = np.log(np.exp(truth - truth.max(-1, keepdims=True)).sum(-1, keepdims=True)) + truth.max(-1, keepdims=True)
    close(top + mx.log(total), log)
    close(weights / total, np.exp(truth - log), 1e-5)
    alone = fast_exp.exp_of_scores(scores.swapaxes(1, 2)[1:2, 2:3])
    assert all(mx.array_equal(x[0, 0], y[1, 2]) for x, y in zip(alone, (weights, top, total), strict=True))
