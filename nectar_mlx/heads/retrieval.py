"""Selection only, the baseline of arXiv 2604.05438: keys that are not read are ignored."""

import mlx.core as mx

from ..core.attention import EMPTY, Partial
from .base import HeadArrays, Size
from .hybrid import HybridHead, Retrieved


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
