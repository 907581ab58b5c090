"""A page written as light Markdown while its tags start and end."""

import re

from nectar_mlx.documents.blocks import MOST_INDENT, row

_BLOCK = set(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hgroup",
        "hr",
        "html",
        "legend",
        "main",
        "nav",
        "p",
        "pre",
        "search",
        "section",
        "summary",
        "table",
    ]
)
_HEADING = re.compile("h([1-6])")
_MOST_SPAN = 100  # columns or rows of a cell
_MOST_BLANK = 10_000
_SPACES = re.compile(r"[ \t\r\n\f]+")
_EXPONENT = re.compile(r"[+\-−–]?\d+")


class Page:
    """Collects blocks of text; the one being read is a prefix (list marker, heading signs) and a line."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._prefix = ""
        self._line: list[str] = []
        self._last = ""  # the last character of the line
        self._preformatted = False
        self._lists: list[int | None] = []
        self._tables: list[bool] = []  # of each open table, whether it only arranges the page
        self._row: list[str] | None = None
        self._columns = 1  # that the cell being read takes
        self._taken: dict[int, int] = {}  # by cells of rows above: the columns, and for how many more rows
        self._blank = 0  # cells that are there for others
        self._raised: list[int] = []
        self._link = -1  # where in the line the last link starts

    def text(self) -> str:
        self._end_row()
        self._end_block()
        return re.sub(r"\n{3,}", "\n\n", "".join(self._blocks)).strip("\n")

    def start(self, tag: str, *, layout: bool = False, columns: str = "", rows: str = "") -> None:
        """An element starts; `layout` marks a table that only arranges the page; a cell may take several columns and
        rows."""
        if tag == "br":
            self._add("\n")
        elif tag in ("ul", "ol"):
            self._end_block("\n" if self._lists else "\n\n")
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self._end_block("\n")
            self._prefix = self._next_marker()
        elif tag in ("td", "th"):
            self._start_cell(_span(columns), _span(rows))
        elif tag == "tr":
            self._start_row()
        elif heading := _HEADING.fullmatch(tag):
            self._end_block()
            self._prefix = "#" * int(heading[1]) + " "
        elif tag == "a":
            self._link = len(self._line)
        elif tag in ("sup", "rt"):
            self._raised.append(len(self._line))
            if tag == "rt":
                self._add("(")
        elif tag == "q":
            self._add("“")
        elif tag in _BLOCK:
            self._start_block(tag, layout=layout)

    def end(self, tag: str) -> None:
        if tag in ("ul", "ol"):
            if self._lists:
                self._lists.pop()
            self._end_block("\n" if self._lists else "\n\n")
        elif tag == "li":
            self._end_block("\n")
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "tr":
            self._end_row()
        elif tag == "rt":
            self._raised.pop()
            self._add(")")
        elif tag == "sup":
            self._end_raised()
        elif tag == "q":
            self._add("”")
        elif tag == "table":
            self._end_row()
            self._end_block()
            self._tables.pop()
        elif tag in _BLOCK or _HEADING.fullmatch(tag):
            self._end_block()
            if tag == "pre":
                self._preformatted = False

    def data(self, data: str) -> None:
        if not self._preformatted:
            data = _SPACES.sub(" ", data)
            if self._last in ("", " ", "\n"):
                data = data.lstrip(" ")
        elif not self._line:
            data = data.removeprefix("\n")
        self._add(data)

    def number_from(self, start: str) -> None:
        """The number of the next item of a numbered list."""
        if re.fullmatch(r"[0-9]{1,6}", start) and self._lists and self._lists[-1] is not None:
            self._lists[-1] = int(start) - 1

    def _add(self, data: str) -> None:
        if data:
            self._line.append(data)
            self._last = data[-1]

    def _next_marker(self) -> str:
        indent = "  " * min(len(self._lists) - 1, MOST_INDENT)
        number = self._lists[-1] if self._lists else None
        if number is None:
            return f"{indent}- "
        self._lists[-1] = number + 1
        return f"{indent}{number + 1}. "

    def _start_block(self, tag: str, *, layout: bool) -> None:
        # What opens right after a list marker stands beside it.
        if self._last.strip() or not self._prefix:
            self._end_block()
        if tag == "pre":
            self._preformatted = True
        if tag == "table":
            self._end_row()
            self._taken = {}
            self._tables.append(layout)

    def _end_raised(self) -> None:
        """Marks a raised number: 10^6 would be 106, and a note's sign would be a part of the word's number."""
        start = self._raised.pop() if self._raised else 0
        raised = "".join(self._line[start:]).strip()
        before = self._line[start - 1][-1:] if 0 < start <= len(self._line) else ""
        if _EXPONENT.fullmatch(raised):
            del self._line[start:]
            is_exponent = (before.isalnum() or before in ")]") and self._link < start
            self._add(f"^{raised}" if is_exponent else f"[{raised}]")  # a link leads to a note

    def _start_row(self) -> None:
        self._end_row()
        self._end_block("\n")
        self._row = None if self._tables and self._tables[-1] else []

    def _start_cell(self, columns: int, rows: int) -> None:
        if self._row is None:
            self._end_block()
            return
        self._line, self._last, self._link = [], "", -1
        self._skip_taken()
        self._columns = columns if self._blank < _MOST_BLANK else 1
        if rows > 1:
            place = len(self._row)
            self._taken |= dict.fromkeys(range(place, place + self._columns), rows)

    def _skip_taken(self) -> None:
        while self._row is not None and self._blank < _MOST_BLANK and self._taken.get(len(self._row), 0) > 0:
            self._row.append("")
            self._blank += 1

    def _end_cell(self) -> None:
        if self._row is None:
            self._end_block()
        else:
            self._row += ["".join(self._line), *[""] * (self._columns - 1)]
            self._blank += self._columns - 1
            self._line, self._last, self._link = [], "", -1

    def _end_row(self) -> None:
        cells, self._row = self._row, None
        if cells is not None:
            self._taken = {column: rows - 1 for column, rows in self._taken.items() if rows > 1}
        if cells and (line := row(cells)):
            self._line, self._last = [line], line[-1]
            self._end_block("\n")

    def _end_block(self, gap: str = "\n\n") -> None:
        if self._row is not None:
            self._add(" ")
            return
        line = "".join(self._line).strip("\n").rstrip()
        if line:
            self._blocks.append(f"{self._prefix}{line}{gap}")
            self._prefix = ""
        elif gap == "\n\n":
            self._blocks.append("\n")
            self._prefix = ""
        self._line, self._last, self._link = [], "", -1


def _span(given: str) -> int:
    """How many columns or rows a cell takes."""
    return max(1, min(int(given), _MOST_SPAN)) if re.fullmatch("[0-9]{1,6}", given) else 1
