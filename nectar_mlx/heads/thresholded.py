"""Retrieval and Nectar: top keys exact, and fitted nodes for whatever scores below the last key that was read.

A node (k, v, b) stands for context keys that lie around k, so it should count only as far as those were not read. With
τ the threshold of a query, below which nothing was read,

    weight = exp(s + b) · σ(sharpness · (τ - s - cut)),    s = scale · q·k

One set of nodes thus serves every budget: at τ = ∞ they are a plain quadrature of the whole middle. No mass is ever
subtracted, so none can turn negative. (Subtracting the retrieved terms from a prediction of the whole would cancel
against adding them back, and leave the prediction.)
"""

from typing import ClassVar

import mlx.core as mx

from ..core.attention import EMPTY, Partial
from ..core.exp import exp, sigmoid
from ..core.gradients import Arrays, with_vjp
from .base import HeadArrays, Size
from .hybrid import HybridHead, Retrieved


class ThresholdedNodes(HybridHead):
    """keys, values [m, D], bias, cut, sharpness (its logarithm) [m] a head, and the anchors; size = (m,)."""

    kind = "hybrid"
    default_bits = 6
    learning_rate = 2.5e-2
    padding: ClassVar = {"bias": EMPTY}

    def nodes(self, parameters: HeadArrays) -> HeadArrays:
        return {n: parameters[n] for n in ("keys", "values", "bias")}

    def complement(self, parameters: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        M, N, G, D = queries.shape
        part = self.below(parameters, queries.reshape(M, N * G, D), retrieved.threshold.reshape(M, N * G))
        return Partial(*(x.reshape(M, N, G, *x.shape[2:]) for x in part))

    def below(self, parameters: HeadArrays, queries: mx.array, threshold: mx.array) -> Partial:
        """Attention of queries [M, N, D] over the keys of the middle that score below threshold [M, N]."""
        p = {name: x.astype(mx.float32) for name, x in parameters.items()}
        queries, sharpness = queries.astype(mx.float32) * self.scale, mx.exp(p["sharpness"])
        return Partial(*_below(queries, p["keys"], p["values"], p["bias"], p["cut"], sharpness, threshold)[:2])

    def used(self, retrieved: Retrieved) -> mx.array:
        return mx.where(retrieved.routed >= retrieved.threshold[..., None], retrieved.scores, EMPTY)

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        (nodes,) = size
        vectors = {"bias": (nodes,), "cut": (nodes,), "sharpness": (nodes,)}
        nodes_ = {"keys": (nodes, head_dim), "values": (nodes, head_dim)}
        return nodes_ | vectors | super().shapes(size, head_dim)

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["bias"].shape[0],)


class TrainableThresholdedNodes(ThresholdedNodes):
    """As it is trained: `complement` alone, of queries [M, N, D + 1] whose last number is the threshold."""

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        return self.below(parameters, queries[..., :-1], queries[..., -1])


def _below_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    queries, keys, values, _, cut, sharpness, threshold = primals
    d_output, d_log, *_ = cotangents
    output, _, probabilities, counted = outputs
    constant = d_log - (d_output * output).sum(-1)
    d_weights = probabilities * (d_output @ values.swapaxes(1, 2) + constant[..., None])
    d_margin = d_weights * (1 - counted)
    by_score = d_margin * sharpness[:, None]
    d_scores = d_weights - by_score
    d_keys, d_values = d_scores.swapaxes(1, 2) @ queries, probabilities.swapaxes(1, 2) @ d_output
    margin = threshold[..., None] - queries @ keys.swapaxes(1, 2) - cut[:, None]
    d_sharpness = (d_margin * margin).sum(1)
    return (
        *(d_scores @ keys, d_keys, d_values, d_weights.sum(1)),
        *(-by_score.sum(1), d_sharpness, by_score.sum(-1)),
    )


@with_vjp(_below_vjp)
def _below(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array,
    cut: mx.array,
    sharpness: mx.array,
    threshold: mx.array,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Output, log-normaliser, probabilities and σ. Its own reverse pass needs half the memory traffic."""
    scores = queries @ keys.swapaxes(1, 2)
    margin = sharpness[:, None] * (threshold[..., None] - scores - cut[:, None])
    counted = sigmoid(margin)
    plain = scores + bias[:, None]
    # log σ(t) is nearly min(t, 0), so the largest weight is between 1/2 and 1, and no factor overflows.
    top = mx.stop_gradient((plain + mx.clip(margin, -80.0, 0.0)).max(-1, keepdims=True))
    weights = exp(plain - top) * counted
    total = weights.sum(-1, keepdims=True)
    return (weights @ values) / total, (top + mx.log(total))[..., 0], weights / total, counted
