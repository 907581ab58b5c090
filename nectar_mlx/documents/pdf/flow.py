"""Lines of pages as paragraphs: lines that the width of the page broke are joined, all others are kept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from nectar_mlx.documents.blocks import MOST_INDENT, heading
from nectar_mlx.documents.pdf.hyphens import Words, goes_on_later, is_broken
from nectar_mlx.documents.pdf.layout import Line, count_words

_MARKER = re.compile(r"(?:[•◦▪‣·●○■–—*-]|\(?(?:[0-9]{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)])\s")
_SENTENCE_END = re.compile(r"[.!?…:;。！？：；।؟][\"'”’»)\]]*$")
_DENSE = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")
_SPACE = 0.24  # the width of a space, of a line's height
_HEADING_SIZES = ((1.6, 1), (1.25, 2))  # of the size of most text, and the level


@dataclass(eq=False)
class Block:
    """Lines of one size that follow each other closely in one column of one page."""

    lines: list[Line]
    left: float
    right: float
    is_prose: bool = False
    letter: float = 0.0  # the width of every letter, where all are as wide as in code

    @property
    def is_full(self) -> bool:
        """Whether several lines reach the margin, so that it is one."""
        reach = 0.06 * (self.right - self.left)
        edges = [line.left - self.left if line.from_right else self.right - line.right for line in self.lines]
        return sum(edge < reach for edge in edges) > 1

    def breaks(self, line: Line, following: Line) -> bool:
        """Whether the first word of the following line had no room left at the end of this one."""
        word = following.text[:1] if _DENSE.match(following.text) else following.text.split(maxsplit=1)[0]
        width = len(word) / len(following.text) * (following.right - following.left)
        room = line.left - self.left if line.from_right else self.right - line.right
        return room < width + 0.3 * line.size


def join(pages: Sequence[Sequence[Line]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of the pages, and where each of them starts and ends in it.

    Words and sentences go on over lines, columns and pages.
    """
    writer = _Writer([line for page in pages for line in page])
    bounds: list[tuple[int, int]] = []
    for page in pages:
        start = None
        for block in _blocks(page):
            for line in block.lines:
                position = writer.add(line, block)
                start = position if start is None else start
        bounds.append((writer.length if start is None else start, writer.length))
    # A page whose last word goes on has lost its hyphen since.
    starts = [start for start, _ in bounds[1:]] + [writer.length]
    return "".join(writer.parts), [(start, min(end, limit)) for (start, end), limit in zip(bounds, starts, strict=True)]


