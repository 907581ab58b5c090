"""Matrices whose rows lie on grids of their own: entry = number · 2^(exponent / 2), an exponent a row.

A node that few answers depend on can be kept coarsely, one that many do must be kept finely:
`fitting.solve.quantization` chooses the grids and puts the values on them. Here those are found again in the values
themselves and lose nothing. Numbers are coded with spreads (`core.rans`) from the exponent of the row and the size of
the column; both are coded before them.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..core import rans
from ..core.rans import Numbers, Octets
from ..errors import NectarError

_FINEST = 4096  # the largest number that a row on a grid may hold
_LARGEST = 127  # of a row that is on none
_BLOCK = 1 << 22  # numbers that are coded together, at most; files depend on it
_WORKERS = os.cpu_count() or 1
MEAN_BITS = 4.0  # that a number is to take on average: fewer leave more room for nodes, which are then too coarse


class GridMatrix(NamedTuple):
    """numbers [rows, D], exponents [rows]."""

    numbers: Numbers
    exponents: Numbers

    @classmethod
    def of(cls, values: np.ndarray[Any, Any]) -> "GridMatrix":
        """values [rows, D] on the coarsest grids that lose nothing, or rounded to numbers up to _LARGEST."""
        values = values.astype(np.float64)
        top = np.abs(values).max(1, initial=0)
        left = np.flatnonzero(top > 0)
        numbers, exponents = np.zeros(values.shape, np.int32), np.zeros(len(values), np.int32)
        coarsest = np.floor(2 * np.log2(np.maximum(top, 1e-30))).astype(np.int32) + 1  # the largest entry is 1
        for finer in range(2 * int(np.log2(_FINEST)) + 1):
            steps = np.exp2((coarsest[left] - finer) / 2)[:, None]
            few = values[left, :8] / steps  # most grids are refuted by a few entries
            might = np.abs(few - np.rint(few)).max(1, initial=0) < 1e-3
            scaled = values[left[might]] / steps[might]
            whole = np.rint(scaled)
            fits = (np.abs(scaled - whole).max(1, initial=0) < 1e-3) & (np.abs(whole).max(1, initial=0) > 0)
            found = left[might][fits]
            numbers[found], exponents[found] = whole[fits], coarsest[found] - finer
            might[might] = fits
            left = left[~might]
        exponents[left] = np.ceil(2 * np.log2(top[left] / _LARGEST))
        exponents[top == 0] = exponents[top > 0].min(initial=0)
        numbers[left] = np.rint(values[left] / np.exp2(exponents[left] / 2)[:, None])
        return cls(numbers, exponents)

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[rows, D]"""
        steps = np.exp2(self.exponents / 2).astype(np.float32)
        found: np.ndarray[Any, np.dtype[np.float32]] = self.numbers.astype(np.float32) * steps[:, None]
        return found

    def sizes(self) -> Numbers:
        """`column_sizes`, or more, where a number could not be coded otherwise; [D]."""
        if not len(self.numbers):
            return np.zeros(self.numbers.shape[1], np.int32)
        found: Numbers = np.maximum(column_sizes(self.values), self.exponents.min() - 12)
        while (beyond := (np.abs(self.numbers) > rans.limit(spreads(found, self.exponents))).any(0)).any():
            found += beyond
        return found


def column_sizes(values: np.ndarray[Any, Any]) -> Numbers:
    """Twice the binary logarithm of what each column's entries are on average: [rows, D] -> [D]."""
    mean = np.sqrt(np.square(values.astype(np.float64)).mean(0))
    found: Numbers = np.rint(2 * np.log2(np.maximum(mean, 1e-9))).astype(np.int32)
    return found


def spreads(sizes: Numbers, exponents: Numbers) -> Numbers:
    """Of the numbers of every row and column, [rows, D]."""
    found: Numbers = sizes[None] - exponents[:, None]
    return found


def expected_bytes(rows: int, width: int) -> float:
    """What a matrix takes in the file once it was settled at MEAN_BITS; measured: training moves what is still free
    away from the grids that were chosen for it."""
    return rows * (width * (MEAN_BITS + 0.11) / 8 + 0.4) + 0.4 * width + 4 if rows else 0


