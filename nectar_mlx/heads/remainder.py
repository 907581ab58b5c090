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

from .._exp import sigmoid
from ..attention import Partial, from_scores
from .base import HeadArrays, Size
from .residual import NOTHING, Residual, Retrieved


class Remainder(Residual):
    """keys, values [m, D], bias, cut, sharpness (its logarithm) [m] a head, and the anchors; size = (m,)."""

    kind = "retrieval+nectar"
    padding: ClassVar = {"bias": NOTHING}

    def nodes(self, parameters: HeadArrays) -> HeadArrays:
        return {n: parameters[n] for n in ("keys", "values", "bias")}

    def rest(self, parameters: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        M, N, G, D = queries.shape
        part = self.below(parameters, queries.reshape(M, N * G, D), retrieved.threshold.reshape(M, N * G))
        return Partial(*(x.reshape(M, N, G, *x.shape[2:]) for x in part))

    def below(self, parameters: HeadArrays, queries: mx.array, threshold: mx.array) -> Partial:
        """Attention of queries [M, N, D] over the keys of the middle that score below threshold [M, N]."""
        p = parameters
        scores = (queries.astype(mx.float32) * self.scale) @ p["keys"].swapaxes(1, 2)
        margin = threshold[..., None] - scores - p["cut"][:, None]
        kept = mx.log(sigmoid(mx.exp(p["sharpness"])[:, None] * margin))
        return from_scores(scores + p["bias"][:, None] + kept, p["values"])

    def used(self, retrieved: Retrieved) -> mx.array:
        return mx.where(retrieved.routed >= retrieved.threshold[..., None], retrieved.scores, NOTHING)

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        (nodes,) = size
        vectors = {"bias": (nodes,), "cut": (nodes,), "sharpness": (nodes,)}
        nodes_ = {"keys": (nodes, head_dim), "values": (nodes, head_dim)}
        return nodes_ | vectors | super().shapes(size, head_dim)

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["bias"].shape[0],)


class AtThreshold(Remainder):
    """As it is trained: `rest` alone, of queries [M, N, D + 1] whose last number is the threshold."""

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        return self.below(parameters, queries[..., :-1], queries[..., -1])
