"""The samples that heads are fitted to: what attention saw in conversations, kept until all heads are fitted."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...core.gather import take
from ...errors import NectarError
from ..finite import finite, not_finite

Indices = np.ndarray | Sequence[int]


class Samples(NamedTuple):
    """Samples of M heads: queries, context output and live output [M, N, D], log-normalizers [M, N]."""

    queries: mx.array
    output: mx.array
    live_output: mx.array
    log_normalizer: mx.array
    live_log_normalizer: mx.array

    def some(self, chosen: slice) -> "Samples":
        """Some of the samples of every head."""
        return Samples(*(x[:, chosen] for x in self))

    def of_heads(self, heads: Indices) -> "Samples":
        """The samples of some of the heads."""
        return Samples(*(take(x, mx.array(np.asarray(heads, np.int32))) for x in self))

    def take(self, indices: mx.array) -> "Samples":
        """The samples at these indices, of every head."""
        return Samples(*(take(x, indices, axis=1) for x in self))


class _MappedFile:
    """A float32 array in a file. It is written as a file is: on a full disk, a write to mapped memory ends the process
    without a word."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self._path, self._shape = path, shape
        try:
            self._file = path.open("w+b", buffering=0)
            self._file.truncate(max(4, 4 * int(np.prod(shape))))
            self._array = np.memmap(self._file, np.float32, "r", shape=shape)
        except OSError as error:
            raise self._explained(error) from error

    def __getitem__(self, head: int) -> np.ndarray:
        part: np.ndarray = self._array[head]
        return part

    def write(self, head: int, at: int, values: np.ndarray) -> None:
        """values [n, ...] of one head, from its at-th sample on. NectarError on a full disk."""
        index = (head, at, *[0] * (len(self._shape) - 2))
        place, left = 4 * int(np.ravel_multi_index(index, self._shape)), memoryview(values.tobytes())
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, place)
                place, left = place + written, left[written:]
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> NectarError:
        return NectarError(f"cannot write {self._path}: {error.strerror}")


class SampleStore:
    """Samples of all heads, layer by layer, float32, in memory or in a mapped file. Heads that are given none take none
    of either: another rank has theirs.

    count: of each head, so far. capacity: at most.
    """

    def __init__(self, heads: int, capacity: int, head_dim: int, *, folder: Path | None):
        self.count, self.capacity, self._given, self._broken = 0, capacity, set[int](), set[int]()
        wide, narrow = (heads, capacity, head_dim), (heads, capacity)
        self._data: list[np.ndarray | _MappedFile] = []
        for name, shape in zip(Samples._fields, (wide, wide, wide, narrow, narrow), strict=True):
            if folder is None:
                self._data.append(np.empty(shape, np.float32))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                self._data.append(_MappedFile(folder / f"{name}.f32", shape))

    @property
    def not_finite(self) -> set[int]:
        """The heads that were given a NaN or an infinity."""
        return self._broken

    @property
    def full(self) -> bool:
        return self.count >= self.capacity

    def clear(self) -> None:
        """Forgets all samples."""
        self.count = 0

    def add(self, first_head: int, samples: Samples) -> None:
        """Writes samples [K, n, ...] of one layer at the current end; call `advance` once all layers are in."""
        self._broken |= {first_head + k for k in not_finite(samples)}
        K, n = samples.queries.shape[0], min(samples.queries.shape[1], self.capacity - self.count)
        self._given.update(range(first_head, first_head + K))
        self._write(first_head, self.count, n, samples)

    def has(self, head: int) -> bool:
        """Whether it was given samples of this head."""
        return head in self._given

    def receive(self, head: int, samples: Samples) -> None:
        """Takes over a head's samples [1, count, ...], all that there are, from another rank."""
        self._given.add(head)
        self._write(head, 0, self.count, samples)

    def _write(self, first_head: int, at: int, count: int, samples: Samples) -> None:
        """So many samples of each head, from its at-th on."""
        for kept, new in zip(self._data, samples, strict=True):
            for head, values in enumerate(np.array(new.astype(mx.float32))[:, :count], first_head):
                if isinstance(kept, np.ndarray):
                    kept[head, at : at + count] = values
                elif count:
                    kept.write(head, at, values)

    def advance(self, count: int) -> None:
        self.count = min(self.capacity, self.count + count)

    def heads(self, indices: Sequence[int], samples: Indices | None = None) -> Samples:
        """The samples of some heads as mx arrays. samples: the indices of those to take, in order (default: all)."""
        assert not self.count or self._given.issuperset(indices), "another rank has them"
        few = samples is not None and 2 * len(samples) < self.count  # then nothing else is read
        read: Any = samples if few else slice(self.count)
        # Ordering on the device also moves the arrays there: made from numpy, they stay in host memory under CUDA.
        order = mx.arange(len(samples) if few and samples is not None else self.count)
        if samples is not None and not few:
            order = mx.array(np.asarray(samples))
        taken = []
        for kept in self._data:
            taken.append(mx.contiguous(mx.take(mx.array(np.stack([kept[i][read] for i in indices])), order, axis=1)))
            mx.eval(taken[-1])  # one by one: each is there twice for a moment
        return Samples(*taken)

    def parts(self, indices: Sequence[int], samples: np.ndarray, *, size: int) -> Iterator[Samples]:
        """The samples of some heads at these indices, in order, so many at a time."""
        for at in range(0, max(1, len(samples)), size):
            yield self.heads(indices, samples[at : at + size])

    @staticmethod
    def nbytes(heads: int, count: int, head_dim: int) -> int:
        return heads * count * 4 * (3 * head_dim + 2)


