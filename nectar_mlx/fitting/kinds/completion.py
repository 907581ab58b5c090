"""Fitting completions: clusters of the keys, and a feature map learned from there."""

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...heads import HeadArrays, Size
from ...heads.hybrid import SINKS, anchor_positions, middle
from ..samples.sample_store import Samples
from ..solve.initial import Init
from . import feature_map
from .hybrid import HybridFit


class CompletionFit(HybridFit):
    """Of `heads.Completion`: every trained key takes part in every sample."""

    @cached_property
    def trained_positions(self) -> mx.array:
        """The anchors, and so many of the others."""
        inside = np.arange(self.length)[middle(self.length)]
        most = device().completion_keys
        if len(inside) > most:
            inside = np.sort(np.random.default_rng(self.run.config.seed).choice(inside, most, replace=False))
        first, last = np.split(anchor_positions(self.length), [SINKS])
        return mx.array(np.concatenate([first, inside, last]))

    def batch(self) -> int:
        return max(32, self.run.config.batch // 4)

    def step_scores(self, size: Size) -> int:
        return self.trained_positions.size // 4 * self.run.config.batch

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        positions, scale = self.trained_positions, self.run.geometry.scale
        keys, values = self.keys_and_values(heads)
        inside = positions[middle(positions.size)]
        keys, values = keys[:, inside].astype(mx.float32), values[:, inside].astype(mx.float32)
        queries = np.array(samples.queries[..., :-1].astype(mx.float32))
        maps = [
            feature_map.clusters(np.array(keys[i]), queries[i], count, scale=scale, seed=self.run.config.seed)
            | self.anchors(index)
            for i, (index, (count,)) in enumerate(zip(heads, sizes, strict=True))
        ]
        bank = feature_map.Distilled.start(maps, keys, values, self.selector(heads), scale=scale, repeat=self.repeat)
        return Init.of(bank)

    def finish(self, index: int, head: HeadArrays) -> HeadArrays:
        keys, values = self.keys_and_values([index])
        inside = middle(self.length)
        bits = self.run.layout.bits
        assert bits is not None, "these kinds are not coded"
        return feature_map.summarise(head, keys[0, inside], values[0, inside], bits=bits)
