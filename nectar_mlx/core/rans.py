"""Entropy coding of integers: asymmetric numeral systems (rANS, arXiv 1311.2540).

Every integer comes with a guess of its size, its log2 scale in half octaves: 2·log2 of a standard deviation. It tells
the encoder and the decoder which of a few logistic distributions the integer is coded under. Where the scale is large
the lowest bits are as good as random: those are stored as they are. Integers are coded in parallel lanes of about
`_STEPS` each, which makes numpy fast enough; a lane costs two bytes.
"""

from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import NectarError
from .types import ByteArray, DoubleArray, IntArray, WordArray

_AnyInteger = TypeVar("_AnyInteger", bound=np.integer)

# Files depend on all of these.
_LEAST, _MOST = -8, 6  # log2 scales with a distribution of their own; larger ones store low bits verbatim
_PRECISION = 14  # bits of a probability
_MOST_LOW = 20  # bits that are stored as they are: more do not fit beside the others
_STEPS = 1024  # integers of a lane
_SHIFT, _SLOT = np.uint32(_PRECISION), np.uint32((1 << _PRECISION) - 1)
_LOW_AT = 16  # bits, behind which an entry of `Models.places` tells of low ones
_NUMBERS = 1 << 16  # that are looked up at once; files do not depend on it


class Models(NamedTuple):
    """The distributions, by log2 scale, from the smallest on.

    limits: the symbols of a model are the integers -limit … limit, counted from 0. frequencies [models, symbols]: of
    each symbol in 2^_PRECISION. For the encoder: starts, an integer's frequency and how many slots come before its own,
    in one word, or 0 where there is no such symbol; places, by log2 scale as in _SCALES, where the integer 0 is in
    starts, the others around it, and, _LOW_AT bits above, how many low bits there are. For the decoder, at [model ·
    2^_PRECISION + slot]: symbols, the integer that has this slot; and moves, its frequency and the slot's place among
    its slots, in one word; moves_at, by log2 scale, where a model's begin. costs: bits that an integer takes on
    average.
    """

    limits: IntArray
    frequencies: npt.NDArray[np.int64]
    starts: WordArray
    places: IntArray
    symbols: npt.NDArray[np.int8]
    moves: WordArray
    moves_at: WordArray
    costs: DoubleArray


def limit(log2_scales: IntArray) -> IntArray:
    """The largest integers, of either sign, that can be coded with these log2 scales."""
    low = _low_bits(log2_scales)
    return (models().limits.take(_model(log2_scales)) << low) - (1 << low >> 1)


def cost(log2_scales: IntArray) -> DoubleArray:
    """The bits that an integer of each log2 scale takes on average."""
    return np.asarray(models().costs.take(_model(log2_scales)) + _low_bits(log2_scales))


def encode(integers: IntArray, log2_scales: IntArray) -> ByteArray:
    """Integers [N] with their log2 scales [N] -> bytes. ValueError for an integer beyond its `limit`."""
    whole, scales = _lanes(integers), _lanes(log2_scales, _LEAST)
    states, words = np.full(whole.shape[1], 1 << 16, np.uint32), list[ByteArray]()
    low_bits, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    # Backwards: what is coded last is decoded first. A state stays below 2^32.
    for steps in reversed(_together(whole)):
        starts, *verbatim = _starts(whole[steps], scales[steps])
        low_bits.append(verbatim[0])
        counts.append(verbatim[1])
        frequencies = starts >> _SHIFT
        ends = frequencies << np.uint32(32 - _PRECISION)  # of the states that do not lose a word
        others = np.uint32(1 << _PRECISION) - frequencies
        starts &= _SLOT
        for start, frequency, other, end in zip(*(x[::-1] for x in (starts, frequencies, others, ends)), strict=True):
            full = np.flatnonzero(states >= end)
            over = states.take(full)
            words.append(over.astype("<u2").view(np.uint8))
            states[full] = over >> np.uint32(16)
            quotients = states // frequency
            quotients *= other
            states += quotients
            states += start
    tail = _bits(np.concatenate(low_bits[::-1]), np.concatenate(counts[::-1]))
    parts = [states.astype("<u4").view(np.uint8), *reversed(words), tail]
    return np.concatenate(parts) if len(integers) else np.zeros(0, np.uint8)


