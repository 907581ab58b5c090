"""Which sentences of an answer the text supports: each gets the number of a source, or a mark that there is none.

A passage supports a sentence if it holds the sentence's numbers and, weighted by their rarity, most of its other words.
This compares words: it finds facts that are not in the text, or not together, but no wrong "not" and no wrong order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    """An answer with marks, the sources that they name, and the sentences."""

    text: str
    sources: list[Source]
    sentences: list[Sentence] = field(repr=False)


def cite(passages: Passages, question: str, answer: str, found: Sequence[Source]) -> Cited:
    """found: the answer's sources so far; those of single sentences follow them."""
    cited, sources, parts, position = list[Sentence](), list(found), list[str](), 0
    answer = without_thoughts(answer)
    for start, end in sentences(answer):
        number = _supporting(passages, question, answer[start:end])
        mark, source = UNSUPPORTED, None
        if number is not None:
            source = _numbered(passages, number, sources, question, answer[start:end])
            mark = f"[{source}]"
        cited.append(Sentence(start, end, source))
        parts += [answer[position:end], " ", mark]
        position = end
    return Cited("".join(parts) + answer[position:], sources, cited)


def _numbered(passages: Passages, number: int, sources: list[Source], question: str, sentence: str) -> int:
    """The number of the source that is this passage; it is added if it is none yet."""
    starts = [source.start for source in sources]
    if (start := passages.all[number].start) in starts:
        return starts.index(start) + 1
    score = float(passages.scores(question, sentence)[number])
    sources.append(source_of(passages, number, score))
    return len(sources)


def _supporting(passages: Passages, question: str, sentence: str) -> int | None:
    """The number of the passage that supports a sentence."""
    scores = support(passages, question, sentence)
    best = int(np.argmax(scores)) if scores.size else 0
    return int(passages.owner[best]) if scores.size and scores[best] >= _ENOUGH else None


def support(passages: Passages, question: str, sentence: str) -> DoubleArray:
    """[sentences of the text], in [0, 1]: how much of an answer's sentence each says; 0 where a number is missing."""
    said = words(sentence)
    value, total = np.zeros(len(passages.sentences)), 0.0
    weights = dict.fromkeys(words(question), _FROM_QUESTION) if len(said) <= _SHORT else {}
    weights |= dict.fromkeys(said, 1.0) | dict.fromkeys(words(" ".join(passages.names_in(sentence))), _NAME)
    for word, weight in weights.items():
        weight *= passages.rarity(word)
        total += weight
        value += weight * passages.held(word)
    best = value / total if total else value
    for n in np.flatnonzero(best >= _ENOUGH).tolist():
        if not _agrees(passages, n, question, sentence):
            best[n] = 0.0
    return best


def _agrees(passages: Passages, number: int, question: str, sentence: str) -> bool:
    """Whether a sentence of the text has the numbers and names of an answer's sentence. Names may also stand beside one
    that has no others ("It was built in 1902.")."""
    text = passages.sentence(number)
    if not set(numbers(sentence)) <= {*numbers(text), *numbers(question)}:
        return False
    if not _tells(passages, text, question, sentence):
        return False
    called = set(_called(passages, sentence))
    missing = called - set(_pairs(text)) - set(words(text))
    if not missing or not passages.names_tell:
        return True
    around = passages.around(number)
    others = set(words(" ".join(passages.names_in(text)))) - called
    return not others and missing <= {*_pairs(around), *words(around)}


def _tells(passages: Passages, text: str, question: str, sentence: str) -> bool:
    """Whether a sentence of the text itself, not those beside it, says some of what an answer's says of its names."""
    if not (called := passages.names_in(sentence)):
        return True
    said = words(sentence)
    said += words(question) if len(said) <= _SHORT else []
    told = set(said) - set(words(" ".join([*called, *numbers(sentence)])))
    own = with_stems(text)
    held = {word for word in told if not own.isdisjoint(with_stems(word))}
    return fsum(map(passages.rarity, held)) >= _TOLD * fsum(map(passages.rarity, told))


def _called(passages: Passages, sentence: str) -> Iterator[str]:
    """The names in a sentence, and with the word beside them where the text says it so: "Kestrel", "Kestrel pump"."""
    called = passages.names_in(sentence)
    found = set(words(" ".join(name for name in called if name.lower() not in passages.lower_case)))
    yield from found
    for pair in _pairs(sentence):
        if not found.isdisjoint(pair.split()) and passages.says(pair):
            yield pair


def _pairs(text: str) -> list[str]:
    """Words that follow each other, short ones aside."""
    return [f"{a} {b}" for a, b in pairwise(words(text)) if min(len(a), len(b)) > 3]
