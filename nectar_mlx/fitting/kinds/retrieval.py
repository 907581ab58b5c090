"""Retrieval alone: the anchors are kept, nothing is trained."""

from collections.abc import Sequence

from ...heads import Retrieval, Size
from ..samples.sample_store import Samples
from ..solve.initial import Init
from .hybrid import HybridFit


class RetrievalFit(HybridFit):
    """Of `heads.Retrieval`: nothing is trained."""

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        return Init.of(Retrieval.stack([self.anchors(head) for head in heads], scale=self.run.geometry.scale))
