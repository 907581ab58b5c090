"""Retrieval and what completes it, against attention in float64: reading everything, something and nothing."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core.attention import EMPTY
from nectar_mlx.heads import Completion, Exact, Quadrature, Retrieval, ThresholdedNodes
from nectar_mlx.heads.hybrid import ANCHORS, EVERYTHING, Retrieved, anchor_positions, middle
from nectar_mlx.retrieval.bank import HybridBank, LayerKeys
from nectar_mlx.retrieval.selection import best
from nectar_mlx.store.kv_file import KeyFile
from tests import oracle

K, G, D, SCALE = 2, 3, 16, 0.3


class Context:
    """Random keys and values [K, n, D] of one layer, as bfloat16 can hold them, and heads over them."""

    def __init__(self, n=50, seed=0):
        random = np.random.default_rng(seed)
        self.n, self.random = n, random
        self.keys, self.values = (
            mx.array(random.normal(size=(K, n, D))).astype(mx.bfloat16).astype(mx.float32) for _ in range(2)
        )
        self.file = KeyFile.of([(self.keys, self.values)], small={}, nectar="0123456789", bits=16)
        at = anchor_positions(n)
        self.anchors = {"anchor_keys": self.keys[:, mx.array(at)], "anchor_values": self.values[:, mx.array(at)]}
        self.middle = self.keys[:, middle(n)], self.values[:, middle(n)]

    def bank(self, kind, arrays):
        parameters = {**self.anchors, **arrays}
        sizes = (kind.size_of({name: x[0] for name, x in parameters.items()}),) * K
        return kind(parameters=parameters, sizes=sizes, scale=SCALE)

    def hybrid_bank(self, summary, count):
        return HybridBank(
            summary, LayerKeys(self.file, 0), oracle.Selector(self.middle[0], scale=SCALE), count=count, group=G
        )

    def queries(self, *shape):
        return mx.array(2 * self.random.normal(size=(*shape, D)).astype(np.float32))

    def random_bank(self, kind, m=6):
        if kind is Retrieval:
            return self.bank(kind, {})
        shapes = {n: s for n, s in kind.shapes((m,), D).items() if not n.startswith("anchor")}
        return self.bank(kind, {n: self.queries(K, *s[:-1])[..., : s[-1]] if len(s) > 1 else
                                self.queries(K)[:, :m] for n, s in shapes.items()})  # fmt: skip


def perfect(context, kind):
    """A head whose rest is exact: one node, or one feature, for every key of the middle."""
    keys, values = context.middle
    zeros = mx.zeros(keys.shape[:2])
    if kind is ThresholdedNodes:
        nodes = {"keys": keys, "values": values, "bias": zeros, "cut": zeros, "sharpness": zeros + 12}
        return context.bank(kind, nodes)
    sharp = 50.0
    features = {
        "w_query": SCALE * keys,
        "b_query": zeros,
        "w_key": sharp * keys,
        "b_key": -sharp / 2 * mx.square(keys).sum(-1),
        "means": values,
        "log_count": zeros,
    }
    return context.bank(kind, features)


def attention(context, queries):
    """queries [B, H, T, D] over the whole context, in float64."""
    keys, values = (oracle.repeat_heads(x[None], K * G) for x in (context.keys, context.values))
    return oracle.attention(queries, keys, values, scale=SCALE)


def close(part, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.array(part.output), expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.array(part.log_normalizer), expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [Retrieval, Completion, ThresholdedNodes])
def test_everything_read_is_exact_attention(kind):
    """Whatever the head says, nothing is left for it to say."""
    context = Context()
    queries = context.queries(2, K * G, 3)
    bank = context.hybrid_bank(perfect(context, kind) if kind is Completion else context.random_bank(kind), 999)
    close(bank.over(queries), attention(context, queries))


@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", [Completion, ThresholdedNodes])
def test_a_perfect_rest_makes_any_budget_exact(kind, count):
    """No key is counted twice and none is lost, whichever head of a group it was read for."""
    context = Context()
    queries = context.queries(1, K * G, 5)
    close(context.hybrid_bank(perfect(context, kind), count).over(queries), attention(context, queries), 1e-4)


def test_selection_alone_attends_to_anchors_and_what_was_read():
    context = Context()
    queries = context.queries(1, K * G, 4)
    reading = context.hybrid_bank(context.random_bank(Retrieval), 5).read(queries)
    assert reading.positions.shape == (1, K, 4, 5)
    for head in range(K * G):
        for t in range(4):
            k = head // G
            seen = sorted({*anchor_positions(context.n), *np.array(reading.positions[0, k, t]).tolist()})
            assert len(seen) == ANCHORS + 5
            chosen = context.keys[k][mx.array(seen)], context.values[k][mx.array(seen)]
            expected = oracle.attention(queries[0, head, t : t + 1], *chosen, scale=SCALE)
            np.testing.assert_allclose(np.array(reading.part.output[0, head, t]), expected[0][0], rtol=1e-4, atol=1e-5)
            assert float(reading.part.log_normalizer[0, head, t]) == pytest.approx(expected[1][0], rel=1e-5)


def test_the_chosen_keys_are_those_of_the_largest_share_of_any_head():
    random = np.random.default_rng(1)
    scores, anchors = random.normal(size=(K, 4, G, 40)), random.normal(size=(K, 4, G))
    total = np.log(np.exp(scores).sum(-1) + np.exp(anchors))
    logs = mx.array((scores - total[..., None]).astype(np.float32))
    chosen = best(logs, count=6).scaled(mx.array(total.astype(np.float32)))
    shares = (scores - total[..., None]).max(2)
    expected = np.sort(np.argsort(-shares, axis=-1)[..., :6], axis=-1)
    assert np.array_equal(np.sort(np.array(chosen.positions), axis=-1), expected)
    at = np.array(chosen.positions)[:, :, None]
    np.testing.assert_allclose(np.array(chosen.scores), np.take_along_axis(scores, at, axis=-1), atol=1e-5)
    threshold, unread = np.array(chosen.threshold), np.ones((K, 4, 40), bool)
    np.put_along_axis(unread, expected, False, axis=-1)
    assert (np.where(unread[:, :, None], scores, -np.inf) <= threshold[..., None] + 1e-5).all()


def test_completion_is_the_papers_fraction():
    """num = Σ_E e^s v + φ(q)ᵀ(S - Σ_R ψ(k)vᵀ), den alike, with the map's own S and u."""
    context = Context(n=40, seed=3)
    keys, values = (np.array(x, dtype=np.float64) for x in context.middle)
    F = 7
    draw = context.random.normal
    w_query, w_key = 0.3 * draw(size=(K, F, D)), 0.3 * draw(size=(K, F, D))
    b_query, b_key = draw(size=(K, F)), draw(size=(K, F))
    logits = keys @ w_key.swapaxes(1, 2) + b_key[:, None]
    psi = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    u, S = psi.sum(1), psi.swapaxes(1, 2) @ values
    arrays = {"w_query": w_query, "w_key": w_key, "b_query": b_query, "b_key": b_key}
    arrays |= {"means": S / u[..., None], "log_count": np.log(u)}
    bank = context.bank(Completion, {n: mx.array(x.astype(np.float32)) for n, x in arrays.items()})
    queries = context.queries(1, K * G, 2)
    reading = context.hybrid_bank(bank, 4).read(queries)
    for head in range(K * G):
        for t in range(2):
            k, q = head // G, np.array(queries[0, head, t], dtype=np.float64)
            read = np.array(reading.positions[0, k, t])
            seen = [*anchor_positions(context.n), *read.tolist()]
            weights = np.exp(SCALE * np.array(context.keys[k], dtype=np.float64)[seen] @ q)
            phi = np.exp(w_query[k] @ q + b_query[k])
            inside = read - middle(context.n).start
            rest_S = S[k] - psi[k][inside].T @ values[k][inside]
            rest_u = u[k] - psi[k][inside].sum(0)
            num = weights @ np.array(context.values[k], dtype=np.float64)[seen] + phi @ rest_S
            den = weights.sum() + phi @ rest_u
            np.testing.assert_allclose(np.array(reading.part.output[0, head, t]), num / den, rtol=2e-4, atol=2e-5)
            assert float(reading.part.log_normalizer[0, head, t]) == pytest.approx(np.log(den), abs=1e-4)


