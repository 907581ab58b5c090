"""OpenDocument files: texts (ODT), sheets (ODS) and presentations (ODP)."""

import re
from collections.abc import Iterable

from nectar_mlx.documents import blocks, formula
from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local, parse_xml
from nectar_mlx.documents.opendocument_styles import Styles, is_hidden
from nectar_mlx.documents.reading import Document, Place, Places, Unreadable
from nectar_mlx.documents.word_signs import raised

_NOT_SHOWN = {
    "tracked-changes",
    "settings",
    "forms",
    "sequence-decls",
    "variable-decls",
    "user-field-decls",
    "date-time",
}
_MOST_REPEATS = 1000  # of a cell or a row; a sheet's empty rest is one cell repeated
_MOST_REPEATED = 1 << 22  # characters that repeats may add


def read_opendocument(data: bytes, name: str) -> Document:
    """An OpenDocument file of any kind."""
    archive = None if re.match(rb"[\s\xef\xbb\xbf]*<", data[:100]) else Archive(data, "OpenDocument")
    if archive is None:
        root, styles = parse_xml(data, "flat OpenDocument file"), None
    else:
        manifest = archive.find("META-INF/manifest.xml")
        if manifest and b"manifest:algorithm" in archive.read(manifest):
            raise Unreadable("the OpenDocument file is encrypted")
        root = archive.xml("content.xml")
        styles = archive.xml("styles.xml") if archive.find("styles.xml") else None
    body = child(root, "body")
    content = next(iter(body), None) if body is not None else None
    writer = _Writer(archive, Styles([root] if styles is None else [styles, root]))
    if content is None:
        raise Unreadable("the OpenDocument file has no contents")
    kind = {"spreadsheet": "ods", "presentation": "odp"}.get(local(content), "odt")
    if kind == "ods":
        text, places = _sheets(writer, content)
    elif kind == "odp":
        text, places = _slides(writer, content)
    else:
        margins = [_margins(root if styles is None else styles, writer, margin) for margin in ("header", "footer")]
        text, places = blocks.joined([*margins[0], *writer.blocks(content), *margins[1], *writer.notes]), []
    return Document(kind, text, places, writer.left_out())


def _margins(styles: Element, writer: "_Writer", kind: str) -> list[str]:
    """The texts of the headers or footers, which the styles hold."""
    found = (item for pages in styles.iter() if local(pages) == "master-page" for item in children(pages, kind))
    texts = dict.fromkeys(text for item in found for text in writer.blocks(item))
    return [text for text in texts if any(character.isalpha() for character in text)]


def _sheets(writer: "_Writer", content: Element) -> tuple[str, list[Place]]:
    places = Places("sheet")
    for number, sheet in enumerate(children(content, "table"), 1):
        name = attribute(sheet, "name") or str(number)
        if inside := writer.table(sheet):
            places.add(name, f"## Sheet {name}\n\n{inside}")
    return places.result()


def _slides(writer: "_Writer", content: Element) -> tuple[str, list[Place]]:
    places = Places("slide")
    for number, slide in enumerate(children(content, "page"), 1):
        places.add(str(number), f"## Slide {number}\n\n{blocks.joined(writer.blocks(slide))}".strip())
    return places.result()


