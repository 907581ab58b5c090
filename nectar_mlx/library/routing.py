"""From a question to the documents that answer it, or to "none of them"."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .deciding import support
from .documents import Document
from .search import Match

# Log-odds that the best document answers. Chosen on generated set A by logistic regression; docs/log/library.md.
_BIAS, _GAP, _RAREST, _MISSING, _FOCUS = -2.65, 2.65, 2.36, -3.17, 3.03
_CLOSE = 0.85  # of the best document's score: from there on another one is close
_UNSURE = 2.0  # log-odds within which the model's own view is asked for, where there is one
_LOOKS = 3  # documents that the model looks at
_ASKED = 4  # close documents that are asked
_LIKELIER = 10.0  # nats by which a question is likelier behind the document that it is about (docs/log/library.md)
_TELLS = _UNSURE  # log-odds that this gives
LOOKED_AT = 10_000  # characters of a question by which its document is found
WEIGHED = 1_000  # characters of a question, at most, for which the model is asked: longer ones take it long

Evidence = Callable[[Sequence[Document]], Sequence[float]]
"""How likely a question is behind the files of some documents, in nats; NaN where that is not known."""
Answers = Callable[[Sequence[Document]], Sequence[str]]
"""The first sentence of the answer behind the files of some documents; "" where there is none."""


@dataclass(frozen=True)
class Candidate:
    """A document that may answer.

    Attributes:
        document: the document.
        score: of its words; candidates are in this order.
        place: the page, chapter, sheet or mail where most of the words are, as [unit, name]; None where it has none.
        log_likelihood: of the question behind its file; None where the model was not asked.
        support: how far its text, and no other, says what is answered behind its file (`deciding`); None where nothing
            was asked.
    """

    document: Document
    score: float
    place: tuple[str, str] | None = None
    log_likelihood: float | None = None
    support: float | None = None

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


def none_of(documents: Sequence[Document], routing: Routing | None) -> str:
    """That none of the documents of a library answers, for a person: with the nearest, and what could not be read."""
    if not documents:
        return "The library is empty: add a document first."
    unread = sum(document.text is None for document in documents)
    count = len(documents) - unread
    sentence = f"None of the {count:,} documents in the library is about this."
    if count < 2:
        sentence = "No document in the library is about this."
    if routing and routing.candidates:
        sentence += f" The nearest is {routing.candidates[0].describe()}."
    return sentence + (f" {unread:,} more could not be read." if unread else "")


def odds(found: Sequence[Match]) -> float:
    """Log-odds that the first of the matches answers the question."""
    if not found:
        return -math.inf
    best, second = found[0], found[1].score if len(found) > 1 else 0.0
    gap = 1 - second / best.score if best.score > 0 else 0.0
    return _BIAS + _GAP * gap + _RAREST * best.rarest + _MISSING * best.missing + _FOCUS * best.focus


def with_evidence(routing: Routing, evidence: Evidence) -> Routing:
    """The routing with the model's view of its first candidates. It is asked for only where the words leave doubt:
    whether any document answers, or which of close ones.

    A document behind which the question is far likelier than behind the others comes first, and answers. Where there
    is none, it stays as the words have it.
    """
    first = [c for c in routing.candidates[:_LOOKS] if c.document.file is not None]
    if len(first) < 2 or not (abs(routing.odds) < _UNSURE or routing.close):
        return routing
    nats = evidence([candidate.document for candidate in first])
    seen = [replace(c, log_likelihood=x) for c, x in zip(first, nats, strict=True) if not math.isnan(x)]
    ranked = sorted(seen, key=lambda candidate: -(candidate.log_likelihood or 0.0))
    if len(ranked) < 2:
        return routing
    others = [c for c in routing.candidates if all(c.document.path != s.document.path for s in seen)]
    best, second = ranked[0].log_likelihood or 0.0, ranked[1].log_likelihood or 0.0
    if best - second >= _LIKELIER:
        return Routing([ranked[0], *(c for c in seen if c is not ranked[0]), *others], routing.odds + _TELLS)
    return Routing([*seen, *others], routing.odds)


def with_answers(routing: Routing, question: str, answers: Answers, text: Callable[[Document], str]) -> Routing:
    """The routing with the best and the close documents in the order in which their texts say what is answered behind
    their files; where none does, it stays as the words have it. text: of a document."""
    close = [*routing.candidates[:1], *routing.close][:_ASKED]
    asked = [candidate.document for candidate in close if candidate.document.file is not None]
    if len(asked) < 2:
        return routing
    supports = support(question, answers(asked), [text(document) for document in asked])
    found = dict(zip((document.path for document in asked), supports, strict=True))
    close = [replace(candidate, support=found.get(candidate.document.path)) for candidate in close]
    others = [c for c in routing.candidates if all(c.document.path != seen.document.path for seen in close)]
    return Routing([*sorted(close, key=lambda candidate: -(candidate.support or 0.0)), *others], routing.odds)
