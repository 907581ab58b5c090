"""Running heads, running feet and page numbers: what stands at the edge of page after page."""

import re
from collections import Counter
from collections.abc import Sequence

from nectar_mlx.documents.pdf.layout import Line

_DEPTH = 2  # lines from the top or from the bottom
_NUMBER = re.compile(r"\d+|[ivxlc]+", re.IGNORECASE)
_PAGE_NUMBER = re.compile(
    r"\W*(?:\w{1,9}\.?\s*)?(?:\d{1,5}|[ivxlc]{1,7})(?:\s*(?:/|of|von|de|из|di|sur|van)\s*\d{1,5})?\W*|第\s*\d+\s*[页頁]",
    re.IGNORECASE,
)
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


def removed(pages: Sequence[list[Line]]) -> tuple[list[list[Line]], list[str]]:
    """The pages without what repeats at their edges, and what that was."""
    if len(pages) < 2:
        return list(pages), []
    edges = [_edge_lines(page) for page in pages]
    repeated = _repeated(edges, len(pages))
    numbered = _numbered(edges)
    kept, notes = [], Counter[str]()
    for number, page in enumerate(pages):
        gone = []
        for line in edges[number]:
            if _key(line, number) in repeated:
                notes[f"running head “{line.text[:60]}”" if not _is_number(line) else "page numbers"] += 1
            elif id(line) in numbered:
                notes["page numbers"] += 1
            else:
                continue
            gone.append(id(line))
        kept.append([line for line in page if id(line) not in gone])
    return kept, [f"{what} (on {count} pages)" for what, count in _merged(notes).items()]


def _merged(notes: Counter[str]) -> Counter[str]:
    """Heads that differ in the page's number count as one."""
    merged: Counter[str] = Counter()
    names: dict[str, str] = {}
    for note, count in notes.items():
        merged[names.setdefault(re.sub(r"\d+", "0", note), note)] += count
    return merged


def _edge_lines(page: Sequence[Line]) -> list[Line]:
    """The lines at the top and at the bottom, as long as the page holds more than those."""
    by_height = sorted(page, key=lambda line: -line.top)
    if len(by_height) < 3:
        return [line for line in by_height if len(by_height) > 1 and _is_number(line)]
    depth = min(_DEPTH, (len(by_height) - 1) // 2)
    return by_height[:depth] + by_height[-depth:]


def _key(line: Line, page: int) -> tuple[str, int]:
    """What two running heads share: the text but for the page's number, and the height."""
    text = re.sub(r"\d{1,5}", lambda number: f"#{int(number[0]) - page}", line.text)
    return " ".join(text.split()).casefold(), round(line.bottom / 6)


def _repeated(edges: Sequence[Sequence[Line]], pages: int) -> set[tuple[str, int]]:
    # With another number on each page only a short line that is no sentence is a head.
    keys = Counter(
        key for number, lines in enumerate(edges) for key in {_key(line, number) for line in lines if _is_title(line)}
    )
    plain = Counter(key for lines in edges for key in {_key(line, 0) for line in lines})
    least = 2 if pages == 2 else max(3, pages // 5)
    found = {key for key, count in keys.items() if count >= least}
    # A head with a fixed number in it ("Report 2023") has another key on each page.
    for number, lines in enumerate(edges):
        found |= {_key(line, number) for line in lines if plain[_key(line, 0)] >= least}
    return found


def _is_title(line: Line) -> bool:
    return len(line.text.split()) <= 6 and not line.text.rstrip().endswith((".", ",", ";", ":", "!", "?"))


def _is_number(line: Line) -> bool:
    return _PAGE_NUMBER.fullmatch(line.text) is not None


def _numbered(edges: Sequence[Sequence[Line]]) -> set[int]:
    """The lines that count the pages: their number goes up by one from page to page."""
    candidates = [
        (value - page, id(line))
        for page, lines in enumerate(edges)
        for line in lines
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