class _Writer:
    """Turns elements into blocks; each is visited once, and repeated cells are bounded."""

    def __init__(self, archive: Archive | None, styles: Styles) -> None:
        self.notes: list[str] = []
        self._archive = archive
        self._styles = styles
        self._repeated = 0
        self._cut = False
        self._pictures = 0

    def left_out(self) -> list[str]:
        pictures = [f"{self._pictures} picture{'s' * (self._pictures > 1)}"] if self._pictures else []
        return pictures + (["repeats of cells, which would make too much text"] if self._cut else [])

    def blocks(self, parent: Iterable[Element]) -> list[str]:
        found: list[str] = []
        for element in parent:
            tag = local(element)
            if is_hidden(element):
                continue
            if tag in ("p", "h"):
                found += self._paragraph(element)
            elif tag == "list":
                found += self._list(element, "", 0)
            elif tag == "table":
                found.append(self.table(element))
            elif tag == "frame":
                found += self._frame(element)
            elif tag == "notes":
                found += [f"Notes: {text}" for text in self.blocks(element)]
            elif tag not in _NOT_SHOWN:
                found += self.blocks(element)
        return found

    def _list(self, element: Element, outer: str, depth: int) -> list[str]:
        """The items of a list, each with its number where the list's style has one."""
        style = attribute(element, "style-name") or outer
        found: list[str] = []
        number = 0
        for entry in element:
            number = self._styles.number(style, depth, entry, number) if local(entry) == "list-item" else number
            marker = self._styles.marker(style, depth, number) if local(entry) == "list-item" else ""
            for item in entry:
                if local(item) == "list":
                    found += self._list(item, style, depth + 1)
                    continue
                for block in self._paragraph(item) if local(item) in ("p", "h") else self.blocks([item]):
                    is_item = local(item) == "p" and marker
                    found.append(blocks.item(depth, block, marker) if is_item else block)
                    marker = marker and "-"
        return found

    def table(self, table: Element) -> str:
        rows: list[list[str]] = []
        for element in self._rows(table):
            cells = self._row(element)
            if any(cells):
                rows += [cells] * self._repeats(element, "number-rows-repeated", sum(map(len, cells)) + 3 * len(cells))
        return blocks.table(rows)

    def _rows(self, table: Element) -> Iterable[Element]:
        for element in table:
            if local(element) == "table-row":
                yield element
            elif local(element).startswith("table-") and local(element) != "table-columns":
                yield from self._rows(element)

    def _row(self, element: Element) -> list[str]:
        cells: list[str] = []
        for cell in element:
            if local(cell) in ("table-cell", "covered-table-cell"):
                lines = [line.replace(" | ", ", ") for block in self.blocks(cell) for line in block.split("\n")]
                text = ("; " if child(cell, "table") is not None else " ").join(lines)
                cells += [text] * self._repeats(cell, "number-columns-repeated", len(text))
        return cells

    def _repeats(self, element: Element, name: str, characters: int) -> int:
        """How often a cell or row is repeated, as far as all repeats together stay bounded."""
        given = attribute(element, name, "1")
        repeats = min(int(given), _MOST_REPEATS) if re.fullmatch(r"[0-9]{1,9}", given) else 1
        allowed = max(1, (_MOST_REPEATED - self._repeated) // (characters + 3))
        self._cut = self._cut or repeats > allowed
        repeats = min(repeats, allowed)
        self._repeated += (repeats - 1) * (characters + 3)
        return repeats

    def _paragraph(self, element: Element) -> list[str]:
        boxes: list[str] = []
        text = (element.text or "") + "".join(self._runs(element, boxes))
        text = re.sub(r"[ \t\r\n]*\n[ \t\r\n]*", "\n", text).strip()
        if not text:
            return boxes
        if local(element) == "h":
            level = attribute(element, "outline-level", "1")
            return [blocks.heading(int(level) if re.fullmatch(r"[0-9]", level) else 1, text), *boxes]
        return [text, *boxes]

    def _runs(self, element: Element, boxes: list[str]) -> Iterable[str]:
        for item in element:
            tag = local(item)
            if tag == "s":
                given = attribute(item, "c", "1")
                yield " " * (min(int(given), 100) if re.fullmatch(r"[0-9]{1,9}", given) else 1)
            elif tag == "tab":
                yield "\t"
            elif tag == "line-break":
                yield "\n"
            elif tag == "soft-hyphen":
                yield "\u00ad"
            elif tag == "note":
                yield self._note(item)
            elif tag == "annotation":
                self.notes += [f"Comment: {text}" for text in self.blocks(item)]
            elif tag == "frame" and (line := self._formula(item)):
                yield line
            elif tag in ("frame", "custom-shape", "text-box"):
                boxes += self._frame(item)
            elif tag == "span" and self._styles.is_raised(attribute(item, "style-name")):
                yield raised((item.text or "") + "".join(self._runs(item, boxes)))
            elif tag == "ruby-text":
                yield f"({''.join(item.itertext())})"
            elif tag not in _NOT_SHOWN and tag != "note-citation" and not is_hidden(item):
                yield item.text or ""
                yield from self._runs(item, boxes)
            yield item.tail or ""

    def _note(self, note: Element) -> str:
        sign = "".join(text for item in children(note, "note-citation") for text in item.itertext()).strip()
        texts = [text for body in children(note, "note-body") for text in self.blocks(body)]
        self.notes.append(f"[{sign}] {' '.join(texts)}")
        return f"[{sign}]"

    def _frame(self, frame: Element) -> list[str]:
        if line := self._formula(frame):
            return [line]
        if child(frame, "image") is not None and child(frame, "text-box") is None:
            self._pictures += 1
        return self.blocks(frame)

    def _formula(self, frame: Element) -> str:
        """The formula that a frame holds; empty for other objects."""
        for item in children(frame, "object"):
            if self._archive is None:
                break
            path = self._archive.find(attribute(item, "href").removeprefix("./") + "/content.xml")
            if path and local(root := self._archive.xml(path)) == "math":
                return formula.tidy(_line(root))
        return ""


def _line(element: Element) -> str:
    parts = [_line(part) for part in element] if len(element) else [(element.text or "").strip()]
    return formula.mathml(local(element), parts)
