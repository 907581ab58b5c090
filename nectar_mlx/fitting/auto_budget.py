"""The smallest budget whose answers are expected to be close to the full cache's.

The bytes that a faithful file takes differ from model to model: with two KV heads 2% of the cache are few. The trial
fit's errors in nats rank heads, but do not tell the divergence (docs/log/budgets.md), so it is measured: all heads are
given their sizes at a candidate budget, trained for a short time, and asked the check questions. The whole fit is
expected to leave as much: it trains longer, and rounds. Candidates double or halve until the target lies between two,
and are then drawn together: where a head that looks for single tokens gets room for all keys, divergence drops at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.types import JsonObject
from .verdict import EXPONENT

TARGET = 0.99  # of the gap closed
TARGET_KL = 1e-3  # nats a token that are close, however little the text changes
FIRST, LEAST, MOST = 0.02, 0.0025, 0.8  # from 0.3 on every head keeps all keys of the text, at 0.8 in 11 bits a number
_AIM = 0.9  # of the wanted divergence: what a share between two candidates is to leave
_SHALLOWEST = 0.5  # exponent
_WORTH, _MORE = 1.2, 3  # how much smaller a share must be for one more short fit; how many more, at most

Figures = JsonObject


@dataclass(frozen=True)
class Choice:
    """share: bytes kept / bytes of the bf16 KV cache. exponent: the divergence falls with so much of a power of it."""

    share: float
    exponent: float


@dataclass(frozen=True)
class _Candidate:
    """excess: the divergence that a share leaves, as a multiple of the one that is wanted."""

    share: float
    excess: float


def choose(measure: Callable[[float], Figures], *, least: float = LEAST, most: float = MOST) -> Choice:
    """A share in [least, most] whose short fit closed `TARGET` of the gap, or left `TARGET_KL`, and not much less.

    measure: a share -> the figures of a short fit (`verdict.measured`). most is returned where nothing is enough.
    """

    def candidate(share: float) -> _Candidate:
        figures = measure(share)
        wanted = max((1 - TARGET) * figures["kl_no_context"], TARGET_KL)
        return _Candidate(share, float(max(figures["kl"], 1e-9) / wanted))

    low = high = candidate(min(max(FIRST, least), most))
    while high.excess > 1 and high.share < most:
        low, high = high, candidate(min(2 * high.share, most))
    while low.excess <= 1 and low.share > least:
        low, high = candidate(max(low.share / 2, least)), low
    if low.share == high.share:
        return Choice(high.share, EXPONENT)
    steepness = max(_exponent(low, high), _SHALLOWEST)
    exponent = min(steepness, 4.0)
    if low.excess <= 1:
        return Choice(low.share, exponent)
    if high.excess > 1:  # nothing is enough, and more bytes may do nothing: no power law
        return Choice(high.share, exponent)
    smaller = high.share * (high.excess / _AIM) ** (1 / steepness)
    for _ in range(_MORE):
        if _WORTH * smaller > high.share:
            break
        between = candidate(smaller)
        if between.excess <= 1:
            return Choice(between.share, exponent)
        low, smaller = between, (between.share * high.share) ** 0.5  # no power law
    return Choice(high.share, exponent)


def _exponent(low: _Candidate, high: _Candidate) -> float:
    return float(np.log(low.excess / high.excess) / np.log(high.share / low.share))
