"""Excel workbooks (XLSX): each sheet as rows, with the values that Excel stored."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

from nectar_mlx.documents import blocks
from nectar_mlx.documents.archive import Archive, attribute, child, children
from nectar_mlx.documents.office import main_part, relations
from nectar_mlx.documents.reading import Document, Places, Unreadable

if TYPE_CHECKING:
    from openpyxl.workbook import Workbook

MOST_CELLS = 1 << 21
_BLANK = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData/></worksheet>'


class Cell(Protocol):
    """What is used of a cell."""

    @property
    def value(self) -> object: ...
    @property
    def number_format(self) -> str: ...


class Sheet(Protocol):
    """What is used of a sheet."""

    @property
    def title(self) -> str: ...
    def reset_dimensions(self) -> None: ...
    def iter_rows(self) -> Iterable[Sequence[Cell]]: ...


def read_xlsx(data: bytes, name: str) -> Document:
    """A workbook with a place for each sheet; a formula without a stored value is shown as it is written.

    A damaged sheet is named, and costs no other one.
    """
    archive = Archive(data, "XLSX")
    titles, document, places = _titles(archive), Document("xlsx", ""), Places("sheet")
    has_formulas, damaged = _check(archive, titles)
    if not damaged:
        try:
            values = _workbook(data, values=True)
        except Exception:  # as many kinds of error as there are ways to damage a sheet
            damaged = _not_xml(archive, titles)
            if not damaged:
                raise
    if damaged:
        document.left_out += [f"sheet {titles[path]}: damaged" for path in damaged]
        data = _with_blank(archive, damaged)
        values = _workbook(data, values=True)
    formulas = _workbook(data, values=False).worksheets if has_formulas else repeat(None)
    budget = MOST_CELLS
    for sheet, written in zip(values.worksheets, formulas, strict=False):
        budget = _read_sheet(sheet, written, document, places, budget)
    document.left_out += [f"sheet {chart.title}: a chart" for chart in values.chartsheets]
    held = {sheet.title for sheet in (*values.worksheets, *values.chartsheets)}
    document.left_out += [f"sheet {title}: the file does not hold it" for title in titles.values() if title not in held]
    document.text, document.places = places.result()
    return document


def _read_sheet(sheet: Sheet, written: Sheet | None, document: Document, places: Places, budget: int) -> int:
    """Adds a sheet, as far as it can be read; returns how many more cells may be read."""
    rows: list[list[str]] = []
    try:
        sheet.reset_dimensions()
        if written is not None:
            written.reset_dimensions()
        for cells in _rows(sheet.iter_rows(), written.iter_rows() if written is not None else repeat(())):
            budget -= len(cells)
            if budget < 0:
                document.left_out.append(f"sheet {sheet.title}: cells after the first {MOST_CELLS:,} of the file")
                break
            rows.append(cells)
    except Exception:  # as above
        document.left_out.append(f"sheet {sheet.title}: damaged{f' after row {len(rows)}' if rows else ''}")
    if inside := blocks.table(rows):
        places.add(sheet.title, f"## Sheet {sheet.title}\n\n{inside}")
    return budget


def _titles(archive: Archive) -> dict[str, str]:
    """The sheets' titles by the paths of their parts; "?1" and so on for parts that the file does not hold."""
    main = main_part(archive, "xl/workbook.xml")
    if not archive.find(main):
        raise Unreadable("not an XLSX file: it has no workbook")
    parts, titles = relations(archive, main), dict[str, str]()
    for number, sheet in enumerate(children(child(archive.xml(main), "sheets"), "sheet"), 1):
        reference = next((value for key, value in sheet.attrib.items() if key.endswith("}id")), "")
        path = parts.get(reference, ("", ""))[1]
        titles[path or f"?{number}"] = attribute(sheet, "name", str(number))
    return titles


def _check(archive: Archive, titles: Mapping[str, str]) -> tuple[bool, list[str]]:
    """Refuses what a workbook should not hold. Returns whether there are formulas in it, and which sheets' parts cannot
    be unpacked."""
    archive.check_size()
    has_formulas, damaged = False, list[str]()
    for path in archive.names():
        if not path.endswith((".xml", ".rels")):
            continue
        try:
            content = archive.read(path)
        except Unreadable:
            if path not in titles:
                raise
            damaged.append(path)
            continue
        if re.search(rb"<!(?:DOCTYPE|ENTITY)", content[:4096].replace(b"\0", b"")):
            raise Unreadable(f"the XLSX file ({path}) defines XML entities, which no such file needs")
        has_formulas = has_formulas or re.search(rb"<(?:\w+:)?f[ >/]", content) is not None
    return has_formulas, damaged


def _not_xml(archive: Archive, titles: Mapping[str, str]) -> list[str]:
    """The parts of sheets that are no XML."""
    damaged = []
    for path in titles:
        try:
            if archive.find(path):
                archive.xml(path)
        except Unreadable:
            damaged.append(path)
    return damaged


def _with_blank(archive: Archive, damaged: Sequence[str]) -> bytes:
    """The file with blank sheets in the place of damaged ones."""
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as file:
        for path in archive.names():
            file.writestr(path, _BLANK if path in damaged else archive.read(path))
    return rebuilt.getvalue()


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
