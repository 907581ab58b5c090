"""How well each text of the library fits a question, by its words.

A word counts by how few texts hold it, and within a text by how few passages do. What counts of a text is the best of
its windows, two neighbouring passages, so that a fact that lies across a border is found; and, less, all of it. Words
of its name count everywhere in it.
"""

import math
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import regex

from ..core.types import DoubleArray
from ..core.words import words
from . import index
from .question_words import question_words

_CANDIDATES = 32  # texts whose passages are looked at
_BACKGROUND = 20  # texts that a small library is thought to have beside its own, which hold none of its words
_ASKING = 0.15  # how much words count with which questions are asked
_PROPER = 1.5  # how much proper names count
_UNKNOWN = 0.5  # how much a word counts that no text holds, and that is no name: some other word may stand for it
_COMMON = 0.5  # how much less a word counts that all passages of a text hold
_FORM = 0.8  # how much another form of a word counts
_NAME = 0.8  # how much a word of the name counts
_WHOLE = 0.3  # how much the whole text counts beside its best window


_CAPITAL = regex.compile(r"(?<![\p{L}\p{N}])(?:\p{Lu}[\p{L}\p{M}\p{N}]+|[\p{L}\p{N}]*\p{Nd}[\p{L}\p{N}]*)")


@dataclass(frozen=True)
class Match:
    """How a text fits a question.

    Attributes:
        text: its number.
        score: what texts are ranked by.
        rarest: the weight of the heaviest word that its best window holds, by that of a word that only one text holds.
        focus: the share of the question's words that this window holds, by their weights' cubes: of the few words that
            tell most.
        missing: the weight of the heaviest word that the text does not hold, by that of the heaviest word of all.
        passage: the first passage of that window.
    """

    text: int
    score: float
    rarest: float
    focus: float
    missing: float
    passage: int


@dataclass(frozen=True)
class _Asked:
    """A word of the question, its weight, and how many passages of which texts hold it, or some form of it."""

    word: str
    stem: str
    weight: float
    exact: Mapping[int, int]
    forms: Mapping[int, int]

    def named(self, name: Collection[str]) -> bool:
        return self.word in name or (self.stem != "" and self.stem in name)


def matches(rows: sqlite3.Connection, question: str, names: Mapping[int, Collection[str]]) -> list[Match]:
    """The texts that hold words of a question, best first. names: of each text, the words of its files' names."""
    asked = _asked(rows, question, names)
    totals: dict[int, float] = {}
    for word in asked:
        named = [text for text, name in names.items() if word.named(name)]
        for text in {*word.exact, *word.forms, *named}:
            totals[text] = totals.get(text, 0.0) + word.weight * (1 if text in word.exact else _FORM)
    chosen = sorted(totals.keys() & names.keys(), key=lambda text: (-totals[text], text))[:_CANDIDATES]
    found = [_match(rows, text, asked, names[text], len(names)) for text in chosen]
    return sorted(found, key=lambda match: (-match.score, match.text))


def _asked(rows: sqlite3.Connection, question: str, names: Mapping[int, Collection[str]]) -> list[_Asked]:
    stems = {word: index.stem(word) for word in words(question)}
    found = index.lookup(rows, [*stems, *filter(None, stems.values())])
    asked, total, proper = [], len(names) + _BACKGROUND, _proper(question)
    for word, stem in stems.items():
        exact, forms = found.get(word, {}), found.get(stem, {})
        factor = _ASKING if word in question_words() else _PROPER if word in proper else 1.0
        if not exact and not forms and factor == 1:
            factor = _UNKNOWN
        asked.append(_Asked(word, stem, factor * _weight(total, len(exact or forms)), exact, forms))
    return asked


def _proper(question: str) -> set[str]:
    """Words that begin with a capital letter, or hold a digit, though not where the question begins."""
    capital = _CAPITAL.findall(question.strip()[1:])
    return {word for found in capital for word in words(found)}


def _match(rows: sqlite3.Connection, text: int, asked: list[_Asked], name: Collection[str], total: int) -> Match:
    """total: how many texts there are."""
    count = max(1, rows.execute("SELECT passages FROM texts WHERE id = ?", (text,)).fetchone()[0])
    weights = np.array([_weight_within(word, text, count) for word in asked])
    held = np.array([_held(rows, word, text, count, name) for word in asked])  # [words, passages]
    whole = held.max(1)
    held[:, :-1] = np.maximum(held[:, :-1], held[:, 1:])
    windows = weights @ held
    best = int(windows.argmax())
    found = weights * held[:, best]
    return Match(
        text=text,
        score=float(windows[best] + _WHOLE * weights @ whole),
        rarest=float(found.max()) / _weight(total + _BACKGROUND, 1),
        focus=float((found**3).sum() / (weights**3).sum()),
        missing=float((weights * (whole == 0)).max()) / max(word.weight for word in asked),
        passage=best,
    )


def _weight(total: int, holding: int) -> float:
    """Of a word that so many of all texts hold."""
    return math.log(1 + max(0.0, total - holding + 0.5) / (holding + 0.5))


def _weight_within(word: _Asked, text: int, count: int) -> float:
    """Held by most passages, a word tells less about one of them; there must be some for that to be known."""
    return word.weight * (1 - _COMMON * (word.exact.get(text) or word.forms.get(text, 0)) / (count + 3))


def _held(rows: sqlite3.Connection, word: _Asked, text: int, count: int, name: Collection[str]) -> DoubleArray:
    """How far each passage holds a word, in [0, 1]."""
    held: DoubleArray = np.full(count, _NAME if word.named(name) else 0.0)
    if text in word.forms:
        held[index.passages(rows, word.stem, text)] = _FORM
    if text in word.exact:
        held[index.passages(rows, word.word, text)] = 1.0
    return held
