"""Caches of layers that read another layer's keys and values (Gemma 3n, Gemma 4)."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .cache import BatchNectarCache, NectarCache


class PassedOn(_BaseCache):
    """The cache of a layer that is given another layer's keys and values: it has none of its own."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        return n

    def empty(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, object]) -> "PassedOn":
        return self

    @classmethod
    def merge(cls, caches: Sequence["PassedOn"]) -> "PassedOn":
        return caches[0]

    def prepare(self, **kwargs: object) -> None: ...

    def finalize(self) -> None: ...

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None: ...

    def extend(self, other: "PassedOn") -> None: ...

    def extract(self, idx: int) -> "PassedOn":
        return self


class SharedCache(PassedOn):
    """The same, where heads stand for the text in the other layer, whose cache `owner` is."""

    def __init__(self, owner: NectarCache):
        self.owner = owner

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        return self.owner.attend(queries, keys, values, **options)

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedCache":
        return SharedCache(copy.deepcopy(self.owner, memo))

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> "SharedBatch":
        return SharedBatch(NectarCache.merge([NectarCache(c.owner.bank, c.owner.context) for c in caches]))


class SharedBatch(SharedCache):
    """Of a batch: the padding is in the masks that plain operations take, so `owner` knows the contexts alone."""

    owner: BatchNectarCache

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        self.owner.filter(batch_indices)

    def extend(self, other: PassedOn) -> None:
        assert isinstance(other, SharedBatch)
        self.owner.extend(other.owner)

    def extract(self, idx: int) -> SharedCache:
        row = self.owner.rows[idx]
        return SharedCache(NectarCache(row.bank, row.context))