def test_completion_never_gives_negative_mass():
    """A summary that holds less than what is subtracted from it (rounding, in the worst case) counts for nothing."""
    context = Context()
    bank = perfect(context, Completion)
    bank.parameters["log_count"] = bank.parameters["log_count"] - 0.2
    queries = context.queries(1, K * G, 3)
    found = context.hybrid_bank(bank, 20).over(queries)
    assert mx.isfinite(found.output).all() and mx.isfinite(found.log_normalizer).all()
    selected = context.hybrid_bank(context.random_bank(Retrieval), 20).over(queries)
    assert (found.log_normalizer >= selected.log_normalizer - 1e-4).all()


def test_remainder_below_a_threshold():
    context = Context()
    bank = context.random_bank(ThresholdedNodes)
    p = {n: np.array(x, dtype=np.float64) for n, x in bank.parameters.items()}
    queries = context.queries(K, 5)
    threshold = np.linspace(-2, 2, K * 5).reshape(K, 5)
    scores = SCALE * np.array(queries, dtype=np.float64) @ p["keys"].swapaxes(1, 2)
    margin = np.exp(p["sharpness"])[:, None] * (threshold[..., None] - scores - p["cut"][:, None])
    weights = np.exp(scores + p["bias"][:, None]) / (1 + np.exp(-margin))
    part = bank.below(bank.parameters, queries, mx.array(threshold.astype(np.float32)))
    close(part, (weights @ p["values"] / weights.sum(-1, keepdims=True), np.log(weights.sum(-1))), 1e-4)
    everything = bank.below(bank.parameters, queries, mx.full((K, 5), EVERYTHING))
    nodes = {n: bank.parameters[n] for n in ("keys", "values", "bias")}
    plain = Quadrature(parameters=nodes, sizes=((6,),) * K, scale=SCALE)(queries)
    close(everything, [np.array(x) for x in plain])
    nothing = bank.below(bank.parameters, queries, mx.full((K, 5), -EVERYTHING))
    assert (nothing.log_normalizer < plain.log_normalizer - 50).all()


