"""From a question to the documents that answer it, or to "none of them"."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .documents import Document
from .search import Match

# Log-odds that the best document answers. Chosen on generated set A by logistic regression; docs/log/library.md.
_BIAS, _GAP, _RAREST, _MISSING, _EVIDENCE, _FOCUS = -3.78, 2.01, 3.67, -5.16, 1.71, 2.18
_CLOSE = 0.85  # of the best document's score: from there on another one is close
_UNSURE = 2.0  # log-odds within which the model's own view is asked for, where there is one
_HEADS = 3  # documents that the model looks at
_AGREES = 1.0  # log-odds that the model's agreement gives or takes

Evidence = Callable[[Sequence[Document]], Sequence[float]]
"""How much of a question's attention each document's heads are predicted to take, in [0, 1]; NaN where unknown."""


@dataclass(frozen=True)
class Candidate:
    """A document that may answer.

    Attributes:
        document: the document.
        score: of its words; candidates are in this order.
        place: the page, chapter, sheet or mail where most of the words are, as [unit, name]; None where it has none.
        mass: of attention that its heads are predicted to take; None where they were not asked.
    """

    document: Document
    score: float
    place: tuple[str, str] | None = None
    mass: float | None = None

    def describe(self) -> str:
        """The name with the place, for a person."""
        return f"{self.document.name}, {' '.join(self.place)}" if self.place else self.document.name


@dataclass(frozen=True)
class Routing:
    """Where a question leads.

    Attributes:
        candidates: the documents, best first; with a file to answer from or without.
        odds: log-odds that one of them answers; below 0 the answer is "none of them".
    """

    candidates: list[Candidate]
    odds: float

    @property
    def found(self) -> bool:
        return self.odds >= 0

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates and self.found else None

    @property
    def close(self) -> list[Candidate]:
        """Other documents that fit nearly as well as the best."""
        return [c for c in self.candidates[1:] if self.found and c.score >= _CLOSE * self.candidates[0].score]


def odds(found: Sequence[Match]) -> float:
    """Log-odds that the first of the matches answers the question."""
    if not found:
        return -math.inf
    best, second = found[0], found[1].score if len(found) > 1 else 0.0
    gap = 1 - second / best.score if best.score > 0 else 0.0
    rest = _MISSING * best.missing + _EVIDENCE * math.log1p(best.evidence) + _FOCUS * best.focus
    return _BIAS + _GAP * gap + _RAREST * best.rarest + rest


def with_evidence(routing: Routing, evidence: Evidence) -> Routing:
    """The routing with the heads' view of its first candidates. It is asked for only where the words leave doubt:
    whether any document answers, or which of close ones. Where both agree on the first, the odds rise; else they fall.
    """
    first = [c for c in routing.candidates[:_HEADS] if c.document.file is not None]
    doubtful = abs(routing.odds) < _UNSURE or (routing.found and bool(routing.close))
    if len(first) < 2 or not doubtful:
        return routing
    masses = evidence([candidate.document for candidate in first])
    seen = [replace(c, mass=mass) for c, mass in zip(first, masses, strict=True) if not math.isnan(mass)]
    if not seen:
        return routing
    favourite = max(seen, key=lambda candidate: candidate.mass or 0.0)
    by_path: Mapping[bytes, Candidate] = {c.document.path: c for c in seen}
    candidates = [by_path.get(c.document.path, c) for c in routing.candidates]
    agree = favourite.document.path == candidates[0].document.path
    return Routing(candidates, routing.odds + (_AGREES if agree else -_AGREES))
