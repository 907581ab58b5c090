"""Fitting quadratures: nodes from Attention Matching, or every key where there is room."""

from collections.abc import Sequence

import mlx.core as mx

from ...core.device import device
from ...heads import Quadrature, Size
from ..samples.sample_store import Samples
from ..solve.initial import Init
from ..solve.node_training import NodeTraining
from ..solve.regression import Training
from .base import KindFit

_LARGE = 2.0  # times the mean of all heads
PART = 1 << 14  # samples that are prepared for training at a time


class QuadratureFit(KindFit):
    """Of `heads.Quadrature`."""

    def keeps_every_key(self, size: Size) -> bool:
        return size[0] >= self.length

    def trained(self, sizes: Sequence[Size]) -> list[bool]:
        counts = [count for count, *_ in sizes]
        # A head that gets so much more than others looks for single tokens: it would learn its samples by heart.
        most = max(device().trained_share * self.length, _LARGE * sum(counts) / len(counts))
        return [count <= most and trains for count, trains in zip(counts, super().trained(sizes), strict=True)]

    def prepare(self) -> None:
        _ = self.importance

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        scale = self.run.geometry.scale
        if all(self.keeps_every_key(size) for size in sizes):
            return Init.of(Quadrature.stack([self._keys(index) for index in heads], scale=scale))
        nodes = self.match(heads, [size[0] for size in sizes])
        return Init.of(Quadrature.stack(nodes, scale=scale))

    def training(self, heads: Sequence[int], count: int | None = None) -> Training:
        if self.run.layout.bank is not Quadrature:  # a kind of its own, with other scores
            return super().training(heads, count)
        parts = self.data.train.parts(heads, self.order[:count], size=PART)
        return NodeTraining(parts, scale=self.run.geometry.scale, batch=self.batch())

    def _keys(self, index: int) -> dict[str, mx.array]:
        """A head's own keys and values, as nodes."""
        layer, k = divmod(index, self.run.geometry.n_kv_heads)
        return {name: x.astype(mx.float32) for name, x in self.banks[layer].nodes()[k].items()}
