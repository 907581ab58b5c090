"""A page's runs in the order of reading: rows, columns, and tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

from nectar_mlx.documents.blocks import row as table_row
from nectar_mlx.documents.pdf.direction import logical, runs_right_to_left
from nectar_mlx.documents.pdf.glyphs import Run

_NARROWEST_GUTTER = 0.8  # of the letters' height
_MOST_COLUMNS = 12
_MOST_NESTED = 2  # tables in columns of columns
_LEADERS = re.compile(r" ?(?:\. ?){5,}")
_SENTENCE_SIGNS = '.,;:!?)]”’»"'


@dataclass(slots=True)
class Line:
    """A line of a page in the order of reading.

    Attributes:
        text: the words; the cells of a table's row are set apart.
        left, bottom, right, top: its box.
        region: lines of one number stand in one column.
        is_row: whether it is a row of a table.
    """

    text: str
    left: float
    bottom: float
    right: float
    top: float
    region: int = 0
    is_row: bool = False

    @property
    def size(self) -> float:
        return self.top - self.bottom

    @property
    def from_right(self) -> bool:
        return runs_right_to_left(self.text)


@dataclass(slots=True)
class _Row:
    """The segments of one height, from left to right."""

    segments: list[Run] = field(default_factory=list)

    @property
    def size(self) -> float:
        return max(segment.size for segment in self.segments)

    @property
    def middle(self) -> float:
        return max(self.segments, key=lambda segment: segment.size).middle


Gutter = tuple[float, float]


def lines(runs: Sequence[Run], *, first_region: int = 0) -> list[Line]:
    """The lines of a page: columns one after the other, tables as rows."""
    rows = _rows(_without_initials([run for run in runs if run.text.strip()]))
    return _laid(rows, first_region, depth=0)[0]


def _laid(rows: list[_Row], region: int, *, depth: int) -> tuple[list[Line], int]:
    """The lines of rows, and the number of the last region; columns may hold tables."""
    found: list[Line] = []
    was_plain = False
    for band, gutters in _bands(rows):
        is_plain = not gutters or _is_single(band)
        region += not (is_plain and was_plain)
        was_plain = is_plain
        columns = _columns(band, gutters)
        if is_plain or depth > _MOST_NESTED:
            found += [_line(row.segments, region) for row in band]
        elif _are_columns(columns):
            for column in _in_order(columns):
                inside, region = _laid([_Row(segments) for segments in column if segments], region, depth=depth + 1)
                found += inside
        else:
            found += _table(band, _columns(band, _with_outer(band, gutters)), region)
    return found, region


def _without_initials(runs: list[Run]) -> list[Run]:
    """The runs with each large first letter, beside which several lines start, as a part of the first of them."""
    usual = median(run.size for run in runs) if runs else 0.0
    kept = []
    for run in runs:
        beside = [other for other in runs if _starts_beside(run, other)] if _is_initial(run, usual) else []
        if len(beside) > 1:
            first = max(beside, key=lambda other: other.middle)
            first.text = run.text + first.text
        else:
            kept.append(run)
    return kept


def _is_initial(run: Run, usual: float) -> bool:
    return len(run.text) == 1 and run.text.isalpha() and run.size > 1.8 * usual


def _starts_beside(initial: Run, run: Run) -> bool:
    is_near = -0.1 * run.size < run.left - initial.right < run.size
    return is_near and run.size < 0.6 * initial.size and initial.bottom < run.middle < initial.top


def _rows(runs: list[Run]) -> list[_Row]:
    """Runs of the same height together, from top to bottom."""
    rows: list[list[Run]] = []
    main: Run | None = None
    for run in sorted(runs, key=lambda run: (-run.middle, run.left)):
        if main is not None and _is_beside(rows[-1], main, run):
            rows[-1].append(run)
            if run.size > main.size:
                main = run
        else:
            rows.append([run])
            main = run
    return [_Row(_segments(row)) for row in rows]


def _is_beside(row: list[Run], main: Run, run: Run) -> bool:
    """Whether a run belongs to the row; one far to the side may stand higher or lower, as in another column."""
    distance, size = abs(main.middle - run.middle), max(main.size, run.size)
    if distance < 0.5 * size:
        return True
    apart = (other.right + size < run.left or run.right + size < other.left for other in row)
    return distance < 0.75 * size and all(apart)


def _segments(runs: list[Run]) -> list[Run]:
    """The runs of a row, those close to each other united."""
    found: list[Run] = []
    for run in sorted(runs, key=lambda run: run.left):
        last = found[-1] if found else None
        size = min(run.size, last.size) if last else 0
        if last is None or run.left - last.right > 0.9 * size:
            found.append(Run(run.text, run.left, run.bottom, run.right, run.top, run.order))
            continue
        if run.text == last.text and abs(run.left - last.left) < 0.1 * size:  # drawn twice to look bold
            continue
        space = " " if run.left - last.right > 0.15 * size else ""
        last.text += space + _raised(last, run)
        last.right, last.bottom = max(last.right, run.right), min(last.bottom, run.bottom)
        last.top = max(last.top, run.top) if run.size >= last.size else last.top
    return found


def _raised(last: Run, run: Run) -> str:
    """A small raised number keeps its sense: 10^6 is not 106."""
    is_small = run.size < 0.8 * last.size and run.bottom > last.bottom + 0.15 * last.size
    is_number = re.fullmatch(r"[+\-−–]?\d+", run.text) is not None
    if not is_small or not is_number:
        return run.text
    if last.text[-1:].isalnum():
        return f"^{run.text}"
    return f"[{run.text}]" if last.text[-1:] in _SENTENCE_SIGNS else run.text  # leads to a note


def _text(segments: Sequence[Run]) -> str:
    """The segments in the order of reading; the dots that lead to a page's number are one sign."""
    return _LEADERS.sub(" … ", logical(" ".join(segment.text.strip() for segment in segments))).strip()