class DeviceSampleStore(SampleStore):
    """Samples of all heads where the model computes, so that none is copied there to be trained on, in the types in
    which they were captured."""

    def __init__(self, capacity: int):
        self.count, self.capacity, self._given = 0, capacity, set[int]()
        self._finite = list[tuple[int, mx.array]]()  # of some samples: their first head, and which heads' are
        self._layers = dict[int, list[Samples]]()  # by their first head, in the order of capture

    def clear(self) -> None:
        super().clear()
        self._layers, self._finite = {}, []

    def add(self, first_head: int, samples: Samples) -> None:
        self._given.update(range(first_head, first_head + samples.queries.shape[0]))
        self._finite.append((first_head, finite(samples)))
        self._layers.setdefault(first_head, []).append(samples.some(slice(self.capacity - self.count)))

    def receive(self, head: int, samples: Samples) -> None:
        self._given.add(head)
        self._layers[head] = [samples]

    @property
    def not_finite(self) -> set[int]:  # looked at when all are in: one by one each layer's would be waited for
        return {first + k for first, fine in self._finite for k in np.flatnonzero(~np.array(fine)).tolist()}

    def heads(self, indices: Sequence[int], samples: Indices | None = None) -> Samples:
        assert not self.count or self._given.issuperset(indices), "another rank has them"
        order = None if samples is None else mx.array(np.asarray(samples, np.int32))
        taken = []
        for field in range(len(Samples._fields)):
            heads = (self._head(i, field) for i in indices)
            taken.append(mx.stack([x if order is None else take(x, order) for x in heads]))
            mx.eval(taken[-1])
        return Samples(*taken)

    @staticmethod
    def nbytes(heads: int, count: int, head_dim: int) -> int:
        """Of a model of 16 bits."""
        return heads * count * (2 * 3 * head_dim + 4 * 2)

    def _head(self, index: int, field: int) -> mx.array:
        first = max(head for head in self._layers if head <= index)
        pieces = self._layers[first]
        if len(pieces) > 1:  # all are in: from now on they are one
            pieces[:] = [Samples(*(mx.concatenate(list(x), axis=1) for x in zip(*pieces, strict=True)))]
            mx.eval(pieces)
        return pieces[0][field][index - first, :]
