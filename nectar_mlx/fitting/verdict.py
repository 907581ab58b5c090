"""How close a finished file's answers are to those with the whole text in view, in figures and in one sentence."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ..core.types import JsonObject
from ..errors import NectarError
from .fidelity import Divergence

CLOSE, USABLE = 0.98, 0.90  # of the gap closed
# In nats a token: where a text changes little, a share of that little says nothing.
CLOSE_KL, USABLE_KL = 0.01, 0.05
USABLE_KL_GAP = 0.5  # of the gap closed, that `USABLE_KL` needs: with less, answers are more those without the text
_ROUNDING = 1e-5  # nats that rounding errors come to
EXPONENT = 1.7  # KL falls with so much of a power of the bytes, where nothing better is known (docs/log/budgets.md)

Grade = Literal["close", "usable", "not faithful"]
GRADES: tuple[Grade, ...] = get_args(Grade)


def measured(ours: Divergence, no_context: Divergence | float) -> JsonObject:
    """The check's figures, for the report: `kl` and `agree` with the full cache, `kl_no_context` of the model that
    never saw the text (or what it is known to be), and `gap_closed` = 1 - kl / kl_no_context. NectarError if one is
    not finite."""
    kl = float(ours.kl.mean())
    floor = float(no_context.kl.mean()) if isinstance(no_context, Divergence) else no_context
    if not np.isfinite([kl, floor]).all():
        raise NectarError("checking: the divergence from the full cache is not finite, so nothing is written")
    return _figures(kl, float(ours.agree.mean()), floor)


def mean(parts: Sequence[JsonObject]) -> JsonObject:
    """The figures of several chunks as one."""
    return _figures(*(sum(p[name] for p in parts) / len(parts) for name in ("kl", "agree", "kl_no_context")))


def added(figures: JsonObject, before: JsonObject) -> JsonObject:
    """Figures of what is compared with a file that has figures itself: two small errors that have nothing to do with
    each other add up, in a divergence as in the share of tokens that are others."""
    agree = max(0.0, figures["agree"] + before["agree"] - 1)
    return _figures(figures["kl"] + before["kl"], agree, figures["kl_no_context"])


def can_be_added(report: JsonObject) -> bool:
    """Whether a report has the figures that `added` needs."""
    kl, agree = report.get("kl"), report.get("agree")
    return isinstance(kl, int | float) and isinstance(agree, int | float) and kl >= 0 and 0 <= agree <= 1


def _figures(kl: float, agree: float, floor: float) -> JsonObject:
    kl, floor = max(kl, 0.0), max(floor, 0.0)
    gap = 1.0 if kl <= _ROUNDING else 1 - kl / max(floor, _ROUNDING)
    return {"kl": round(kl, 5), "agree": round(agree, 4), "kl_no_context": round(floor, 5), "gap_closed": round(gap, 4)}


def grade(report: JsonObject) -> Grade | None:
    """None for files that do not say, and for those that keep every key. Of an updated file: the worse of what the
    questions about the whole text and those about what is new say."""
    return _grade(worse(report))


def worse(report: JsonObject) -> JsonObject:
    """Of the figures of a report those that decide the verdict: its own, or those about what is new."""
    new = report.get("new")
    return max(report, new, key=_badness) if isinstance(new, dict) else report


def _badness(figures: JsonObject) -> tuple[int, float]:
    reached = _grade(figures)
    return (GRADES.index(reached), -figures["gap_closed"]) if reached else (-1, 0.0)


def _grade(figures: JsonObject) -> Grade | None:
    if not all(isinstance(figures.get(name), int | float) for name in ("gap_closed", "kl")):
        return None
    gap, kl = figures["gap_closed"], figures["kl"]
    if gap >= CLOSE or kl <= CLOSE_KL:
        return "close"
    usable = gap >= USABLE or (kl <= USABLE_KL and gap >= USABLE_KL_GAP)
    return "usable" if usable else "not faithful"


def sentence(report: JsonObject, *, share: float) -> str:
    """The verdict for a person. share: bytes kept / bytes of the bf16 KV cache."""
    reached, deciding = grade(report), worse(report)
    if reached is None:
        return ""
    figures = _in_words(report)
    if new := report.get("new"):
        figures += f"; about what is new {_in_words(new, of='')}"
    if reached == "close":
        return f"Close to the full text: {figures}."
    more = f"a budget of about {_larger(deciding, share, report.get('exponent', EXPONENT))} would be close to it"
    if reached == "usable":
        return f"Usable: {figures}; {more}."
    return f"Not faithful to the text: {figures}. Fit it again with a larger budget: {more}."


def _in_words(figures: JsonObject, *, of: str = " of what the text changes is kept") -> str:
    gap, kl = figures["gap_closed"], figures["kl"]
    if gap < USABLE and _grade(figures) != "not faithful":
        return f"KL {kl:.4f}, where the whole text changes answers by {figures['kl_no_context']:.4f}"
    return f"{max(gap, 0):.1%}{of}, KL {kl:.4f}"


def _larger(figures: JsonObject, share: float, exponent: float) -> str:
    """The budget at which the gap is expected to be closed, as a percentage of one digit, or whole; rounded up, or it
    could be the one that was too small."""
    target = max((1 - CLOSE) * figures["kl_no_context"], CLOSE_KL)
    needed = share * (figures["kl"] / target) ** (1 / exponent)
    percent = 100 * min(1.0, max(needed, 1.25 * share))
    unit = 10.0 ** min(0, math.floor(math.log10(percent)))
    return f"{math.ceil(percent / unit - 1e-6) * unit:.3g}%"
