"""Matrices whose rows have a step of their own: entry = integer · 2^(exponent / 2), an exponent a row.

A node that few answers depend on can be kept coarsely, one that many do must be kept finely:
`fitting.solve.quantization` chooses the steps and rounds the values to them. Here the steps are found again in the
values, and nothing is lost. Integers are entropy-coded (`core.rans`); an integer's log2 scale is that of its column
less its row's exponent, and the columns' scales and the rows' exponents are coded in front of the integers. All three
are in half octaves: twice a binary logarithm.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..core import rans
from ..core.types import AnyArray, ByteArray, DoubleArray, FloatArray, IntArray
from ..errors import NectarError

_LARGEST = 4096  # integer of a row whose step is found
_LARGEST_ROUNDED = 127  # integer of a row that must be rounded
_NOTHING = 1e-12  # rows whose entries are no larger are zero
_LEAST_EXPONENT, _MOST_EXPONENT = -300, 100  # of a row's step or a column's scale
_TOGETHER = 1 << 18  # numbers whose steps are looked for at a time: they stay in a core's cache
BLOCK = 1 << 22  # integers that are coded together, at most; files depend on it
_WORKERS = min(2, os.cpu_count() or 1)  # more wait for each other (docs/log/file.md); each takes some 100 MB
MEAN_BITS = 4.0  # that an entry takes on average, where nothing else is said
MOVED_BITS = 0.11  # that it takes more: training moves what is still free away from the steps that were chosen for it


class GridMatrix(NamedTuple):
    """integers [rows, D], exponents [rows]."""

    integers: IntArray
    exponents: IntArray

    @classmethod
    def of(cls, values: AnyArray) -> "GridMatrix":
        """values [rows, D] with the coarsest steps that lose nothing; rows without such are rounded to integers up to
        _LARGEST_ROUNDED."""
        return cls.of_all([values])[0]

    @classmethod
    def of_all(cls, matrices: Sequence[AnyArray]) -> list["GridMatrix"]:
        """`of` of several matrices, all rows of one width at once."""
        found = dict[int, GridMatrix]()
        for width in {x.shape[1] for x in matrices}:
            alike = [i for i, x in enumerate(matrices) if x.shape[1] == width]
            integers, exponents = _coarsest(np.concatenate([matrices[i] for i in alike]))
            ends = np.cumsum([len(matrices[i]) for i in alike])[:-1]
            parts = zip(alike, np.split(integers, ends), np.split(exponents, ends), strict=True)
            found |= {i: cls(x, e) for i, x, e in parts}
        for matrix in found.values():
            zero = ~matrix.integers.any(1)
            matrix.exponents[zero] = matrix.exponents[~zero].min(initial=0)
        return [found[i] for i in range(len(matrices))]

    @property
    def values(self) -> FloatArray:
        """[rows, D]"""
        steps = np.exp2(self.exponents / 2).astype(np.float32)
        return self.integers.astype(np.float32) * steps[:, None]

    def column_scales(self) -> IntArray:
        """`column_scales` of the values, or more where an integer could not be coded otherwise; [D]."""
        if not len(self.integers):
            return np.zeros(self.integers.shape[1], np.int32)
        columns: IntArray = np.maximum(column_scales(self.values), self.exponents.min() - 12)
        order = np.argsort(self.exponents, kind="stable")
        steps, firsts = np.unique(self.exponents[order], return_index=True)
        largest = np.maximum.reduceat(np.abs(self.integers[order]), firsts)
        while (beyond := (largest > rans.limit(log2_scales(columns, steps))).any(0)).any():
            columns += beyond
        return columns


def _coarsest(values: AnyArray) -> tuple[IntArray, IntArray]:
    """The integers [rows, D] and exponents [rows] of `GridMatrix.of`; a row of zeros has the exponent 0."""
    integers, exponents = np.zeros(values.shape, np.int32), np.zeros(len(values), np.int32)
    step = max(1, _TOGETHER // max(1, values.shape[1]))
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        _find(values[rows].astype(np.float64), integers[rows], exponents[rows])
    return integers, exponents


def _find(values: DoubleArray, integers: IntArray, exponents: IntArray) -> None:
    """`_coarsest` of some rows, into arrays of zeros."""
    top = np.abs(values).max(1, initial=0)
    few, left = values[:, :8].T.copy(), np.flatnonzero(top > _NOTHING)
    coarsest = np.floor(2 * np.log2(np.maximum(top, 1e-30))).astype(np.int32) + 1  # the largest entry is 1
    for finer in range(2 * int(np.log2(_LARGEST)) + 1):
        steps = np.exp2((coarsest[left] - finer) / 2)
        fits = _are_whole(few.take(left, 1) / steps, 0)[0]  # a few entries refute most steps
        possible = fits.nonzero()[0]
        if not len(possible):
            continue
        whole, rounded = _are_whole(values.take(left[possible], 0) / steps[possible, None], 1)
        rows = left[possible[whole]]
        integers[rows], exponents[rows] = rounded[whole], coarsest[rows] - finer
        fits[possible] = whole
        left = left[~fits]
    exponents[left] = np.ceil(2 * np.log2(top[left] / _LARGEST_ROUNDED))
    integers[left] = np.rint(values[left] / np.exp2(exponents[left] / 2)[:, None])


def _are_whole(scaled: DoubleArray, axis: int) -> tuple[AnyArray, DoubleArray]:
    """Whether all numbers along an axis are whole; and all of them rounded. Overwrites them."""
    rounded = np.rint(scaled)
    scaled -= rounded
    return np.abs(scaled, out=scaled).max(axis, initial=0) < 1e-3, rounded


def column_scales(values: AnyArray) -> IntArray:
    """2·log2 of the root mean square of each column: [rows, D] -> [D]."""
    mean = np.sqrt(np.square(values.astype(np.float64)).mean(0))
    return np.asarray(np.rint(2 * np.log2(np.maximum(mean, 1e-9))), np.int32)


def log2_scales(columns: IntArray, exponents: IntArray) -> IntArray:
    """Of the integers of every row and column, [rows, D]. columns: `column_scales`."""
    return np.asarray(columns.astype(np.int16)[None] - exponents.astype(np.int16)[:, None])


def expected_bytes(rows: int, width: int, *, bits: float) -> float:
    """Bytes that a matrix takes in the file once it was rounded to so many bits; measured."""
    return rows * (width * (bits + MOVED_BITS) / 8 + 0.4) + 0.4 * width + 4 if rows else 0


class Block(NamedTuple):
    """Matrices that are coded together: the exponents of all rows, the scales of all columns, integers as bytes."""

    exponents: IntArray
    columns: IntArray
    coded: ByteArray

    @classmethod
    def of(cls, matrices: Sequence[GridMatrix]) -> "Block":
        columns = [matrix.column_scales() for matrix in matrices]
        scales = [log2_scales(c, m.exponents).reshape(-1) for c, m in zip(columns, matrices, strict=True)]
        coded = rans.encode(np.concatenate([m.integers.reshape(-1) for m in matrices]), np.concatenate(scales))
        return cls(np.concatenate([m.exponents for m in matrices]), np.concatenate(columns), coded)


def coded(matrices: Sequence[Sequence[AnyArray]]) -> list[Block]:
    """The matrices [rows, D] of several blocks, each as `GridMatrix.of` finds it."""
    with ThreadPoolExecutor(_WORKERS) as threads:
        return list(threads.map(lambda values: Block.of(GridMatrix.of_all(values)), matrices))


def encode(matrices: Sequence[GridMatrix]) -> tuple[ByteArray, ByteArray]:
    """Several matrices -> their exponents and column scales, and their integers."""
    parts = [matrices[block] for block in blocks([matrix.integers.size for matrix in matrices])]
    with ThreadPoolExecutor(_WORKERS) as threads:
        every = list(threads.map(Block.of, parts))
    return join(every, [matrix.integers.shape for matrix in matrices])


def join(every: Sequence[Block], shapes: Sequence[tuple[int, ...]]) -> tuple[ByteArray, ByteArray]:
    """`encode` of matrices of these shapes, by their blocks."""
    header, vectors = list[int](), list[_Coded]()
    rows = np.split(np.concatenate([block.exponents for block in every]), np.cumsum([n for n, _ in shapes])[:-1])
    columns = np.split(np.concatenate([block.columns for block in every]), np.cumsum([n for _, n in shapes])[:-1])
    for vector in itertools.chain.from_iterable(zip(rows, columns, strict=True)):
        middle = round(float(vector.mean())) if len(vector) else 0
        scale = _common_scale(vector - middle)
        vectors.append(_Coded(vector - middle, np.full(len(vector), scale)))
        header += [middle, scale]
    lengths = np.array([len(block.coded) for block in every], "<u4").view(np.uint8)
    scales = np.concatenate([np.array(header, np.int8).view(np.uint8), _encoded(vectors)])
    return scales, np.concatenate([lengths, *(block.coded for block in every)])


def decode(scales: ByteArray, integers: ByteArray, shapes: Sequence[tuple[int, int]]) -> Iterator[GridMatrix]:
    """The inverse of `encode`, for matrices of these shapes. NectarError if the bytes are not those of such."""
    lengths = [n for shape in shapes for n in shape]
    if len(scales) < 2 * len(lengths):
        raise NectarError("the file is damaged: it does not hold the steps of all its matrices")
    header = scales[: 2 * len(lengths)].view(np.int8).reshape(-1, 2).astype(np.int32)
    vectors = rans.decode(scales[2 * len(lengths) :], np.repeat(header[:, 1], lengths))
    parts = np.split(vectors + np.repeat(header[:, 0], lengths), np.cumsum(lengths)[:-1])
    exponents, columns = parts[::2], parts[1::2]
    if any(part.min(initial=0) < _LEAST_EXPONENT or part.max(initial=0) > _MOST_EXPONENT for part in parts):
        raise NectarError("the file is damaged: its steps are none of numbers")

    def read(block: slice, data: ByteArray) -> list[GridMatrix]:
        known = [log2_scales(c, e) for c, e in zip(columns[block], exponents[block], strict=True)]
        decoded = rans.decode(data, np.concatenate([x.reshape(-1) for x in known]))
        flat = np.split(decoded, np.cumsum([x.size for x in known])[:-1])
        return [GridMatrix(x.reshape(s.shape), e) for x, s, e in zip(flat, known, exponents[block], strict=True)]

    slices = blocks([rows * width for rows, width in shapes])
    table = integers[: 4 * len(slices)]
    ends = np.cumsum(table[: len(table) // 4 * 4].view("<u4"), dtype=np.int64)
    if len(table) < 4 * len(slices) or len(integers) != len(table) + (ends[-1] if len(ends) else 0):
        raise NectarError("the file is damaged: it has more or fewer integers than its sizes say")
    data = np.split(integers[len(table) :], ends[:-1])
    with ThreadPoolExecutor(_WORKERS) as threads:
        for first in range(0, len(slices), _WORKERS):  # decoding takes far more memory than its result
            now = slice(first, first + _WORKERS)
            for matrices in threads.map(read, slices[now], data[now]):
                yield from matrices


def blocks(counts: Sequence[int]) -> list[slice]:
    """Which matrices are coded together, given how many integers each has: at most BLOCK, or one matrix."""
    slices, start, total = list[slice](), 0, 0
    for i, count in enumerate(counts):
        if total and total + count > BLOCK:
            slices.append(slice(start, i))
            start, total = i, 0
        total += count
    return [*slices, slice(start, len(counts))] if len(counts) > start else slices


class _Coded(NamedTuple):
    integers: IntArray
    log2_scales: IntArray


def _common_scale(integers: IntArray) -> int:
    """The one log2 scale for all that is nearest to their size and holds the largest."""
    scale = round(2 * np.log2(np.sqrt(np.square(integers).mean()) + 0.1)) if len(integers) else 0
    while np.abs(integers).max(initial=0) > rans.limit(np.array([scale]))[0]:
        scale += 1
    return int(scale)


def _encoded(parts: Sequence[_Coded]) -> ByteArray:
    return rans.encode(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
