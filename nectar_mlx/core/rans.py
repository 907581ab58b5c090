"""Whole numbers in hardly more bits than they carry: asymmetric numeral systems (rANS, arXiv 1311.2540).

Every number comes with a guess of its size, its `spread`: twice the binary logarithm of its standard deviation, so that
the encoder and the decoder know which of a few logistic distributions it is coded under. Of numbers with a large spread
the last bits are as good as random: those are kept as they are. Many numbers are coded side by side, in lanes of about
`_STEPS`, which is what makes numpy fast enough; each lane costs two bytes.
"""

from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import NectarError

Numbers = np.ndarray[Any, np.dtype[np.int32]]
Octets = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

_LEAST, _MOST = -8, 6  # spreads with a distribution of their own; larger ones keep low bits verbatim
_PRECISION = 14  # bits of a probability
_STEPS = 1024  # of a lane; files depend on all of these


class _Models(NamedTuple):
    """Of each spread, from _LEAST on. limits: its symbols are the numbers -limit … limit, counted from 0. often, before
    [models, symbols]: how often each symbol occurs in 2^_PRECISION, how often all before it do. For the decoder, at
    [model · 2^_PRECISION + place]: symbols, which one stands there, and moves, how often it occurs and where within
    that the place lies, in one word. costs: the bits that a number takes on average."""

    limits: Numbers
    often: Any
    before: Any
    symbols: Octets
    moves: Words
    costs: np.ndarray[Any, np.dtype[np.float64]]


def limit(spreads: Numbers) -> Numbers:
    """The largest numbers, of either sign, that can be coded with these spreads."""
    low = _low_bits(spreads)
    return (_models().limits.take(_index(spreads)) << low) - (1 << low >> 1)