def encode(matrices: Sequence[GridMatrix]) -> tuple[Octets, Octets]:
    """Of several matrices: how their numbers are to be read, and their numbers."""
    header, told, sizes = list[int](), list[_Coded](), [matrix.sizes() for matrix in matrices]
    for matrix, size in zip(matrices, sizes, strict=True):
        for each in (matrix.exponents, size):
            middle = round(float(each.mean())) if len(each) else 0
            spread = _spread(each - middle)
            told.append(_Coded(each - middle, np.full(len(each), spread)))
            header += [middle, spread]

    def write(block: slice) -> Octets:
        each = zip(matrices[block], sizes[block], strict=True)
        return _together([_Coded(m.numbers.reshape(-1), spreads(s, m.exponents).reshape(-1)) for m, s in each])

    parts = [np.array(header, np.int8).view(np.uint8), _together(told)]
    with ThreadPoolExecutor(_WORKERS) as threads:
        coded = list(threads.map(write, _blocks([matrix.numbers.size for matrix in matrices])))
    lengths = np.array([len(x) for x in coded], "<u4").view(np.uint8)
    return np.concatenate(parts), np.concatenate([lengths, *coded])


def decode(how: Octets, numbers: Octets, shapes: Sequence[tuple[int, int]]) -> Iterator[GridMatrix]:
    """The inverse of `encode`, for matrices of these shapes. NectarError if the bytes are not those of such."""
    lengths = [n for shape in shapes for n in shape]
    if len(how) < 2 * len(lengths):
        raise NectarError("the file is damaged: it does not say how its numbers are to be read")
    header = how[: 2 * len(lengths)].view(np.int8).reshape(-1, 2).astype(np.int32)
    told = rans.decode(how[2 * len(lengths) :], np.repeat(header[:, 1], lengths)) + np.repeat(header[:, 0], lengths)
    parts = np.split(told, np.cumsum(lengths)[:-1])
    exponents, sizes = parts[::2], parts[1::2]

    def read(block: slice, data: Octets) -> list[GridMatrix]:
        among = [spreads(s, e) for s, e in zip(sizes[block], exponents[block], strict=True)]
        whole = rans.decode(data, np.concatenate([x.reshape(-1) for x in among]))
        each = np.split(whole, np.cumsum([x.size for x in among])[:-1])
        return [GridMatrix(x.reshape(a.shape), e) for x, a, e in zip(each, among, exponents[block], strict=True)]

    blocks = _blocks([rows * width for rows, width in shapes])
    table = numbers[: 4 * len(blocks)]
    ends = np.cumsum(table[: len(table) // 4 * 4].view("<u4"), dtype=np.int64)
    if len(table) < 4 * len(blocks) or len(numbers) != len(table) + (ends[-1] if len(ends) else 0):
        raise NectarError("the file is damaged: it has more or fewer numbers than its sizes say")
    each = np.split(numbers[len(table) :], ends[:-1])
    with ThreadPoolExecutor(_WORKERS) as threads:
        for first in range(0, len(blocks), _WORKERS):  # so many at a time: on the way there is far more than in the end
            some = slice(first, first + _WORKERS)
            for found in threads.map(read, blocks[some], each[some]):
                yield from found


def _blocks(counts: Sequence[int]) -> list[slice]:
    """Matrices with so many numbers each, in groups that are coded apart."""
    blocks, start, total = list[slice](), 0, 0
    for i, count in enumerate(counts):
        if total and total + count > _BLOCK:
            blocks.append(slice(start, i))
            start, total = i, 0
        total += count
    return [*blocks, slice(start, len(counts))] if len(counts) > start else blocks


class _Coded(NamedTuple):
    numbers: Numbers
    spreads: Numbers


def _spread(numbers: Numbers) -> int:
    """The one spread for all that is nearest to their size and holds the largest."""
    found = round(2 * np.log2(np.sqrt(np.square(numbers).mean()) + 0.1)) if len(numbers) else 0
    while np.abs(numbers).max(initial=0) > rans.limit(np.array([found]))[0]:
        found += 1
    return int(found)


def _together(parts: Sequence[_Coded]) -> Octets:
    return rans.encode(*(np.concatenate(each) for each in zip(*parts, strict=True)))
