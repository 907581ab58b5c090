"""Excel workbooks (XLSX): each sheet as rows, with the values that Excel stored."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

from nectar_mlx.documents import blocks
from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local
from nectar_mlx.documents.cells import shown
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
    titles, hidden = _titles(archive)
    document, places = Document("xlsx", ""), Places("sheet")
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
    paths = {title: path for path, title in titles.items()}
    for sheet, written in zip(values.worksheets, formulas, strict=False):
        rows, budget = _read_sheet(sheet, written, document, budget)
        inside = blocks.joined([blocks.table(rows), *_beside(archive, paths.get(sheet.title, ""), document.left_out)])
        if inside:
            heading = f"## Sheet {sheet.title}{' (hidden)' if sheet.title in hidden else ''}"
            places.add(sheet.title, f"{heading}\n\n{inside}")
    document.left_out += [f"sheet {chart.title}: a chart" for chart in values.chartsheets]
    held = {sheet.title for sheet in (*values.worksheets, *values.chartsheets)}
    document.left_out += [f"sheet {title}: the file does not hold it" for title in titles.values() if title not in held]
    document.text, document.places = places.result()
    return document


def _read_sheet(sheet: Sheet, written: Sheet | None, document: Document, budget: int) -> tuple[list[list[str]], int]:
    """The rows of a sheet, as far as it can be read, and how many more cells may be read."""
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
    return rows, budget


def _beside(archive: Archive, path: str, left_out: list[str]) -> list[str]:
    """The comments and the boxes of a sheet."""
    found: list[str] = []
    if not archive.find(path):
        return found
    for kind, part in sorted(set(relations(archive, path).values())):
        try:
            if kind in ("comments", "threadedComment") and part:
                found += _comments(archive.xml(part))
            elif kind == "drawing" and part:
                boxes = ([*item.iter()] for item in archive.xml(part).iter() if local(item) == "sp")
                found += ["".join(item.text or "" for item in box if local(item) == "t") for box in boxes]
        except Unreadable as error:
            left_out.append(f"{kind}: {error}")
    return found


def _comments(root: Element) -> list[str]:
    """Each with its cell; what newer programs write for older ones is left aside."""
    found = []
    for comment in (item for item in root.iter() if local(item) in ("comment", "threadedComment")):
        text = " ".join("".join(item.text or "" for item in comment.iter() if local(item) in ("t", "text")).split())
        if text and not text.startswith("[Threaded comment]"):
            found.append(f"Comment {attribute(comment, 'ref')}: {text}")
    return found


def _titles(archive: Archive) -> tuple[dict[str, str], set[str]]:
    """The sheets' titles by the paths of their parts, "?1" and so on for parts that the file does not hold; and the
    titles of those that are hidden."""
    main = main_part(archive, "xl/workbook.xml")
    if not archive.find(main):
        raise Unreadable("not an XLSX file: it has no workbook")
    parts, titles, hidden = relations(archive, main), dict[str, str](), set[str]()
    for number, sheet in enumerate(children(child(archive.xml(main), "sheets"), "sheet"), 1):
        reference = next((value for key, value in sheet.attrib.items() if key.endswith("}id")), "")
        path = parts.get(reference, ("", ""))[1]
        titles[path or f"?{number}"] = title = attribute(sheet, "name", str(number))
        if attribute(sheet, "state", "visible") != "visible":
            hidden.add(title)
    return titles, hidden


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
        texts = [shown(cell.value, cell.number_format) for cell in cells]
        for position, cell in enumerate(written):
            if position < len(texts) and not texts[position] and cell.value is not None:
                texts[position] = str(cell.value)
        yield texts