def _starts(integers: IntArray, log2_scales: IntArray) -> tuple[WordArray, IntArray, IntArray]:
    """Of the integers of some steps, [steps, lanes]: `Models.starts`; and, of those that have low bits, these and how
    many they are. ValueError for an integer beyond its `limit`."""
    table, high = models(), integers.astype(np.int32).reshape(-1)
    places = table.places.take(log2_scales.reshape(-1) - int(_SCALES[0]), mode="clip")
    wide = np.flatnonzero(places >= 1 << _LOW_AT)
    counts = places.take(wide) >> _LOW_AT
    raised = high.take(wide) + (1 << counts >> 1)
    high[wide] = raised >> counts
    if np.abs(high).max(initial=0) <= table.limits[-1]:
        places &= (1 << _LOW_AT) - 1
        places += high
        starts = table.starts.take(places)
        if starts.min(initial=1):
            return starts.reshape(integers.shape), raised & (1 << counts) - 1, counts
    raise ValueError("an integer is larger than its log2 scale allows")


def decode(data: ByteArray, log2_scales: IntArray) -> IntArray:
    """The integers [N] with these log2 scales. NectarError if the bytes are not those of so many integers."""
    table, scales = models(), _lanes(log2_scales, _LEAST)
    low_bits = sum(int(_low_bits(scales[steps]).sum()) for steps in _together(scales))
    if _low_bits(log2_scales.max(initial=_LEAST)) > _MOST_LOW:
        raise NectarError("the file is damaged: its coded numbers are too large")
    lanes, tail = scales.shape[1], (low_bits + 7) // 8
    if len(data) < 4 * lanes + tail or (len(data) - tail) % 2 or (len(data) > 0) != (len(log2_scales) > 0):
        raise NectarError("the file is damaged: its coded numbers are cut short")
    end = len(data) - tail
    states = data[: 4 * lanes].view("<u4").astype(np.uint32)
    words = data[4 * lanes : end].view("<u2").astype(np.uint32)
    at, integers = 0, np.empty(scales.shape, np.int32)
    wide, counts = [np.zeros(0, np.intp)], [np.zeros(0, np.int32)]
    for steps in _together(scales):
        places = table.moves_at.take(scales[steps] - int(_SCALES[0]), mode="clip")
        for place in places:  # of a model in the table, then of the integer's slot
            place += states & _SLOT
            moves = table.moves.take(place)
            states >>= _SHIFT
            states *= moves >> _SHIFT
            states += moves & _SLOT
            short = np.flatnonzero(states < 1 << 16)
            if at + len(short) > len(words):
                raise NectarError("the file is damaged: its coded numbers are cut short")
            states[short] = states.take(short) << np.uint32(16) | words[at : at + len(short)]
            at += len(short)
        integers[steps] = table.symbols.take(places)
        low = _low_bits(scales[steps]).reshape(-1)
        some = np.flatnonzero(low)
        wide.append(some + steps.start * lanes)
        counts.append(low.take(some))
    if at != len(words) or (states != 1 << 16).any():
        raise NectarError("the file is damaged: its coded numbers do not end where they should")
    flat, with_low, low = integers.reshape(-1)[: len(log2_scales)], np.concatenate(wide), np.concatenate(counts)
    flat[with_low] = (flat[with_low] << low) + _unbits(data[end:], low) - (1 << low >> 1)
    return flat


def _model(log2_scales: IntArray) -> ByteArray:
    """Which model codes an integer once its low bits are gone."""
    return np.asarray(_MODELS.take(log2_scales - int(_SCALES[0]), mode="clip"))


def _low_bits(log2_scales: IntArray) -> IntArray:
    """How many low bits are stored verbatim."""
    return np.asarray(_LOW_BITS.take(log2_scales - int(_SCALES[0]), mode="clip"))


