"""The inverted index: which passages of which texts hold a word.

Words are indexed as they are, and longer ones also by their first letters, which inflected forms share (fixed-prefix
stemming; Can et al., 2008, found five letters to be best for Turkish). Arabic and Hebrew words are so without their
article and the letters that stand for "and", "in", "to" before them.
"""

import re
import sqlite3
from collections.abc import Iterable

import numpy as np

from ..core.types import WordArray
from ..core.words import words

PASSAGE = 64  # words
_STEM = 5  # letters
_LONGEST = 64  # letters of a word that are told apart
_ATTACHED = re.compile("(?:(?:ال|[وفبكل])(?=...))+|(?:[והבכלמש](?=...))+")
_SEMITIC = re.compile("[\u05d0-\u05ea\u0620-\u064a]{3}")
_VARIABLES = 500  # that one statement takes


def stem(word: str) -> str:
    """What a word shares with its other forms, marked as no word; "" for short ones."""
    if _SEMITIC.match(word):  # a name may start with such a letter itself: all of them are left away
        attached = _ATTACHED.match(word)
        return f"{word[attached.end() if attached else 0 :][:_STEM]}*"
    return f"{word[:_STEM]}*" if len(word) > _STEM else ""


def passage_count(text: str) -> int:
    return -(-len(words(text)) // PASSAGE)


def insert(rows: sqlite3.Connection, text: int, content: str) -> None:
    """Indexes a text by its number; in the caller's transaction."""
    found: dict[str, list[int]] = {}
    for number, word in enumerate(words(content)):
        passage = number // PASSAGE
        for key in (word[:_LONGEST], stem(word)):
            passages = found.setdefault(key, [])
            if not passages or passages[-1] != passage:
                passages.append(passage)
    found.pop("", None)
    postings = ((word, text, np.array(passages, np.uint32).tobytes()) for word, passages in sorted(found.items()))
    rows.executemany("INSERT OR REPLACE INTO postings VALUES (?, ?, ?)", postings)


def lookup(rows: sqlite3.Connection, asked: Iterable[str]) -> dict[str, dict[int, int]]:
    """For each word that some text holds: the texts, and how many of their passages hold it."""
    asked, found = sorted(set(asked)), dict[str, dict[int, int]]()
    for i in range(0, len(asked), _VARIABLES):
        part = [word[:_LONGEST] for word in asked[i : i + _VARIABLES]]
        marks = ", ".join("?" * len(part))
        for word, text, length in rows.execute(
            f"SELECT word, text, length(passages) / 4 FROM postings WHERE word IN ({marks})", part
        ):
            found.setdefault(word, {})[text] = length
    return found


def passages(rows: sqlite3.Connection, word: str, text: int) -> WordArray:
    """The passages of a text that hold a word."""
    row = rows.execute("SELECT passages FROM postings WHERE word = ? AND text = ?", (word[:_LONGEST], text)).fetchone()
    return np.frombuffer(row[0] if row else b"", np.uint32)
