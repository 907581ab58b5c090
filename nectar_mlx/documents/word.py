"""Word documents (DOCX, also of the strict kind): all that is shown, with changes accepted."""

import re
from collections import Counter
from collections.abc import Iterable

from nectar_mlx.documents import blocks, formula
from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local
from nectar_mlx.documents.charts import chart
from nectar_mlx.documents.numbering import Numbering, Style, outline, styles
from nectar_mlx.documents.office import Relations, main_part, relations
from nectar_mlx.documents.reading import Document, Inner, Unreadable, told
from nectar_mlx.documents.word_signs import SIGNS, form_field, instructions, is_hidden, is_raised, raised, symbol

# Fallback repeats what Choice holds; moved text is read where it went; the rest is not shown.
_NOT_SHOWN = {"Fallback", "moveFrom", "del", "pPr", "rPr", "tblPr", "trPr", "tcPr", "sectPr", "instrText", "delText"}
_NOTES = ("footnotes", "endnotes", "comments")
_MOST_COLUMNS = 63  # of a table, as in Word


def read_docx(data: bytes, name: str, *, inner: Inner) -> Document:
    """A Word document: headers, body, footers, then footnotes, endnotes and comments; `inner` reads documents in it."""
    archive = Archive(data, "DOCX")
    main = main_part(archive, "word/document.xml")
    parts = relations(archive, main)
    writer = _Writer(archive, parts, inner)
    body = child(archive.xml(main), "body")
    sections = [writer.part(body)] if body is not None else []
    for kind in ("header", "footer", *_NOTES):
        texts = []
        for path in sorted({path for other, path in parts.values() if other == kind} | _default(archive, kind)):
            try:
                texts += [text for text in writer.part(archive.xml(path)) if text not in texts]
            except Unreadable as error:
                writer.left_out[f"{kind}: {error}"] += 1
        # A header that only numbers pages is no text.
        texts = [text for text in texts if any(character.isalpha() for character in text)]
        sections.insert(0, texts) if kind == "header" else sections.append(texts)
    text = blocks.joined([block for section in sections for block in section])
    left_out = told(writer.left_out)
    if writer.pictures:
        left_out.append(f"{writer.pictures} picture{'s' * (writer.pictures > 1)}")
    return Document("docx", text, left_out=left_out)


def _default(archive: Archive, kind: str) -> set[str]:
    """The usual place of the notes, for files that do not say where theirs are."""
    path = archive.find(f"word/{kind}.xml") if kind in _NOTES else ""
    return {path} if path else set()


def _optional(archive: Archive, parts: Relations, kind: str) -> Element | None:
    """The root of the part of a kind, or of the one at its usual place."""
    path = next((path for other, path in parts.values() if other == kind), "") or archive.find(f"word/{kind}.xml")
    return archive.xml(path) if path else None


