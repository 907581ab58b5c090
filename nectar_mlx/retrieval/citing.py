"""Which sentences of an answer the text supports: each gets the number of a source, or a mark that there is none.

A passage supports a sentence if it holds the sentence's numbers and, weighted by their rarity, most of its other words.
This compares words: it finds facts that are not in the text, or not together, but no wrong "not" and no wrong order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import fsum

import numpy as np

from ..core.types import DoubleArray
from ..core.words import words
from .passages import Passages, numbers, sentences, with_stems
from .sources import Source, source_of, without_thoughts

UNSUPPORTED = "[?]"
_ENOUGH = 0.5  # of a sentence's words, weighted
_SHORT = 4  # words; so short a sentence is read together with the question
_FROM_QUESTION = 0.5  # what the question's words count then
_NAME = 2.0  # what a name counts
_TOLD = 0.25  # of the other words, weighted, that the supporting sentence says itself


@dataclass(frozen=True)
class Sentence:
    """answer[start:end], and the number of the source that supports it, from 1; None if none does."""

    start: int
    end: int
    source: int | None


@dataclass(frozen=True)
class Cited:
    """An answer with marks, its sources, and its sentences. sources: those that the marks name, in that order, and then
    the others. named: how many the marks name."""

    text: str
    sources: list[Source]
    named: int
    sentences: list[Sentence] = field(repr=False)


def cite(passages: Passages, question: str, answer: str, found: Sequence[Source]) -> Cited:
    """found: the answer's sources so far."""
    cited, sources, parts, position = list[Sentence](), list[Source](), list[str](), 0
    answer = without_thoughts(answer)
    for start, end in sentences(answer):
        number = _supporting(passages, question, answer[start:end])
        mark, source = UNSUPPORTED, None
        if number is not None:
            source = _numbered(passages, number, sources, found, question, answer[start:end])
            mark = f"[{source}]"
        cited.append(Sentence(start, end, source))
        parts += [answer[position:end], " ", mark]
        position = end
    others = [source for source in found if source not in sources]
    return Cited("".join(parts) + answer[position:], [*sources, *others], len(sources), cited)


def _numbered(
    passages: Passages, number: int, sources: list[Source], found: Sequence[Source], question: str, sentence: str
) -> int:
    """The number of the source that is this passage; it is added if it is none yet."""
    starts = [source.start for source in sources]
    if (start := passages.all[number].start) in starts:
        return starts.index(start) + 1
    known = next((source for source in found if source.start == start), None)
    sources.append(known or source_of(passages, number, float(passages.scores(question, sentence)[number])))
    return len(sources)


def _supporting(passages: Passages, question: str, sentence: str) -> int | None:
    """The number of the passage that supports a sentence."""
    scores = support(passages, question, sentence)
    best = int(np.argmax(scores)) if scores.size else 0
    return int(passages.owner[best]) if scores.size and scores[best] >= _ENOUGH else None


def support(passages: Passages, question: str, sentence: str) -> DoubleArray:
    """[sentences of the text], in [0, 1]: how much of an answer's sentence each says; 0 where a number is missing."""
    said = _Said(passages, question, sentence)
    value, total = np.zeros(len(passages.sentences)), 0.0
    for word, weight in said.weights.items():
        weight *= passages.rarity(word)
        total += weight
        value += weight * passages.held(word)
    best = value / total if total else value
    for n in np.flatnonzero(best >= _ENOUGH).tolist():
        if not _agrees(passages, n, said):
            best[n] = 0.0
    return best


class _Said:
    """What an answer's sentence says, for a comparison with many sentences of the text. A short one is read together
    with the question."""

    def __init__(self, passages: Passages, question: str, sentence: str):
        self._passages, self._sentence = passages, sentence
        self._names = passages.names_in(sentence)
        self._words = words(sentence)
        self._asked = words(question) if len(self._words) <= _SHORT else []
        self.numbers = set(numbers(sentence)) - set(numbers(question))

    @property
    def weights(self) -> dict[str, float]:
        """What each word counts, rarity apart."""
        names = dict.fromkeys(words(" ".join(self._names)), _NAME)
        return dict.fromkeys(self._asked, _FROM_QUESTION) | dict.fromkeys(self._words, 1.0) | names

    @cached_property
    def told(self) -> list[tuple[set[str], float]]:
        """What it says of its names: each word and its stem, and its rarity. Where there are no names, what a short one
        adds to the question, which alone supports no answer."""
        if self._names:
            told = {*self._words, *self._asked} - set(words(" ".join([*self._names, *numbers(self._sentence)])))
        else:
            told = set(self._words) - set(self._asked) if self._asked else set()
        return [(with_stems(word), self._passages.rarity(word)) for word in told]

    @cached_property
    def called(self) -> set[str]:
        """Its names, and with the word beside them where the text says it so: "Kestrel", "Kestrel pump"."""
        lower_case = self._passages.lower_case
        names = set(words(" ".join(name for name in self._names if name.lower() not in lower_case)))
        pairs = (pair for pair in _pairs(self._sentence) if not names.isdisjoint(pair.split()))
        return names.union(filter(self._passages.says, pairs))


def _agrees(passages: Passages, number: int, said: _Said) -> bool:
    """Whether a sentence of the text has the numbers and names of an answer's sentence. Names may also stand beside one
    that has no others ("It was built in 1902.")."""
    text = passages.sentence(number)
    if not said.numbers <= set(numbers(text)) or not _tells(text, said):
        return False
    missing = said.called - set(_pairs(text)) - set(words(text))
    if not missing or not passages.names_tell:
        return True
    around = passages.around(number)
    others = set(words(" ".join(passages.names_in(text)))) - said.called
    return not others and missing <= {*_pairs(around), *words(around)}


def _tells(text: str, said: _Said) -> bool:
    """Whether a sentence of the text itself, not those beside it, says some of what it must (`_Said.told`)."""
    own = with_stems(text)
    held = fsum(rarity for stems, rarity in said.told if not own.isdisjoint(stems))
    return held >= _TOLD * fsum(rarity for _, rarity in said.told)


def _pairs(text: str) -> list[str]:
    """Words that follow each other, short ones aside."""
    return [f"{a} {b}" for a, b in pairwise(words(text)) if min(len(a), len(b)) > 3]
