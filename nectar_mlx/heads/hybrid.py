"""Heads beside retrieval: some keys of the context are read exactly, the head stands for all others.

The first and last tokens of the context, the anchors, are kept in the head and always exact. Of the middle, a query's
top keys may be read from the file beside the .nectar; `complement` stands for what was not read. Every part is an
(o, L), so that merging them is the one normalisation of arXiv 2604.05438.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..core.attention import EMPTY, Partial, from_scores, merge, weighted
from ..core.quantize import Quantized, Stored
from .base import Bank, HeadArrays, Size
from .quadrature import Quadrature

SINKS, TAIL = 4, 8
ANCHORS = SINKS + TAIL
EVERYTHING = 1e9  # a threshold that every score stays below


class Retrieved(NamedTuple):
    """What was read for each of N tokens of M heads, the same for the token's G queries.

    keys, values: [M, N, k, D]. scores: [M, N, G, k], scale · q·k. routed: [M, N, G, k], the selector's estimate of
    them. threshold: [M, N, G], above its estimate of the scores of all keys that were not read.
    """

    keys: mx.array
    values: mx.array
    scores: mx.array
    routed: mx.array
    threshold: mx.array


class HybridHead(Bank):
    """Anchors `anchor_keys`, `anchor_values` [ANCHORS, D] a head, and `complement` for the middle of the context.

    With nothing retrieved a head is a quadrature of the whole context: its anchors and its `nodes`.
    """

    keeps_keys = True

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        nodes = self._whole(parameters)
        return weighted(queries, nodes["keys"], nodes["values"], bias=nodes["bias"], scale=self.scale)

    def without_retrieval(self) -> Quadrature:
        """The anchors and the nodes, together a quadrature of the whole context."""
        sizes = tuple((ANCHORS + size[0],) for size in self.sizes)
        parameters = self._whole(self.parameters)
        return Quadrature(parameters=parameters, sizes=sizes, scale=self.scale, offset=self.offset)

    @classmethod
    def stored_without_retrieval(cls, head: Stored) -> Stored:
        head = {"anchor_bias": mx.zeros(ANCHORS), **head}
        joined = {name: (f"anchor_{name}", name) for name in ("keys", "values", "bias")}
        return {name: _concatenated([head[n] for n in names if n in head]) for name, names in joined.items()}

    def _whole(self, parameters: HeadArrays) -> HeadArrays:
        nodes, M = self.nodes(parameters), len(self.sizes)
        anchors = {n: parameters[f"anchor_{n}"] for n in ("keys", "values")} | {"bias": mx.zeros((M, ANCHORS))}
        return {n: mx.concatenate([anchors[n], nodes[n]], axis=1) for n in anchors}

    def complete(self, queries: mx.array, retrieved: Retrieved) -> Partial:
        """The whole context for queries [M, N, G, D], the retrieved keys exact."""
        exact = shared(self.used(retrieved), retrieved.values)
        complement = self.complement(self.parameters, queries, retrieved)
        return merge(merge(self.anchors(self.parameters, queries), exact), complement)

    def nodes(self, parameters: HeadArrays) -> HeadArrays:
        """What stands for the middle while nothing is retrieved: keys, values [M, m, D] and bias [M, m]."""
        raise NotImplementedError

    def complement(self, parameters: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        """The keys of the middle that were not retrieved, for queries [M, N, G, D]."""
        raise NotImplementedError

    def used(self, retrieved: Retrieved) -> mx.array:
        """The scores [M, N, G, k] of the retrieved keys, EMPTY for those that `complement` answers for."""
        return retrieved.scores

    def anchors(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        """The anchors alone, for queries [M, N, G, D]."""
        M, N, G, D = queries.shape
        keys, values = parameters["anchor_keys"], parameters["anchor_values"]
        part = weighted(queries.reshape(M, N * G, D), keys, values, scale=self.scale)
        return Partial(*(x.reshape(M, N, G, *x.shape[2:]) for x in part))

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"anchor_keys": (ANCHORS, head_dim), "anchor_values": (ANCHORS, head_dim)}

    @property
    def head_dim(self) -> int:
        return self.parameters["anchor_keys"].shape[-1]


class Retrieval(HybridHead):
    """Selection only, the baseline of arXiv 2604.05438: what is not read is nothing. size = (0,)."""

    kind = "retrieval"
    trainable = False

    @classmethod
    def size_for(cls, units: int) -> Size:
        return (0,)

    def nodes(self, parameters: HeadArrays) -> HeadArrays:
        M = len(self.sizes)
        return {n: mx.zeros((M, 0, self.head_dim)) for n in ("keys", "values")} | {"bias": mx.zeros((M, 0))}

    def complement(self, parameters: HeadArrays, queries: mx.array, retrieved: Retrieved) -> Partial:
        return Partial(mx.zeros(queries.shape), mx.full(queries.shape[:-1], EMPTY))

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (0,)


def _concatenated(parts: Sequence[mx.array | Quantized]) -> mx.array | Quantized:
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if len(quantized) == len(parts):
        return Quantized(
            mx.concatenate([part.data for part in quantized]), mx.concatenate([part.scales for part in quantized])
        )
    return mx.concatenate([part for part in parts if isinstance(part, mx.array)])


def shared(scores: mx.array, values: mx.array) -> Partial:
    """Attention by scores [M, N, G, S] over values [M, N, S, D] that a token's G queries share -> [M, N, G, ...]."""
    M, N, G, S = scores.shape
    part = from_scores(scores.reshape(M * N, G, S), values.reshape(M * N, S, -1))
    return Partial(*(x.reshape(M, N, G, *x.shape[2:]) for x in part))


def anchor_positions(tokens: int) -> list[int]:
    """The positions of the anchors in a context of so many tokens."""
    return [*range(SINKS), *range(tokens - TAIL, tokens)]


def middle(tokens: int) -> slice:
    """The positions that a head's `complement` stands for."""
    return slice(SINKS, tokens - TAIL)