class _Writer:
    """Turns the elements of a part into blocks; each element is visited once."""

    def __init__(self, archive: Archive, parts: Relations, inner: Inner) -> None:
        self.pictures = 0
        self.left_out: Counter[str] = Counter()
        self._archive = archive
        self._parts = parts
        self._inner = inner
        self._styles = styles(_optional(archive, parts, "styles"))
        self._numbering = Numbering(_optional(archive, parts, "numbering"))
        self._instructions: set[int] = set()
        self._carried: list[str] = []  # of a paragraph whose end was deleted: the next one goes on with it

    def part(self, root: Element) -> list[str]:
        """The blocks of a whole part."""
        self._instructions = instructions(root)
        return self._blocks(root)

    def _blocks(self, parent: Element) -> list[str]:
        found: list[str] = []
        for element in parent:
            tag = local(element)
            if tag == "p":
                found += self._paragraph(element)
            elif tag == "tbl":
                found.append(blocks.table(self._rows(element)))
            elif tag in ("footnote", "endnote", "comment"):
                found += self._note(element)
            elif tag == "altChunk":
                found += self._chunk(element)
            elif tag not in _NOT_SHOWN and not _is_prompt(element):
                found += self._blocks(element)
        rest, self._carried = "".join(self._carried).strip(), []
        return [*found, rest] if rest else found

    def _note(self, note: Element) -> list[str]:
        if attribute(note, "type", "normal") != "normal":  # the line above the notes
            return []
        text = " ".join(self._blocks(note)).strip()
        number = attribute(note, "id")
        return [f"[{number}] {text}" if number else text] if text else []

    def _chunk(self, chunk: Element) -> list[str]:
        """A document of another kind that Word shows at this place."""
        path = self._parts.get(attribute(chunk, "id"), ("", ""))[1]
        if not path:
            self.left_out["an inserted document that the file does not hold"] += 1
            return []
        try:
            document = self._inner(self._archive.read(path), path)
        except Unreadable as error:
            self.left_out[f"inserted document {path}: {error}"] += 1
            return []
        for note in document.left_out:
            self.left_out[f"inserted document {path}: {note}"] += 1
        return [document.text]

    def _rows(self, table: Element) -> list[list[str]]:
        rows: list[list[str]] = []
        for row in self._inside(table, "tr"):
            cells = [""] * _count(child(row, "trPr", "gridBefore"), 0)
            for cell in self._inside(row, "tc"):
                cells += [self._cell(cell), *[""] * (_count(child(cell, "tcPr", "gridSpan"), 1) - 1)]
            rows.append(cells)
        return rows

    def _inside(self, parent: Element, tag: str) -> Iterable[Element]:
        """The rows of a table or the cells of a row, also those in content controls and in accepted changes."""
        for element in parent:
            if local(element) == tag:
                if child(element, "trPr", "del") is None and child(element, "tcPr", "cellDel") is None:
                    yield element
            elif local(element) in ("sdt", "sdtContent", "customXml", "ins", "moveTo"):
                yield from self._inside(element, tag)

    def _cell(self, cell: Element) -> str:
        """A cell in one line; the rows of a table in it are set apart."""
        lines = [line for block in self._blocks(cell) for line in block.split("\n")]
        lines = [line.replace(" | ", ", ").strip() for line in lines if line.strip()]
        return ("; " if child(cell, "tbl") is not None else " ").join(lines)

    def _paragraph(self, paragraph: Element) -> list[str]:
        boxes: list[str] = []
        properties = child(paragraph, "pPr")
        mark = child(properties, "rPr")
        self._carried += self._runs(paragraph, boxes)
        if child(mark, "del") is not None or child(mark, "moveFrom") is not None:
            return boxes
        text, self._carried = "".join(self._carried).strip(), []
        return [self._marked(text, properties), *boxes] if text else boxes

    def _marked(self, text: str, properties: Element | None) -> str:
        """The text of a paragraph as a heading or an item of a list, with its number."""
        named = child(properties, "pStyle")
        style_id = "" if named is None else attribute(named, "val")
        style = self._styles.get(style_id, Style())
        marker = self._numbering.marker(properties, style, style_id)
        level = outline(properties) or style.heading
        if level:
            number = f"{marker[0]} " if marker and marker[0] not in ("", "-") else ""
            return blocks.heading(level, number + " ".join(text.split()))
        return blocks.item(marker[1], text, marker[0]) if marker and marker[0] else text

    def _runs(self, element: Element, boxes: list[str]) -> Iterable[str]:
        """The text of a paragraph; the blocks of text boxes go to `boxes`."""
        for item in element:
            tag = local(item)
            if id(item) in self._instructions:
                continue
            if tag == "t":
                yield item.text or ""
            elif tag in SIGNS:
                yield SIGNS[tag]
            elif tag == "sym":
                yield symbol(item)
            elif tag == "fldChar":
                yield form_field(item)
            elif tag == "ruby":
                above = "".join(text for rt in children(item, "rt") for text in self._runs(rt, boxes))
                base = "".join(text for below in children(item, "rubyBase") for text in self._runs(below, boxes))
                yield f"{base}({above})" if above.strip() else base
            elif tag in ("oMath", "oMathPara"):
                yield formula.tidy(formula.math_line(item))
            elif tag == "txbxContent":
                boxes += self._apart(item)
            elif tag in ("footnoteReference", "endnoteReference"):
                yield f"[{attribute(item, 'id')}]"
            elif (tag == "r" and is_hidden(item)) or _is_prompt(item):
                continue
            elif tag == "r" and is_raised(item):
                yield raised("".join(self._runs(item, boxes)))
            elif tag in ("drawing", "pict", "object"):
                yield from self._drawing(item, boxes)
            elif tag not in _NOT_SHOWN:
                yield from self._runs(item, boxes)

    def _apart(self, box: Element) -> list[str]:
        """The blocks of a text box, which the text around it does not go on with."""
        carried, self._carried = self._carried, []
        found = self._blocks(box)
        self._carried = carried
        return found

    def _drawing(self, drawing: Element, boxes: list[str]) -> Iterable[str]:
        """The text of a drawing: of its boxes, of a diagram or chart, or the description of a picture."""
        for item in drawing.iter():
            tag = local(item)
            if tag in ("pic", "imagedata"):
                self.pictures += 1
            elif tag == "docPr" and (description := attribute(item, "descr")):
                yield f"[{' '.join(description.split())}]"
            elif tag == "textpath" and (text := attribute(item, "string")):
                boxes.append(text)
            elif tag == "relIds":
                boxes += self._diagram(attribute(item, "dm"))
            elif tag == "chart" and (path := self._parts.get(attribute(item, "id"), ("", ""))[1]):
                boxes.append(chart(self._archive.xml(path)))
            elif tag == "OLEObject" and attribute(item, "Type") != "Link":
                self.left_out[f"an embedded object ({attribute(item, 'ProgID') or 'of no named kind'})"] += 1
        yield from self._runs(drawing, boxes)

    def _diagram(self, relation: str) -> list[str]:
        path = self._parts.get(relation, ("", ""))[1]
        if not path:
            return []
        points = (item for item in self._archive.xml(path).iter() if local(item) == "pt")
        texts = ("".join(item.text or "" for item in point.iter() if local(item) == "t") for point in points)
        return [text for text in texts if text.strip()]


def _is_prompt(element: Element) -> bool:
    """Whether a content control is still empty and shows what to enter."""
    return local(element) == "sdt" and child(element, "sdtPr", "showingPlcHdr") is not None


def _count(element: Element | None, default: int) -> int:
    """A number of columns."""
    given = "" if element is None else attribute(element, "val")
    return min(int(given), _MOST_COLUMNS) if re.fullmatch(r"[0-9]{1,9}", given) else default
