"""Excel workbooks (XLSX): each sheet as rows, with the values that Excel stored."""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

from nectar_mlx.documents import blocks
from nectar_mlx.documents.archive import Archive
from nectar_mlx.documents.reading import Document, Places, Unreadable

if TYPE_CHECKING:
    from openpyxl.workbook import Workbook

MOST_CELLS = 1 << 21


class Cell(Protocol):
    """What is used of a cell."""

    @property
    def value(self) -> object: ...
    @property
    def number_format(self) -> str: ...


def read_xlsx(data: bytes, name: str) -> Document:
    """A workbook with a place for each sheet; a formula without a stored value is shown as it is written."""
    has_formulas = _check(Archive(data, "XLSX"))
    values = _workbook(data, values=True)
    formulas = _workbook(data, values=False).worksheets if has_formulas else repeat(None)
    document, places = Document("xlsx", ""), Places("sheet")
    budget = MOST_CELLS
    for sheet, written in zip(values.worksheets, formulas, strict=False):
        sheet.reset_dimensions()
        if written is not None:
            written.reset_dimensions()
        rows = []
        for cells in _rows(sheet.iter_rows(), written.iter_rows() if written is not None else repeat(())):
            budget -= len(cells)
            if budget < 0:
                document.left_out.append(f"sheet {sheet.title}: cells after the first {MOST_CELLS:,} of the file")
                break
            rows.append(cells)
        if inside := blocks.table(rows):
            places.add(sheet.title, f"## Sheet {sheet.title}\n\n{inside}")
    document.left_out += [f"sheet {chart.title}: a chart" for chart in values.chartsheets]
    document.text, document.places = places.result()
    return document


def _check(archive: Archive) -> bool:
    """Refuses what a workbook should not hold; returns whether there are formulas in it."""
    archive.check_size()
    if not archive.find("xl/workbook.xml") and not any("workbook" in path.casefold() for path in archive.names()):
        raise Unreadable("not an XLSX file: it has no workbook")
    has_formulas = False
    for path in archive.names():
        if not path.endswith((".xml", ".rels")):
            continue
        content = archive.read(path)
        if re.search(rb"<!(?:DOCTYPE|ENTITY)", content[:4096].replace(b"\0", b"")):
            raise Unreadable(f"the XLSX file ({path}) defines XML entities, which no such file needs")
        has_formulas = has_formulas or re.search(rb"<(?:\w+:)?f[ >/]", content) is not None
    return has_formulas


def _workbook(data: bytes, *, values: bool) -> "Workbook":
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that only matter when the file is written again
        return openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=values)


def _rows(rows: Iterable[Sequence[Cell]], formulas: Iterable[Sequence[Cell]]) -> Iterator[list[str]]:
    for cells, written in zip(rows, formulas, strict=False):
        if not cells and not written:
            continue
        texts = [_shown(cell) for cell in cells]
        for position, cell in enumerate(written):
            if position < len(texts) and not texts[position] and cell.value is not None:
                texts[position] = str(cell.value)
        yield texts


def _shown(cell: Cell) -> str:
    """The value as a reader would write it: whole numbers without a point, per cent as such, ISO dates."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        if "%" in (cell.number_format or ""):
            return f"{value * 100:.10g}%"
        return format(value, ".15g") if isinstance(value, float) else str(value)
    if isinstance(value, datetime):
        midnight = value.time() == time()
        return value.date().isoformat() if midnight else value.isoformat(" ", "minutes")
    if isinstance(value, date | time | timedelta):
        return str(value)
    return str(value)
