"""The cache of one layer whose context is partly retrieved, and the record of what answers read."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import mlx.core as mx
import numpy as np

from ..core.attention import Partial
from ..core.types import FloatArray, IntArray
from ..kernels import DecodeKernel
from ..mlxlm.cache import LiveCache, NectarCache
from .bank import HybridBank, Reading


class Record:
    """What the decode steps of one conversation read of its context, all layers together.

    mass: [n], the attention that each token of the context got exactly, summed over steps, layers and heads.
    """

    def __init__(self, tokens: int, layers: int):
        self._layers = layers
        self.mass = np.zeros(tokens)
        self.clear()

    def clear(self) -> None:
        self.mass[:] = 0
        self._calls, self._bytes = 0, 0

    def add(self, positions: IntArray, mass: FloatArray, nbytes: int) -> None:
        """positions, mass: of the same shape."""
        np.add.at(self.mass, positions, mass)
        self._calls += 1
        self._bytes += nbytes

    @property
    def steps(self) -> int:
        return self._calls // self._layers

    @property
    def bytes_per_token(self) -> int:
        """Keys and values, what the router scans, and the summary."""
        return self._bytes * self._layers // max(1, self._calls)


class RetrievalCache(NectarCache):
    """`record` is shared by the layers of one conversation; a copy of the conversation has its own."""

    bank: HybridBank

    def __init__(
        self,
        bank: HybridBank,
        context: int,
        live: LiveCache | None = None,
        kernel: DecodeKernel | None = None,
        *,
        record: Record,
    ):
        super().__init__(bank, context, live)
        self.record = record
        self._reading: Reading | None = None

    def over_context(self, queries: mx.array) -> Partial:
        self._reading = self.bank.read(queries)
        return self._reading.part

    def observe(self, log_normalizer: mx.array) -> None:
        reading, self._reading = self._reading, None
        if reading is None or reading.scores.shape[0] != 1 or reading.scores.shape[2] != 1:
            return  # only answers count, token by token
        K, k = reading.positions.shape[1], reading.positions.shape[3]
        mass = mx.exp(reading.scores - log_normalizer[..., None]).reshape(K, -1, k).sum(1)
        self.record.add(np.array(reading.positions).reshape(K, k), np.array(mass), self.bank.step_bytes)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        live, record = copy.deepcopy(self.live, memo), copy.deepcopy(self.record, memo)
        return type(self)(self.bank, self.context, live, record=record)


def recording(record: Record) -> Callable[..., NectarCache]:
    """What makes a layer's cache, for `make_caches`: the layers of one conversation share a record."""
    return partial(RetrievalCache, record=record)


def recorded(caches: Sequence[object]) -> Record | None:
    """The record of a conversation's caches, where they have one."""
    return next((cache.record for cache in caches if isinstance(cache, RetrievalCache)), None)
