"""The smallest budget whose answers are expected to be close to the full cache's.

The bytes that a faithful file takes differ from model to model: with two KV heads 2% of the cache are few. The trial
fit's errors in nats rank heads, but do not tell the divergence (docs/log/budgets.md), so it is measured: all heads are
given their sizes at a candidate budget, trained for a short time, and asked the check questions. The whole fit is
expected to leave as much: it trains longer, and rounds. Candidates double or halve until the target lies between two,
and are then drawn together: where a head that looks for single tokens gets room for all keys, divergence drops at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._exp import SLOW_EXP
from .verdict import EXPONENT

TARGET = 0.99  # of the gap closed
FIRST, LEAST, MOST = 0.02, 0.0025, 0.3  # at 0.3 every head can keep all keys of the text
STEPS = 40 if SLOW_EXP else 100  # of a short fit
_AIM = 0.9  # of the wanted divergence: what a share between two candidates is to leave
_WORTH, _MORE = 1.2, 3  # how much smaller a share must be for one more short fit; how many more, at most

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """share: bytes kept / bytes of the bf16 KV cache. exponent: the divergence falls with so much of a power of it."""

    share: float
    exponent: float


@dataclass(frozen=True)
class _Tried:
    """excess: the divergence that a share leaves, as a multiple of the one that is wanted."""

    share: float
    excess: float


def choose(measure: Callable[[float], Figures], *, least: float = LEAST, most: float = MOST) -> Choice:
    """A share in [least, most] whose short fit closed `TARGET` of the gap, and little more.

    measure: a share -> the figures of a short fit (`verdict.measured`). most is returned where nothing is enough.
    """

    def tried(share: float) -> _Tried:
        figures = measure(share)
        return _Tried(share, max(float(figures["kl"] / max((1 - TARGET) * figures["kl_no_context"], 1e-9)), 1e-9))

    low = high = tried(min(max(FIRST, least), most))
    while high.excess > 1 and high.share < most:
        low, high = high, tried(min(2 * high.share, most))
    while low.excess <= 1 and low.share > least:
        low, high = tried(max(low.share / 2, least)), low
    if low.share == high.share:
        return Choice(high.share, EXPONENT)
    exponent = float(np.clip(_exponent(low, high), 0.5, 4.0))
    if low.excess <= 1:
        return Choice(low.share, exponent)
    for _ in range(_MORE):
        smaller = high.share * (high.excess / _AIM) ** (1 / _exponent(low, high))
        if high.excess > 1 or smaller * _WORTH > high.share:
            break
        between = tried(smaller)
        low, high = (low, between) if between.excess <= 1 else (between, high)
    return Choice(high.share, exponent)


def _exponent(low: _Tried, high: _Tried) -> float:
    return float(np.log(low.excess / high.excess) / np.log(high.share / low.share))
