"""Passages of a text, a few sentences each, and how much of a question and its answer each of them says.

A passage never crosses a page, chapter, sheet or mail. Its score is that of its best sentence: the share of the words
of question and answer that the sentence holds, each weighted by its rarity as in BM25. Words of the same passage, of
the sentences beside, and in the names of file and part count in part: a name may stand in the sentence before, a
subject in the heading. Numbers and names of the answer count twice, for they are what answers are looked up for.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..core.types import DoubleArray
from ..core.words import words
from ..documents import FileReport, Place, Reading

_LONGEST = 360  # characters of a passage of several sentences
_SHORTEST = 80  # a heading or a short line stands with what follows
_AROUND = 0.4  # what a word beside a passage counts
_STEM, _INFLECTED = 5, 0.6  # letters that words of more letters may have in common, and what that counts
_MANY_NAMES = 0.2  # of all words; English has about 5%, German about 25%
_REWORDED = 0.3  # what a word counts that the text does not have
_QUESTION = 0.6  # what the question's words count beside the answer's
_END = re.compile(r"\n\s*\n|\n|(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？।۔؟])")
Span = tuple[int, int]
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")


@dataclass(frozen=True)
class Passage:
    """text[start:end] of the reading, in a file and, where that has parts, in one of them."""

    start: int
    end: int
    file: FileReport
    place: Place | None


class Passages:
    """All passages of a reading, in the order of the text, and which of their sentences hold which word.

    Attributes:
        all: the passages.
        starts: their first characters.
        sentences: the first and last characters of all sentences.
        owner: [sentences], the number of each one's passage.
    """

    def __init__(self, reading: Reading):
        self.reading = reading
        self.all, self.sentences, owners = list[Passage](), list[tuple[int, int]](), list[int]()
        for file, place, group in _groups(reading):
            owners += [len(self.all)] * len(group)
            self.sentences += group
            self.all.append(Passage(group[0][0], group[-1][1], file, place))
        self.starts = np.array([passage.start for passage in self.all], np.int64)
        self.owner = np.array(owners, np.int64)
        holders, titled = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for number, (start, end) in enumerate(self.sentences):
            for word in with_stems(reading.text[start:end]):
                holders[word].append(number)
        for number, passage in enumerate(self.all):
            for word in with_stems(f"{passage.file.name} {passage.place.name if passage.place else ''}"):
                titled[word].append(number)
        self._holders, self._titled = dict(holders), dict(titled)
        parts = [(id(self.all[n].file), id(self.all[n].place)) for n in owners]
        self._joined = np.array([a == b for a, b in pairwise(parts)], bool)  # with the sentence before, in one part

    @cached_property
    def names_tell(self) -> bool:
        """Whether capitals mark names: not where all nouns have one, as in German, nor where there are none."""
        return len(names(self.reading.text)) < _MANY_NAMES * len(re.findall(r"\w+", self.reading.text))

    @cached_property
    def lower_case(self) -> set[str]:
        """Words that the text has without a capital: no names."""
        return {word for word in re.findall(r"\w+", self.reading.text) if word.islower()}

    @cached_property
    def named(self) -> set[str]:
        """Words that have a capital wherever the text has them, and somewhere inside of a sentence: names at the start
        of one, too."""
        return set(names(self.reading.text)) - {word.capitalize() for word in self.lower_case}

    def names_in(self, sentence: str) -> list[str]:
        """The names in a sentence, with its first word where the text knows that for a name."""
        first = re.search(r"\w+", sentence)
        return ([first[0]] if first and first[0] in self.named else []) + names(sentence)

    def says(self, phrase: str) -> bool:
        """Whether a sentence has these words one after the other."""
        first, *others = ([*self._holders.get(word, ())] for word in phrase.split())
        return any(f" {phrase} " in f" {' '.join(words(self.sentence(n)))} " for n in set(first).intersection(*others))

    def sentence(self, number: int) -> str:
        start, end = self.sentences[number]
        return self.reading.text[start:end]

    def around(self, number: int) -> str:
        """The names of file and part, and a sentence with those of its passage and the ones beside it."""
        passage = self.all[self.owner[number]]
        beside = [n for n in (number - 1, number + 1) if 0 <= n < len(self.sentences)]
        beside = [n for n in beside if self.all[self.owner[n]].place is passage.place]
        texts = [passage.file.name, passage.place.name if passage.place else "", *map(self.sentence, beside)]
        return "\n".join([*texts, self.reading.text[passage.start : passage.end]])

    def scores(self, question: str, answer: str) -> DoubleArray:
        """[passages], in [0, 1]."""
        best = np.zeros(len(self.all))
        np.maximum.at(best, self.owner, self.sentence_scores(question, answer))
        return best

    def sentence_scores(self, question: str, answer: str) -> DoubleArray:
        """[sentences], in [0, 1]."""
        value, total = np.zeros(len(self.sentences)), 0.0
        marked = " ".join(numbers(answer) + names(answer))
        for weight, text in ((_QUESTION, question), (1.0, answer), (1.0, marked)):
            for word in set(words(text)):
                rarity = weight * self.rarity(word)
                total += rarity
                value += rarity * self.held(word)
        return value / total if total else value

    def held(self, word: str) -> DoubleArray:
        """[sentences], in [0, 1]: whether each says a word, or one close to it, or its passage or a neighbour does."""
        own = _marked(self._holders, word, len(self.sentences))
        in_passage = _marked(self._titled, word, len(self.all))
        np.maximum.at(in_passage, self.owner, own)
        beside = in_passage[self.owner]
        beside[1:] = np.maximum(beside[1:], own[:-1] * self._joined)
        beside[:-1] = np.maximum(beside[:-1], own[1:] * self._joined)
        return np.maximum(own, _AROUND * beside)

    def rarity(self, word: str) -> float:
        """BM25's weight of a word; less for one that no sentence has, which may be in the answer's own words."""
        count, total = len(self._holders.get(word, ())), len(self.sentences)
        if not count:
            return _REWORDED * math.log(1 + (total - 0.5) / 1.5)
        return math.log(1 + (total - count + 0.5) / (count + 0.5))


def _marked(holders: Mapping[str, list[int]], word: str, count: int) -> DoubleArray:
    """[count]: 1 for what holds the word, less for what holds one that starts alike."""
    found = np.zeros(count)
    if len(word) > _STEM:
        found[holders.get(_stem(word), [])] = _INFLECTED
    found[holders.get(word, [])] = 1.0
    return found


def numbers(text: str) -> list[str]:
    """Its numbers, dates and times, without the separators of thousands."""
    return [re.sub(r"(?<=\d),(?=\d{3}\b)", "", found) for found in _NUMBER.findall(text)]


def names(text: str) -> list[str]:
    """Words with a capital inside of sentences, and at their start where the next word has one, too."""
    found = list[str]()
    for sentence in _END.split(text):
        said = re.findall(r"\w+", sentence)
        capital = [len(word) > 1 and word[0].isupper() for word in said]
        found += [said[n] for n in range(len(said)) if capital[n] and (n > 0 or capital[1:2] == [True])]
    return found


def sentences(text: str, start: int = 0, end: int | None = None) -> Iterator[Span]:
    """The characters of each sentence or line, without the spaces around it."""
    end = len(text) if end is None else end
    position = start
    for match in _END.finditer(text, start, end):
        yield from _stripped(text, position, match.start())
        position = match.end()
    yield from _stripped(text, position, end)


def _stripped(text: str, start: int, end: int) -> Iterator[Span]:
    inside = text[start:end]
    if inside.strip():
        yield start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())


def _groups(reading: Reading) -> Iterator[tuple[FileReport, Place | None, list[Span]]]:
    """The sentences of each passage."""
    for file in reading.files:
        parts: list[tuple[int, int, Place | None]] = []
        position = file.start
        for place in file.places if file.was_read else ():
            parts += [(position, place.start, None), (place.start, place.end, place)]
            position = place.end
        parts.append((position, file.end, None))
        for start, end, part in parts:
            for group in _grouped(reading.text, start, min(end, len(reading.text))):
                yield file, part, group


def _grouped(text: str, start: int, end: int) -> Iterator[list[Span]]:
    """Sentences that follow each other, up to the end of a paragraph or as long as a passage may be."""
    group: list[Span] = []
    for begin, stop in _shortened(text, start, end):
        if group:
            first, last = group[0][0], group[-1][1]
            new_paragraph = "\n\n" in text[last:begin] and last - first >= _SHORTEST
            new_section = text[begin] == "#" and text[group[-1][0]] != "#"
            if new_paragraph or new_section or stop - first > _LONGEST:
                yield group
                group = []
        group.append((begin, stop))
    if group:
        yield group


def _shortened(text: str, start: int, end: int) -> Iterator[Span]:
    """Sentences; those without an end in sight are cut between words."""
    for begin, stop in sentences(text, start, end):
        while stop - begin > 2 * _LONGEST:
            cut = text.rfind(" ", begin + _LONGEST, begin + 2 * _LONGEST)
            cut = cut if cut > 0 else begin + 2 * _LONGEST
            yield begin, cut
            begin = cut
        yield begin, stop


def _stem(word: str) -> str:
    return word[:_STEM] + "…"


def with_stems(text: str) -> set[str]:
    """The words of a text, and what longer ones begin with."""
    found = set(words(text))
    return found | {_stem(word) for word in found if len(word) > _STEM}