# By log2 scale: looking up is faster than computing, for every integer of a file.
_SCALES = np.arange(-128, 128, dtype=np.int32)
_LOW_BITS = np.maximum(0, (_SCALES - _MOST + 1) // 2).astype(np.int32)
_MODELS = (np.maximum(_SCALES - 2 * _LOW_BITS, _LEAST) - _LEAST).astype(np.uint8)


def _together(lanes: npt.NDArray[_AnyInteger]) -> list[slice]:
    """Steps of [steps, lanes] that are looked up at once: so many numbers stay in a core's cache."""
    step = max(1, _NUMBERS // max(1, lanes.shape[1]))
    return [slice(first, first + step) for first in range(0, len(lanes), step)]


def _lanes(values: npt.NDArray[_AnyInteger], fill: int = 0) -> npt.NDArray[_AnyInteger]:
    """[N] -> [steps, lanes], filled up."""
    lanes = -(-len(values) // _STEPS)
    steps = -(-len(values) // lanes) if lanes else 0
    whole = np.full(steps * lanes, fill, values.dtype)
    whole[: len(values)] = values
    return whole.reshape(steps, lanes)


def _bits(values: IntArray, counts: IntArray) -> ByteArray:
    """The lowest counts[i] bits of every value, end to end, those with equal counts side by side."""
    parts = [np.zeros(0, np.uint8)]
    for count in range(1, int(counts.max(initial=0)) + 1):
        narrow = np.uint8 if count <= 8 else np.uint32  # a quarter of the memory to go through
        of_count = values[counts == count].astype(narrow)
        parts.append((of_count[:, None] >> np.arange(count, dtype=narrow) & narrow(1)).astype(np.uint8).reshape(-1))
    return np.packbits(np.concatenate(parts))


def _unbits(data: ByteArray, counts: IntArray) -> IntArray:
    """The inverse of `_bits`."""
    values, bits, at = np.zeros(len(counts), np.int32), np.unpackbits(data), 0
    for count in range(1, int(counts.max(initial=0)) + 1):
        chosen = counts == count
        taken = bits[at : at + count * int(chosen.sum())].reshape(-1, count)
        values[chosen] = (taken.astype(np.int32) << np.arange(count, dtype=np.int32)).sum(1)
        at += taken.size
    return values


@cache
def models() -> Models:
    """Made in decimal arithmetic, whose exponentials are the same to the last digit on every machine."""
    count = 1 << _PRECISION
    limits = np.array([int(np.ceil(8 * 2 ** (scale / 2))) + 1 for scale in range(_LEAST, _MOST + 1)], np.int32)
    frequencies = np.zeros((len(limits), 2 * int(limits.max()) + 1), np.int64)
    costs = np.zeros(len(limits))
    for i, top in enumerate(limits.tolist()):
        shares = _logistic(_LEAST + i, top)
        rest = count - len(shares)  # every symbol occurs once at least
        counts = np.array([1 + int(share * rest) for share in shares])
        counts[top] += count - counts.sum()
        frequencies[i, : len(counts)] = counts
        costs[i] = -sum(float(share) * np.log2(c / count) for share, c in zip(shares, counts, strict=True))
    cumulative = np.cumsum(frequencies, axis=1) - frequencies
    starts = np.zeros(frequencies.shape, np.uint32)
    for row, top, *start in zip(starts, limits.tolist(), frequencies << _PRECISION | cumulative, strict=True):
        row[limits[-1] - top : limits[-1] + top + 1] = start[0][: 2 * top + 1]
    symbols = np.stack([np.repeat(np.arange(frequencies.shape[1]), row) for row in frequencies])
    first = np.take_along_axis(cumulative, symbols, axis=1)
    moves = np.take_along_axis(frequencies, symbols, axis=1) << _PRECISION | np.arange(count) - first
    return Models(
        limits=limits,
        frequencies=frequencies,
        starts=starts.reshape(-1),
        places=_MODELS.astype(np.int32) * starts.shape[1] + int(limits[-1]) | _LOW_BITS << _LOW_AT,
        symbols=(symbols - limits[:, None]).astype(np.int8).reshape(-1),
        moves=moves.astype(np.uint32).reshape(-1),
        moves_at=_MODELS.astype(np.uint32) << _SHIFT,
        costs=costs,
    )


def _logistic(log2_scale: int, top: int) -> list[Decimal]:
    """The shares of -top … top under a logistic distribution of standard deviation 2^(log2_scale / 2)."""
    with localcontext() as context:
        context.prec = 30
        pi = Decimal("3.14159265358979323846264338328")
        scale = Decimal(2) ** (Decimal(log2_scale) / 2) * Decimal(3).sqrt() / pi
        below = [1 / (1 + (-(Decimal(n) + Decimal("0.5")) / scale).exp()) for n in range(-top - 1, top + 1)]
        return [high - low for low, high in pairwise(below)]
