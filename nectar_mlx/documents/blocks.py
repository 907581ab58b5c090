"""A writer of light Markdown: blocks, headings, list items and table rows, each in linear time and bounded depth."""

import re

MOST_INDENT = 8
MAX_CHARACTERS = 1 << 26
"""What the text of one document may hold: about thirty times the Bible."""


def heading(level: int, text: str) -> str:
    return f"{'#' * max(1, min(level, 6))} {text}"


def item(depth: int, text: str, marker: str = "-") -> str:
    return f"{'  ' * max(0, min(depth, MOST_INDENT))}{marker} {text}"


def row(cells: list[str]) -> str:
    """A table's row in one line; empty if all cells are."""
    cells = [" ".join(cell.split()) for cell in cells]
    while cells and not cells[-1]:
        cells.pop()
    return " | ".join(cells)


def table(rows: list[list[str]]) -> str:
    lines = [line for cells in rows if (line := row(cells))]
    return "\n".join(lines)


def joined(blocks: list[str]) -> str:
    """Blocks with an empty line between them; those of one list follow each other."""
    parts: list[str] = []
    for block in blocks:
        if not block.strip():
            continue
        if parts:
            parts.append("\n" if _is_item(block) and _is_item(parts[-1]) else "\n\n")
        parts.append(block.strip("\n").rstrip())
    return "".join(parts)


def _is_item(block: str) -> bool:
    return re.match(r" *(?:-|\d+\.|\d+(?:\.\d+)+\.?|\(?\w{1,5}\)) ", block) is not None