def cost(spreads: Numbers) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The bits that a number of each spread takes on average."""
    found: np.ndarray[Any, np.dtype[np.float64]] = _models().costs.take(_index(spreads)) + _low_bits(spreads)
    return found


def encode(numbers: Numbers, spreads: Numbers) -> Octets:
    """Numbers [N] with their spreads [N] -> bytes. ValueError for a number beyond its `limit`."""
    if (np.abs(numbers) > limit(spreads)).any():
        raise ValueError("a number is larger than its spread allows")
    low = _low_bits(spreads)
    raised = numbers + (1 << low >> 1)
    high = raised >> low
    verbatim = _bits(raised - (high << low), low)
    models, index = _models(), _index(spreads)
    symbols, index = _lanes(high + models.limits.take(index), models.limits[0]), _lanes(index)
    states, words = np.full(index.shape[1], 1 << 16, np.uint64), list[Any]()
    for of, symbol in zip(index[::-1], symbols[::-1], strict=True):  # backwards: what is coded last is decoded first
        often, before = models.often[of, symbol].astype(np.uint64), models.before[of, symbol].astype(np.uint64)
        full = states >= often << np.uint64(32 - _PRECISION)
        words.append((states[full] & np.uint64(0xFFFF)).astype("<u2"))
        states = np.where(full, states >> np.uint64(16), states)
        states = (states // often << np.uint64(_PRECISION)) + states % often + before
    parts = [states.astype("<u4").view(np.uint8), *(w.view(np.uint8) for w in reversed(words)), verbatim]
    return np.concatenate(parts) if len(numbers) else np.zeros(0, np.uint8)


def decode(data: Octets, spreads: Numbers) -> Numbers:
    """The numbers [N] with these spreads. NectarError if the bytes are not those of so many numbers."""
    low, index, models = _low_bits(spreads), _index(spreads), _models()
    places = _lanes(index).astype(np.uint32) << np.uint32(_PRECISION)
    lanes, tail = places.shape[1], (int(low.sum()) + 7) // 8
    if len(data) < 4 * lanes + tail or (len(data) - tail) % 2 or (len(data) > 0) != (len(spreads) > 0):
        raise NectarError("the file is damaged: its coded numbers are cut short")
    end = len(data) - tail
    states = data[: 4 * lanes].view("<u4").astype(np.uint32)
    words = data[4 * lanes : end].view("<u2").astype(np.uint32)
    at, few, place = 0, np.uint32(_PRECISION), np.uint32((1 << _PRECISION) - 1)
    for of in places:  # of its models in the table, then of its numbers
        np.bitwise_or(of, states & place, out=of)
        moves = models.moves.take(of)
        states = (moves >> few) * (states >> few) + (moves & place)
        short = np.flatnonzero(states < 1 << 16)
        if at + len(short) > len(words):
            raise NectarError("the file is damaged: its coded numbers are cut short")
        states[short] = states[short] << np.uint32(16) | words[at : at + len(short)]
        at += len(short)
    if at != len(words) or (states != 1 << 16).any():
        raise NectarError("the file is damaged: its coded numbers do not end where they should")
    found: Numbers = models.symbols.take(places.reshape(-1)[: len(spreads)]).astype(np.int32)
    found -= models.limits.take(index)
    more = np.flatnonzero(low)
    found[more] = (found[more] << low[more]) + _unbits(data[end:], low[more]) - (1 << low[more] >> 1)
    return found


def _index(spreads: Numbers) -> Octets:
    """Which model codes a number once its low bits are gone."""
    found: Octets = _INDICES.take(spreads - _SPREADS[0], mode="clip")
    return found


def _low_bits(spreads: Numbers) -> Numbers:
    found: Numbers = _LOW_BITS.take(spreads - _SPREADS[0], mode="clip")
    return found


# By spread: looking up is faster than computing, for every number of a file.
_SPREADS = np.arange(-128, 128, dtype=np.int32)
_LOW_BITS = np.maximum(0, (_SPREADS - _MOST + 1) // 2).astype(np.int32)
_INDICES = (np.maximum(_SPREADS - 2 * _LOW_BITS, _LEAST) - _LEAST).astype(np.uint8)


def _lanes(values: Any, fill: Any = 0) -> Any:
    """[N] -> [steps, lanes], filled up."""
    lanes = -(-len(values) // _STEPS)
    steps = -(-len(values) // lanes) if lanes else 0
    whole = np.full(steps * lanes, fill, values.dtype)
    whole[: len(values)] = values
    return whole.reshape(steps, lanes)


def _bits(values: Numbers, counts: Numbers) -> Octets:
    """The lowest counts[i] bits of every value, end to end, those with equal counts side by side."""
    parts = [np.zeros(0, np.uint8)]
    for count in range(1, int(counts.max(initial=0)) + 1):
        parts.append((values[counts == count, None] >> np.arange(count) & 1).astype(np.uint8).reshape(-1))
    return np.packbits(np.concatenate(parts))


def _unbits(data: Octets, counts: Numbers) -> Numbers:
    values, bits, at = np.zeros(len(counts), np.int32), np.unpackbits(data), 0
    for count in range(1, int(counts.max(initial=0)) + 1):
        chosen = counts == count
        taken = bits[at : at + count * int(chosen.sum())].reshape(-1, count)
        values[chosen] = (taken.astype(np.int32) << np.arange(count, dtype=np.int32)).sum(1)
        at += taken.size
    return values


@cache
def _models() -> _Models:
    """In decimal arithmetic, whose exponentials are the same to the last digit on every machine."""
    count = 1 << _PRECISION
    limits = np.array([int(np.ceil(8 * 2 ** (spread / 2))) + 1 for spread in range(_LEAST, _MOST + 1)], np.int32)
    often: Any = np.zeros((len(limits), 2 * int(limits.max()) + 1), np.int64)
    costs = np.zeros(len(limits))
    for i, top in enumerate(limits.tolist()):
        shares = _logistic(_LEAST + i, top)
        rest = count - len(shares)  # every symbol occurs once at least
        counts = np.array([1 + int(share * rest) for share in shares])
        counts[top] += count - counts.sum()
        often[i, : len(counts)] = counts
        costs[i] = -sum(float(share) * np.log2(c / count) for share, c in zip(shares, counts, strict=True))
    before = np.cumsum(often, axis=1) - often
    symbols = np.stack([np.repeat(np.arange(often.shape[1]), row) for row in often])
    each, first = (np.take_along_axis(x, symbols, axis=1) for x in (often, before))
    moves = each << _PRECISION | np.arange(count) - first
    return _Models(
        limits, often, before, symbols.astype(np.uint8).reshape(-1), moves.astype(np.uint32).reshape(-1), costs
    )


def _logistic(spread: int, top: int) -> list[Decimal]:
    """The shares of -top … top under a logistic distribution of standard deviation 2^(spread/2)."""
    with localcontext() as context:
        context.prec = 30
        pi = Decimal("3.14159265358979323846264338328")
        scale = Decimal(2) ** (Decimal(spread) / 2) * Decimal(3).sqrt() / pi
        below = [1 / (1 + (-(Decimal(n) + Decimal("0.5")) / scale).exp()) for n in range(-top - 1, top + 1)]
        return [high - low for low, high in pairwise(below)]
