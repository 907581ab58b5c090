"""Fitting thresholded nodes: nodes of the whole middle; where each is cut off is learned."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...heads import Size
from ...heads.hybrid import middle
from ...heads.thresholded import TrainableThresholdedNodes
from ..samples.sample_store import Samples
from ..solve.initial import Init
from .hybrid import HybridFit

_SHARPNESS = 1.0  # its logarithm, to start from


class ThresholdedFit(HybridFit):
    """Of `heads.ThresholdedNodes`: nodes of the whole middle; where to cut is learned from there."""

    def prepare(self) -> None:
        super().prepare()
        _ = self.importance

    def rank_keys(self) -> list[mx.array]:
        inside = np.zeros(self.length, np.float32)
        inside[middle(self.length)] = 1
        return [weights * mx.array(inside) for weights in super().rank_keys()]

    def ranking_samples(self, heads: Sequence[int]) -> Samples:
        chosen = self.shuffled(self.data.train.count)[: self.run.config.matching_samples]
        return self._of_whole_middle(self.data.train.heads(heads, np.sort(chosen)), heads)

    def matching_samples(self, heads: Sequence[int]) -> Samples:
        return self._of_whole_middle(super().matching_samples(heads), heads)

    def _of_whole_middle(self, samples: Samples, heads: Sequence[int]) -> Samples:
        samples = self._split(samples, heads, unread=1.0)
        return samples._replace(queries=samples.queries[..., :-1])

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        nodes = [
            matched
            | {"cut": mx.zeros(matched["bias"].shape), "sharpness": mx.full(matched["bias"].shape, _SHARPNESS)}
            | self.anchors(index)
            for index, matched in zip(heads, self.match(heads, [size[0] for size in sizes]), strict=True)
        ]
        return Init.of(TrainableThresholdedNodes.stack(nodes, scale=self.run.geometry.scale))