def _bands(rows: list[_Row]) -> list[tuple[list[_Row], list[Gutter]]]:
    """Rows one below the other that have the same gutters; rows of running text have none."""
    bands: list[tuple[list[_Row], list[Gutter]]] = []
    band: list[_Row] = []
    gutters: list[Gutter] = []
    for row in rows:
        own = _gaps(row)
        common = _common(gutters, row) if gutters and not _is_far(band, row) else []
        if band and (common if gutters else not own):
            gutters = common
        elif band:
            bands.append((band, gutters))
            band, gutters = [], own
        else:
            gutters = own
        band.append(row)
    return [*bands, (band, gutters)] if band else bands


def _is_far(band: list[_Row], row: _Row) -> bool:
    """Whether a row stands so far below the band that it is something else."""
    pitches = [above.middle - below.middle for above, below in pairwise(band[-9:])]
    pitch = median(pitches) if pitches else 2 * row.size
    return band[-1].middle - row.middle > 2.2 * pitch


def _gaps(row: _Row) -> list[Gutter]:
    return [(left.right, right.left) for left, right in pairwise(row.segments)][:_MOST_COLUMNS]


def _common(gutters: list[Gutter], row: _Row) -> list[Gutter]:
    """What is left of the gutters beside the segments of one more row; none if one of them is crossed."""
    edges = [float("-inf"), *(edge for segment in row.segments for edge in (segment.left, segment.right)), float("inf")]
    free = list(zip(edges[::2], edges[1::2], strict=True))
    found = []
    for left, right in gutters:
        pieces = [(max(left, low), min(right, high)) for low, high in free]
        low, high = max(pieces, key=lambda piece: piece[1] - piece[0])
        if high - low >= _NARROWEST_GUTTER * row.size:
            found.append((low, high))
    # A row that crosses a gutter between others, as a heading over two cells does, ends what was common.
    return found if len(found) == len(gutters) else []


def _is_single(band: list[_Row]) -> bool:
    return sum(len(row.segments) > 1 for row in band) < 2