class _Writer:
    """Collects the text; `length` is that of all parts."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.parts: list[str] = []
        self.length = 0
        self._words = Words(line.text for line in lines if not line.is_row)
        self._body = _body_size(lines)
        self._line: Line | None = None
        self._block: Block | None = None

    def add(self, line: Line, block: Block) -> int:
        """Adds a line; returns where its text starts."""
        between, text = "", line.text
        if self._line is None or self._block is None:
            text = self._marked(line, block)
        elif line.is_row and self._line.is_row and self._line.region == line.region:
            between = "\n"
        elif self._is_word(self._line, self._block, line, block):
            if not self._words.keeps_hyphen(self._line.text, line.text):
                self.parts[-1] = self.parts[-1][:-1]
                self.length -= 1
        elif self._goes_on(self._line, self._block, line, block):
            between = "" if _DENSE.match(self._line.text[-1]) and _DENSE.match(text[0]) else " "
        else:
            between = "\n" if block is self._block else "\n\n"
            text = self._marked(line, block)
        start = self.length + len(between)
        self.parts += [between, text]
        self.length = start + len(text)
        self._line, self._block = line, block
        return start

    def _is_word(self, last: Line, before: Block, line: Line, block: Block) -> bool:
        """Whether the line starts with the rest of a word."""
        is_near = block is before or last.region != line.region
        is_rest = line.text[0].isalnum() and not goes_on_later(line.text)
        return is_broken(last.text) and is_rest and not last.is_row and not line.is_row and is_near

    def _goes_on(self, last: Line, before: Block, line: Line, block: Block) -> bool:
        """Whether a line goes on with the sentence of the last one, which filled its width."""
        if last.is_row or line.is_row or not before.is_prose or _MARKER.match(line.text):
            return False
        if not before.breaks(last, line) or (_SENTENCE_END.search(last.text) and not before.is_full):
            return False
        if block is before:
            is_indented = line.left - last.left > 0.8 * line.size and line.left - block.left > 0.8 * line.size
            return not is_indented or _MARKER.match(last.text) is not None or line.from_right
        starts_inside = line.text[0].islower() or bool(_DENSE.match(line.text) and _DENSE.match(last.text[-1]))
        return last.region != line.region and starts_inside and not _SENTENCE_END.search(last.text)

    def _marked(self, line: Line, block: Block) -> str:
        """The line with the signs of a heading, or with its indentation below a line that opens something."""
        if line.is_row:
            return line.text
        level = next((level for share, level in _HEADING_SIZES if line.size >= share * self._body), 0)
        if level and len(block.lines) <= 3 and len(line.text) < 200 and line is block.lines[0]:
            return heading(level, line.text)
        indent = line.left - block.left
        if self._line is not None and block is self._block and indent > 0.8 * line.size:
            opens = self._line.text[-1] in ":{([" or self._line.left - block.left > 0.8 * line.size
            if opens and not block.is_prose:
                return " " * min(round(indent / (block.letter or _SPACE * line.size)), 4 * MOST_INDENT) + line.text
        return line.text


def _body_size(lines: Sequence[Line]) -> float:
    """The size of most characters."""
    counts: dict[float, int] = {}
    for line in lines:
        size = round(line.size, 1)
        counts[size] = counts.get(size, 0) + len(line.text)
    return max(counts, key=lambda size: counts[size], default=1.0)


def _blocks(page: Sequence[Line]) -> list[Block]:
    regions: dict[int, list[Line]] = {}
    for line in page:
        regions.setdefault(line.region, []).append(line)
    return [block for lines in regions.values() for block in _split(lines)]


def _split(lines: list[Line]) -> list[Block]:
    """The blocks of a column: a wider gap or another size starts a new one."""
    pitches = [_pitch(above, below) for above, below in pairwise(lines)]
    usual = median(pitches) if pitches else 0.0
    left, right = _margin([-line.left for line in lines]), _margin([line.right for line in lines])
    blocks = [Block([lines[0]], -left, right)]
    for (above, below), pitch in zip(pairwise(lines), pitches, strict=True):
        sizes = sorted((above.size, below.size))
        if pitch > 1.35 * usual or pitch > 2.2 * sizes[1] or sizes[1] > 1.2 * sizes[0]:
            blocks.append(Block([], -left, right))
        blocks[-1].lines.append(below)
    for block in blocks:
        block.is_prose = _is_prose(block)
        block.letter = _letter_width(block)
    return blocks


def _letter_width(block: Block) -> float:
    """The width of the letters, if all are equally wide; else 0."""
    widths = [(line.right - line.left) / len(line.text) for line in block.lines if len(line.text) >= 5]
    return median(widths) if len(widths) > 1 and max(widths) < 1.05 * min(widths) else 0.0


def _pitch(above: Line, below: Line) -> float:
    return above.bottom - below.bottom


def _margin(edges: list[float]) -> float:
    """How far the lines reach; of five or more, one may reach farther."""
    edges = sorted(edges, reverse=True)
    return edges[1] if len(edges) >= 5 else edges[0]


def _is_prose(block: Block) -> bool:
    """Whether most lines end where the width made them, as in running text, and not where a list or code wants."""
    lines = block.lines
    if any(line.is_row for line in lines):
        return False
    if len(lines) > 1 and all(_SENTENCE_END.search(line.text) for line in lines):
        return False
    words = median(count_words(line.text) for line in lines)
    if words < 4 and not any(
        is_broken(line.text) or re.search(r"[,.;?!，。、،।](?:\s|$)", line.text) for line in lines
    ):
        return False
    pairs = [
        (above, below)
        for above, below in pairwise(lines)
        if not is_broken(above.text) and not _MARKER.match(below.text)
        if not _SENTENCE_END.search(above.text) or block.breaks(above, below)
    ]
    capitals = [below.text[0].isupper() for _, below in pairs if below.text[0].isalpha()]
    ends = [_SENTENCE_END.search(above.text) is not None for above, _ in pairs]
    if len(capitals) > 3 and sum(capitals) > 0.8 * len(capitals) and sum(ends) < 0.5 * len(ends):
        return not any(below.text[0].lower() != below.text[0].upper() for _, below in pairs)  # verse, a list
    if len(capitals) > 1 and all(capitals):
        stops = [re.search(r"[,.;:!?]$", above.text) is not None for above, _ in pairs]
        if sum(stops) >= 0.5 * len(stops):
            return False  # a short verse
    return sum(block.breaks(above, below) for above, below in pairs) >= 0.5 * len(pairs)