def test_the_gradient_of_a_remainder_is_that_of_its_formula():
    context = Context()
    bank, queries, threshold = (
        context.random_bank(ThresholdedNodes),
        context.queries(K, 30),
        context.queries(K, 30)[..., 0],
    )
    threshold = mx.where(threshold > 1, EVERYTHING, threshold)
    weights = context.queries(K, 30), context.queries(K, 30)[..., 0]

    def ours(parameters, queries):
        part = bank.below(parameters, queries, threshold)
        return sum((x * w).sum() for x, w in zip(part, weights, strict=True))

    def formula(p, queries):
        scores = SCALE * queries @ p["keys"].swapaxes(1, 2)
        margin = mx.exp(p["sharpness"])[:, None] * (threshold[..., None] - scores - p["cut"][:, None])
        logs = scores + p["bias"][:, None] - mx.logaddexp(0, -margin)
        total = mx.logsumexp(logs, axis=-1)
        return ((mx.exp(logs - total[..., None]) @ p["values"]) * weights[0]).sum() + (total * weights[1]).sum()

    found, expected = (mx.grad(f, argnums=(0, 1))(bank.parameters, queries) for f in (ours, formula))
    for name in ("keys", "values", "bias", "cut", "sharpness"):
        np.testing.assert_allclose(np.array(found[0][name]), np.array(expected[0][name]), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(np.array(found[1]), np.array(expected[1]), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", [Retrieval, Completion, ThresholdedNodes])
def test_alone_a_head_is_a_quadrature_and_survives_padding(kind):
    context = Context()
    bank = context.random_bank(kind)
    queries = context.queries(K, 4)
    close(bank.without_retrieval()(queries), [np.array(x) for x in bank(queries)])
    if kind is Retrieval:
        at = mx.array(anchor_positions(context.n))
        exact = Exact(parameters={"keys": context.keys[:, at], "values": context.values[:, at]}, sizes=(), scale=SCALE)
        return close(bank(queries), [np.array(x) for x in exact(queries)])
    heads = bank.unstack()
    heads[0] = {n: x if n.startswith("anchor") else x[:3] for n, x in heads[0].items()}
    ragged = kind.stack(heads, scale=SCALE)
    assert ragged.sizes == ((3,), (6,))
    alone = [kind.stack([head], scale=SCALE)(queries[i : i + 1]) for i, head in enumerate(heads)]
    close(ragged(queries), [np.concatenate([np.array(part[i]) for part in alone]) for i in range(2)])
    scores, queries = context.queries(K, 4, G)[..., :5], context.queries(K, 4, G)
    retrieved = Retrieved(context.queries(K, 4, 5), context.queries(K, 4, 5), scores, scores, mx.zeros((K, 4, G)))
    alone = [
        kind.stack([head], scale=SCALE).complete(queries[i : i + 1], Retrieved(*(x[i : i + 1] for x in retrieved)))
        for i, head in enumerate(heads)
    ]
    close(ragged.complete(queries, retrieved), [np.concatenate([np.array(p[i]) for p in alone]) for i in range(2)])


def test_rows_of_captured_queries_are_read_for_by_token():
    """[K, N, D] with a token's G heads side by side is what [B, H, T, D] gives; rows left over are read for alone."""
    context = Context()
    bank = context.hybrid_bank(context.random_bank(Retrieval), 6)
    queries = context.queries(1, K * G, 4)
    rows = queries.reshape(K, G, 4, D).swapaxes(1, 2).reshape(K, 4 * G, D)
    whole = bank.over(queries)
    expected = [
        np.array(x.reshape(K, G, 4, *x.shape[3:]).swapaxes(1, 2).reshape(K, 4 * G, *x.shape[3:])) for x in whole
    ]
    close(bank(rows), expected)
    alone = context.hybrid_bank(perfect(context, ThresholdedNodes), 6)(rows[:, : 2 * G + 1])
    close(alone, oracle.attention(rows[:, : 2 * G + 1], context.keys, context.values, scale=SCALE), 1e-4)
    assert float(alone.log_normalizer.min()) > EMPTY
