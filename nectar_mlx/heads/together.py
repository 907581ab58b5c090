"""Together: a text's heads beside those of other texts in the same conversation; C texts weigh as much as one."""

import math
from dataclasses import dataclass

import mlx.core as mx

from ..core.attention import Partial, merge
from .base import Bank


@dataclass(kw_only=True)
class Together(Bank):
    """L = log (1/C) Σ exp(L_c) over the text's own heads and the others'. Never stored, and nothing in it is trained.

    own: of the text. others: of all other texts, relative to the same offset. texts: C, this one counted.
    """

    own: Bank
    others: Bank
    texts: int

    kind = "together"

    @classmethod
    def of(cls, own: Bank, others: Bank, *, texts: int) -> "Together":
        """A text's heads beside the others'."""
        return cls(
            parameters=own.parameters,
            sizes=own.sizes,
            scale=own.scale,
            offset=own.offset,
            own=own,
            others=others,
            texts=texts,
        )

    def __call__(self, queries: mx.array) -> Partial:
        part = merge(self.own(queries), self.others(queries))
        return part._replace(log_normalizer=part.log_normalizer - math.log(self.texts))

    def all_but_own(self, queries: mx.array, live: Partial) -> Partial:
        """What the text's own heads are merged with: the other texts and the live tokens, which weigh C times as much
        as a text. queries [B, H, T, D]; live and the result [B, H, T, ...]."""
        heavier = live._replace(log_normalizer=live.log_normalizer + math.log(self.texts))
        merged = merge(self.others.over(queries), heavier)
        return merged._replace(output=merged.output.astype(live.output.dtype))

    @property
    def head_dim(self) -> int:
        return self.own.head_dim
