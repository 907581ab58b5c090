"""Running heads, running feet and page numbers: what stands at the edge of page after page."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from nectar_mlx.documents.pdf.layout import Line

_MOST_NUMBERS = 4  # in a head
_DEPTH = 2  # lines from the top or from the bottom
_NUMBER = re.compile(r"\d+|\b[ivxlc]+\b", re.IGNORECASE)
_PAGE_NUMBER = re.compile(
    r"\W*(?:\w{1,9}\.?\s*)?(?:\d{1,5}|[ivxlc]{1,7})(?:\s*(?:/|of|von|de|из|di|sur|van)\s*\d{1,5})?\W*|第\s*\d+\s*[页頁]",
    re.IGNORECASE,
)
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


def removed(pages: Sequence[list[Line]]) -> tuple[list[list[Line]], list[str]]:
    """The pages without what repeats at their edges, and what that was."""
    if len(pages) < 2:
        return list(pages), []
    edges = [_edges(page) for page in pages]
    numbers = _page_numbers(edges)
    heads = _heads(edges, numbers)
    kept, notes = [], Counter[str]()
    for page, edge in zip(pages, edges, strict=True):
        gone = {id(line) for line in edge.lines if id(line) in numbers or id(line) in heads}
        notes.update("page numbers" if id(line) in numbers else heads[id(line)] for line in page if id(line) in gone)
        kept.append([line for line in page if id(line) not in gone])
    return kept, [f"{what} (on {count} pages)" for what, count in _merged(notes).items()]


def _merged(notes: Counter[str]) -> Counter[str]:
    """Heads that differ in the page's number count as one."""
    merged: Counter[str] = Counter()
    names: dict[str, str] = {}
    for note, count in notes.items():
        merged[names.setdefault(re.sub(r"\d+", "0", note), note)] += count
    return merged


@dataclass
class _Edge:
    """The lines near the top and the bottom of a page, from the outside; `apart` are set off from the text."""

    top: list[Line]
    bottom: list[Line]
    apart: set[int]

    @property
    def lines(self) -> list[Line]:
        return self.top + self.bottom


def _edges(page: Sequence[Line]) -> _Edge:
    """The edges of a page, as long as it holds more than those."""
    lines = sorted(page, key=lambda line: -line.top)
    pitches = [pitch for above, below in pairwise(lines) if (pitch := above.bottom - below.bottom) > 2]
    usual = median(pitches) if pitches else 0.0
    depth = min(_DEPTH, (len(lines) - 1) // 2) if len(lines) > 2 else 0
    apart: set[int] = set()
    for inward in (lines, lines[::-1]):
        for number in range(depth):
            gap = abs(inward[number].bottom - inward[number + 1].bottom)
            is_other = abs(inward[number].size - inward[number + 1].size) > 0.1 * inward[number].size
            if gap > 1.4 * usual or is_other:
                apart |= {id(line) for line in inward[: number + 1]}
    if len(lines) == 2:
        return _Edge(lines[:1], [line for line in lines[1:] if _is_number(line)], apart)
    return _Edge(lines[:depth], lines[::-1][:depth], apart)


def _heads(edges: Sequence[_Edge], numbers: set[int]) -> dict[int, str]:
    """The running heads and feet, each with what it is called in the report.

    One that is set off from the text may hold the page's number; one that is not must be the same on most pages.
    """
    sides = [(page, side) for page, edge in enumerate(edges) for side in (edge.top, edge.bottom)]
    apart = [(page, line) for page, side in sides for line in side if id(line) in edges[page].apart]
    outer = [
        (page, line)
        for page, side in sides
        for line in [other for other in side if id(other) not in numbers][:1]
        if id(line) not in edges[page].apart
    ]
    least = 2 if len(edges) == 2 else max(3, len(edges) // 5)
    found: dict[int, str] = {}
    for lines, keys, enough in (
        (apart, _same_but_number, least),
        (apart, _same, least),
        (outer + apart, _same, max(least, 0.6 * len(edges))),
    ):
        counts = Counter(key for page, line in lines for key in set(keys(line, page)))
        chosen = [line for page, line in lines if any(counts[key] >= enough for key in keys(line, page))]
        found |= {id(line): f"running head “{line.text[:60]}”" for line in chosen if id(line) not in numbers}
    return found


def _same(line: Line, page: int) -> list[tuple[str, int]]:
    """What two running heads share: the text and the height."""
    return [(" ".join(line.text.split()).casefold(), round(line.bottom / 6))]


def _same_but_number(line: Line, page: int) -> list[tuple[str, int]]:
    """What two running heads share of which one number counts the pages; nothing for what is no title."""
    if not _is_title(line):
        return []
    text, keys = " ".join(line.text.split()).casefold(), []
    for number in list(re.finditer(r"\d{1,5}", text))[:_MOST_NUMBERS]:
        counted = f"{text[: number.start()]}#{int(number[0]) - page}{text[number.end() :]}"
        keys.append((counted, round(line.bottom / 6)))
    return keys


def _is_title(line: Line) -> bool:
    return len(line.text.split()) <= 6 and not line.text.rstrip().endswith((".", ",", ";", ":", "!", "?"))


def _is_number(line: Line) -> bool:
    return _PAGE_NUMBER.fullmatch(line.text) is not None


def _page_numbers(edges: Sequence[_Edge]) -> set[int]:
    """The lines that count the pages: their number goes up by one from page to page."""
    candidates = [
        (value - page, id(line))
        for page, edge in enumerate(edges)
        for line in edge.lines
        if _is_number(line)
        for value in _values(line.text)
    ]
    offsets = Counter(offset for offset, _ in candidates)
    return {line for offset, line in candidates if offsets[offset] >= 2}


def _values(text: str) -> list[int]:
    return [int(found) if found.isdecimal() else _roman(found.lower()) for found in _NUMBER.findall(text)[:1]]


def _roman(text: str) -> int:
    values = [_ROMAN[character] for character in text]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return sum(-value if value < following else value for value, following in pairs)
