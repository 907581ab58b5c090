"""The smallest budget whose answers are expected to be close to the full cache's.

The bytes that a faithful file takes differ from model to model: with two KV heads 2% of the cache are few. The trial
fit's errors in nats rank heads, but do not tell the divergence (docs/log/budgets.md), so it is measured: all heads are
given their sizes at a candidate budget, trained for a short time, and asked the check questions. The whole fit is
expected to leave as much: it trains longer, and rounds. Candidates double or halve until the target lies between two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.types import JsonObject
from .verdict import EXPONENT

TARGET = 0.99  # of the gap closed
TARGET_KL = 1e-3  # nats a token that are close, however little the text changes
FIRST, LEAST, MOST = 0.02, 0.0025, 0.8  # from 0.3 on every head keeps all keys of the text, at 0.8 in 11 bits a number
_STEEPEST = 4.0  # exponent of fewer nodes; where KL falls faster, the same keys get more bits

Figures = JsonObject


@dataclass(frozen=True)
class Choice:
    """share: bytes kept / bytes of the bf16 KV cache. exponent: the divergence falls with so much of a power of it."""

    share: float
    exponent: float


def choose(measure: Callable[[float], Figures], *, least: float = LEAST, most: float = MOST) -> Choice:
    """The smallest share in [least, most] at which a whole fit is expected to close `TARGET` of the gap, or to leave
    `TARGET_KL`.

    measure: a share -> the figures of a short fit (`verdict.measured`). most is returned where nothing is enough.
    """

    def excess(share: float) -> float:
        """The expected divergence as a multiple of the one that is wanted."""
        figures = measure(share)
        wanted = max((1 - TARGET) * figures["kl_no_context"], TARGET_KL)
        return float(max(figures["kl"], 1e-9) / wanted)

    at = min(max(FIRST, least), most)
    ratio = excess(at)
    step, last = (0.5 if ratio <= 1 else 2.0), Choice(at, EXPONENT)
    while least < at < most or (at == least and step > 1) or (at == most and step < 1):
        following = min(max(at * step, least), most)
        further = excess(following)
        slope = np.log(ratio / max(further, 1e-9)) / np.log(following / at)
        exponent = float(np.clip(slope, 0.5, _STEEPEST))
        last = Choice(following, exponent)
        if (further <= 1) != (ratio <= 1):
            low, high = sorted((at, following))
            share = following * further ** (1 / exponent)
            if slope > _STEEPEST:  # with bits KL falls exponentially
                share = following + (at - following) * np.log(further) / np.log(further / ratio)
            return Choice(float(np.clip(share, low, high)), exponent)
        at, ratio = following, further
    return Choice(at, last.exponent)
