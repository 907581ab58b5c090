"""The rows that heads are fitted to: what attention saw in conversations, kept until all heads are fitted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..finite import not_finite


class Samples(NamedTuple):
    """Rows of one or more heads: queries, context output and live output [M, N, D], log-normalisers [M, N]."""

    queries: Any
    output: Any
    live_output: Any
    log_normalizer: Any
    live_log_normalizer: Any


class SampleStore:
    """Samples rows of all heads, layer by layer, float32, in memory or in a mapped file.

    `not_finite`: the heads that were given a NaN or an infinity.
    """

    def __init__(self, heads: int, rows: int, head_dim: int, *, folder: Path | None):
        self.rows, self.capacity, self.not_finite = 0, rows, set[int]()
        wide, narrow = (heads, rows, head_dim), (heads, rows)
        arrays = []
        for name, shape in zip(Samples._fields, (wide, wide, wide, narrow, narrow), strict=True):
            if folder is None:
                arrays.append(np.empty(shape, np.float32))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{name}.npy"
                arrays.append(np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape))
        self._data = Samples(*arrays)

    @property
    def full(self) -> bool:
        return self.rows >= self.capacity

    def add(self, first_head: int, rows: Samples) -> None:
        """Writes rows [K, n, ...] of one layer at the current end; call `advance` once all layers are in."""
        self._look_at(first_head, rows)
        K, n = rows.queries.shape[0], min(rows.queries.shape[1], self.capacity - self.rows)
        for kept, new in zip(self._data, rows, strict=True):
            kept[first_head : first_head + K, self.rows : self.rows + n] = np.array(new.astype(mx.float32))[:, :n]

    def _look_at(self, first_head: int, rows: Samples) -> None:
        self.not_finite |= {first_head + k for k in not_finite(rows)}

    def advance(self, rows: int) -> None:
        self.rows = min(self.capacity, self.rows + rows)

    def heads(self, indices: Sequence[int], rows: Any = None) -> Samples:
        """The rows of some heads as mx arrays; rows: their indices, default all."""
        few = rows is not None and 2 * len(rows) < self.rows  # then nothing else is read
        read = rows if few else slice(self.rows)
        # Taking rows on the device also moves them there: arrays made from numpy stay in host memory under CUDA.
        order = mx.arange(len(rows) if few else self.rows) if few or rows is None else mx.array(rows)
        taken = []
        for kept in self._data:
            taken.append(mx.contiguous(mx.take(mx.array(np.stack([kept[i][read] for i in indices])), order, axis=1)))
            mx.eval(taken[-1])  # one by one: each is there twice for a moment
        return Samples(*taken)

    @staticmethod
    def nbytes(heads: int, rows: int, head_dim: int) -> int:
        return heads * rows * 4 * (3 * head_dim + 2)


class DeviceSampleStore(SampleStore):
    """Samples rows of all heads where the model computes, so that none is copied there to be trained on, in the types
    in which they were captured."""

    def __init__(self, rows: int):
        self.rows, self.capacity, self.not_finite = 0, rows, set[int]()
        self._layers = dict[int, list[Samples]]()  # by their first head, in the order of capture

    def add(self, first_head: int, rows: Samples) -> None:
        self._look_at(first_head, rows)
        room = self.capacity - self.rows
        self._layers.setdefault(first_head, []).append(Samples(*(x[:, :room] for x in rows)))

    def heads(self, indices: Sequence[int], rows: Any = None) -> Samples:
        order = mx.arange(self.rows) if rows is None else mx.array(rows)
        taken = []
        for field in range(len(Samples._fields)):
            taken.append(mx.stack([mx.take(self._head(i, field), order, axis=0) for i in indices]))
            mx.eval(taken[-1])
        return Samples(*taken)

    @staticmethod
    def nbytes(heads: int, rows: int, head_dim: int) -> int:
        """Of a model of 16 bits."""
        return heads * rows * (2 * 3 * head_dim + 4 * 2)

    def _head(self, index: int, field: int) -> mx.array:
        first = max(head for head in self._layers if head <= index)
        return mx.concatenate([part[field][index - first] for part in self._layers[first]])
