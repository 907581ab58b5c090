"""One spelling for each text: composed characters, no ligatures, no soft hyphens; what changed is kept."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from nectar_mlx.documents.reading import Edit

# Starters that nevertheless compose with the character before them: vowel signs of Indic scripts.
_COMPOSING = set("\u09be\u09d7\u0b3e\u0b56\u0b57\u0bbe\u0bd7\u0cc2\u0cd5\u0cd6\u0d3e\u0d57\u0dcf\u0ddf\u102e\u1b35")
_MOST_MARKS = 30  # on one letter; more are left as they are, as ordering them takes quadratic time


def normalized(text: str) -> tuple[str, list[Edit]]:
    """The text in one spelling (NFC, ligatures apart, no soft hyphens), and the edits that lead back.

    Characters that no UTF-8 file can hold (lone surrogates) become U+FFFD.
    """
    pattern = _changing(set(text))
    if pattern is None:
        return text, []
    parts: list[str] = []
    edits: list[Edit] = []
    position = length = 0
    for match in pattern.finditer(text):
        old, new = match[0], _respelled(match[0])
        if old == new:
            continue
        parts += [text[position : match.start()], new]
        start = length + match.start() - position
        length = start + len(new)
        edits.append(Edit(start, length, old))
        position = match.end()
    parts.append(text[position:])
    return "".join(parts), edits


def _changing(characters: Iterable[str]) -> re.Pattern[str] | None:
    """What matches every stretch that may change, made for the characters that occur; None if none may."""
    marks, singles = "", ""
    for character in sorted(characters):
        if character < "\u00ad":
            continue
        if _is_mark(character):
            marks += re.escape(character)
        elif _respelled(character) != character:
            singles += re.escape(character)
    alternatives = []
    if marks:
        alternatives.append(f"[^{marks}]?[{marks}]{{1,{_MOST_MARKS}}}")
    if singles:
        alternatives.append(f"[{singles}]")
    return re.compile("|".join(alternatives), re.DOTALL) if alternatives else None


def _is_mark(character: str) -> bool:
    jamo = "\u1160" <= character <= "\u11ff"
    return unicodedata.combining(character) != 0 or jamo or character in _COMPOSING


def _respelled(piece: str) -> str:
    if piece == "\u00ad":
        return ""
    if len(piece) == 1 and "\ud800" <= piece <= "\udfff":
        return "\ufffd"
    # Letters tied together for print (ﬁ) and the shapes of Arabic letters are stored as what they stand for.
    if any("\ufb00" <= character <= "\ufdff" or "\ufe70" <= character <= "\ufefc" for character in piece):
        piece = unicodedata.normalize("NFKC", piece)
    return unicodedata.normalize("NFC", piece)


def position_map(edits: Sequence[Edit]) -> Callable[[int], int]:
    """A function from positions in the original text to positions in the normalized one; a position within an edit goes
    no further than to its end."""
    ends: list[int] = []  # of the edits, in the original text
    shifts = [0]
    for edit in edits:
        ends.append(edit.start - shifts[-1] + len(edit.original))
        shifts.append(shifts[-1] + edit.end - edit.start - len(edit.original))

    def position(original: int) -> int:
        before = bisect_right(ends, original)
        moved = original + shifts[before]
        return min(moved, edits[before].end) if before < len(edits) and moved > edits[before].start else moved

    return position