def _with_outer(band: list[_Row], gutters: list[Gutter]) -> list[Gutter]:
    """The gutters of a table, with those beside a column that its first row has no cell in, as above row titles."""
    edges = sorted((segment.left, segment.right) for row in band for segment in row.segments)
    spans = [edges[0]]
    for left, right in edges[1:]:
        if left - spans[-1][1] >= _NARROWEST_GUTTER * band[0].size:
            spans.append((left, right))
        else:
            spans[-1] = spans[-1][0], max(spans[-1][1], right)
    free = [(one[1], other[0]) for one, other in pairwise(spans)][:_MOST_COLUMNS]
    columns = _columns(band, free)
    is_filled = all(2 * sum(map(bool, column)) >= len(band) for column in columns)
    return free if len(free) > len(gutters) and is_filled else gutters


def _columns(band: list[_Row], gutters: list[Gutter]) -> list[list[list[Run]]]:
    """For each column the segments that each row has in it."""
    edges = [float("-inf"), *((left + right) / 2 for left, right in gutters), float("inf")]
    spans = list(pairwise(edges))
    return [[[s for s in row.segments if low <= (s.left + s.right) / 2 < high] for row in band] for low, high in spans]


def _are_columns(columns: list[list[list[Run]]]) -> bool:
    """Whether these are columns of running text rather than the cells of a table."""
    texts = [[segments for segments in column if segments] for column in columns]
    if len(texts) > 4 or any(len(column) < 2 for column in texts):
        return False
    if all(_words(column) >= 3 and _fullness(column) > 0.7 for column in texts):
        return True
    orders = [[segment.order for segments in column for segment in segments] for column in texts]
    in_turn = all(max(one) < min(other) for one, other in pairwise(orders))
    return in_turn and all(len(column) > 2 and _words(column) >= 2 for column in texts)


def _words(column: list[list[Run]]) -> float:
    """How many words a line of the column has; for scripts without spaces four characters count as one."""
    return median(count_words(" ".join(segment.text for segment in segments)) for segments in column)


def count_words(text: str) -> float:
    dense = len(re.findall(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", text))
    return (
        dense / 4
        + len(re.findall(r"[^\W\d_\u3040-\u30ff\u3400-\u9fff]{2,}", text))
        + len(re.findall(r"\b\w\b", text)) / 2
    )


def _fullness(column: list[list[Run]]) -> float:
    """How wide a line is on average, as a share of the widest."""
    widths = [segments[-1].right - segments[0].left for segments in column]
    return mean(widths) / max(max(widths), 1e-6)


def _in_order(columns: list[list[list[Run]]]) -> list[list[list[Run]]]:
    """Columns as they are read: from the right where the text is."""
    text = " ".join(segment.text for column in columns for segments in column for segment in segments)
    return columns[::-1] if runs_right_to_left(text) else columns


def _line(segments: list[Run], region: int) -> Line:
    text = _text(segments)
    bottom, top = _heights(segments)
    return Line(text, segments[0].left, bottom, segments[-1].right, top, region)


def _table(band: list[_Row], columns: list[list[list[Run]]], region: int) -> list[Line]:
    """The rows of a table; a row whose first cell is empty goes on with the cells of the row above."""
    ordered = _in_order(columns)
    found: list[tuple[_Row, list[str]]] = []
    for number, row in enumerate(band):
        cells = [_text(column[number]) for column in ordered]
        above = found[-1] if found else None
        if above and _goes_on(above[0], above[1], row, cells):
            joined = [" ".join(filter(None, pair)) for pair in zip(above[1], cells, strict=True)]
            found[-1] = (row, joined)
        else:
            found.append((row, cells))
    made = []
    for row, cells in found:
        bottom, top = _heights(row.segments)
        made.append(Line(table_row(cells), row.segments[0].left, bottom, row.segments[-1].right, top, region, True))
    return made


def _goes_on(above: _Row, before: list[str], row: _Row, cells: list[str]) -> bool:
    is_close = above.middle - row.middle < 1.4 * row.size
    filled = [(one, other) for one, other in zip(before, cells, strict=True) if other]
    is_text = all(one and not re.fullmatch(r"[\W\d]*", other) for one, other in filled)
    return is_close and not cells[0] and bool(before[0]) and is_text


def _heights(segments: list[Run]) -> tuple[float, float]:
    """The bottom and top of the largest segment."""
    largest = max(segments, key=lambda segment: segment.size)
    return largest.bottom, largest.top
