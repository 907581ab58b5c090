"""Word documents (DOCX, also of the strict kind): all that is shown, with changes accepted."""

import re
from collections.abc import Iterable

from nectar_mlx.documents import blocks, formula
from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local
from nectar_mlx.documents.office import main_part, relations
from nectar_mlx.documents.reading import Document, Unreadable

# Fallback repeats what Choice holds; moved text is read where it went; the rest is not shown.
_NOT_SHOWN = {"Fallback", "moveFrom", "del", "pPr", "rPr", "tblPr", "trPr", "tcPr", "sectPr", "instrText", "delText"}
_NOTES = ("footnotes", "endnotes", "comments")
_SIGNS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "\u2011", "softHyphen": "\u00ad"}


def read_docx(data: bytes, name: str) -> Document:
    """A Word document: headers, body, footers, then footnotes, endnotes and comments."""
    archive = Archive(data, "DOCX")
    main = main_part(archive, "word/document.xml")
    parts = relations(archive, main)
    body = child(archive.xml(main), "body")
    left_out: list[str] = []
    styles = next((path for kind, path in parts.values() if kind == "styles"), archive.find("word/styles.xml"))
    writer = _Writer(_heading_levels(archive.xml(styles)) if styles else {}, parts, archive)
    sections = [writer.blocks(body)] if body is not None else []
    for kind in ("header", "footer", *_NOTES):
        texts = []
        for path in sorted({path for other, path in parts.values() if other == kind} | _default(archive, kind)):
            try:
                texts += [text for text in writer.blocks(archive.xml(path)) if text not in texts]
            except Unreadable as error:
                left_out.append(f"{kind}: {error}")
        # A header that only numbers pages is no text.
        texts = [text for text in texts if any(character.isalpha() for character in text)]
        sections.insert(0, texts) if kind == "header" else sections.append(texts)
    text = blocks.joined([block for section in sections for block in section])
    if writer.pictures:
        left_out.append(f"{writer.pictures} picture{'s' * (writer.pictures > 1)}")
    return Document("docx", text, left_out=left_out)


def _default(archive: Archive, kind: str) -> set[str]:
    """The usual place of the notes, for files that do not say where theirs are."""
    path = archive.find(f"word/{kind}.xml") if kind in _NOTES else ""
    return {path} if path else set()


def _heading_levels(styles: Element) -> dict[str, int]:
    """The level of each style that is a heading: the ids are translated, the names are not."""
    levels = {}
    for style in children(styles, "style"):
        name = child(style, "name")
        match = re.fullmatch(r"heading ([1-6])|title", "" if name is None else attribute(name, "val").lower())
        if match:
            levels[attribute(style, "styleId")] = int(match[1] or 1)
    return levels


class _Writer:
    """Turns the elements of a part into blocks; each element is visited once."""

    def __init__(self, headings: dict[str, int], parts: dict[str, tuple[str, str]], archive: Archive) -> None:
        self.pictures = 0
        self._headings = headings
        self._parts = parts
        self._archive = archive

    def blocks(self, parent: Element) -> list[str]:
        found: list[str] = []
        for element in parent:
            tag = local(element)
            if tag == "p":
                found += self._paragraph(element)
            elif tag == "tbl":
                found.append(blocks.table(self._rows(element)))
            elif tag in ("footnote", "endnote", "comment"):
                found += self._note(element)
            elif tag not in _NOT_SHOWN:
                found += self.blocks(element)
        return found

    def _note(self, note: Element) -> list[str]:
        if attribute(note, "type", "normal") != "normal":  # the line above the notes
            return []
        text = " ".join(self.blocks(note)).strip()
        number = attribute(note, "id")
        return [f"[{number}] {text}" if number else text] if text else []

    def _rows(self, table: Element) -> list[list[str]]:
        rows: list[list[str]] = []
        for element in self._inside(table, "tr"):
            rows.append([self._cell(cell) for cell in self._inside(element, "tc")])
        return rows

    def _inside(self, parent: Element, tag: str) -> Iterable[Element]:
        """The rows of a table or the cells of a row, also those in content controls and in accepted changes."""
        for element in parent:
            if local(element) == tag:
                if not (tag == "tr" and child(element, "trPr", "del") is not None):
                    yield element
            elif local(element) in ("sdt", "sdtContent", "customXml", "ins", "moveTo"):
                yield from self._inside(element, tag)

    def _cell(self, cell: Element) -> str:
        """A cell in one line; the rows of a table in it are set apart."""
        lines = [line for block in self.blocks(cell) for line in block.split("\n")]
        lines = [line.replace(" | ", ", ").strip() for line in lines if line.strip()]
        return ("; " if child(cell, "tbl") is not None else " ").join(lines)

    def _paragraph(self, paragraph: Element) -> list[str]:
        boxes: list[str] = []
        text = "".join(self._runs(paragraph, boxes)).strip()
        if not text:
            return boxes
        style = child(paragraph, "pPr", "pStyle")
        level = 0 if style is None else self._headings.get(attribute(style, "val"), 0)
        if level:
            return [blocks.heading(level, " ".join(text.split())), *boxes]
        numbering = child(paragraph, "pPr", "numPr")
        if numbering is None:
            return [text, *boxes]
        indent = child(numbering, "ilvl")
        depth = "0" if indent is None else attribute(indent, "val", "0")
        return [blocks.item(int(depth) if re.fullmatch(r"[0-9]{1,2}", depth) else 0, text), *boxes]

    def _runs(self, element: Element, boxes: list[str]) -> Iterable[str]:
        """The text of a paragraph; the blocks of text boxes go to `boxes`."""
        for item in element:
            tag = local(item)
            if tag == "t":
                yield item.text or ""
            elif tag in _SIGNS:
                yield _SIGNS[tag]
            elif tag == "sym":
                yield _symbol(item)
            elif tag in ("oMath", "oMathPara"):
                yield formula.tidy(math_line(item))
            elif tag == "txbxContent":
                boxes += self.blocks(item)
            elif tag in ("footnoteReference", "endnoteReference"):
                yield f"[{attribute(item, 'id')}]"
            elif tag == "r" and _is_hidden(item):
                continue
            elif tag == "r" and _is_raised(item):
                yield _raised("".join(self._runs(item, boxes)))
            elif tag in ("drawing", "pict", "object"):
                yield from self._drawing(item, boxes)
            elif tag not in _NOT_SHOWN:
                yield from self._runs(item, boxes)

    def _drawing(self, drawing: Element, boxes: list[str]) -> Iterable[str]:
        """The text of a drawing: of its boxes, of a diagram, or the description of a picture."""
        for item in drawing.iter():
            tag = local(item)
            if tag in ("pic", "imagedata"):
                self.pictures += 1
            elif tag == "docPr" and (description := attribute(item, "descr")):
                yield f"[{' '.join(description.split())}]"
            elif tag == "relIds":
                boxes += self._diagram(attribute(item, "dm"))
        yield from self._runs(drawing, boxes)

    def _diagram(self, relation: str) -> list[str]:
        path = self._parts.get(relation, ("", ""))[1]
        if not path:
            return []
        points = (item for item in self._archive.xml(path).iter() if local(item) == "pt")
        texts = ("".join(item.text or "" for item in point.iter() if local(item) == "t") for point in points)
        return [text for text in texts if text.strip()]


def _symbol(item: Element) -> str:
    """A character of a symbol font, where it is one that Unicode has a place for."""
    code = attribute(item, "char")
    if not re.fullmatch(r"[0-9A-Fa-f]{1,4}", code):
        return ""
    number = int(code, 16)
    return chr(number) if number >= 32 and not 0xD800 <= number <= 0xF8FF else "•"


def _properties(run: Element) -> dict[str, Element]:
    properties = child(run, "rPr")
    return {} if properties is None else {local(item): item for item in properties}


def _is_hidden(run: Element) -> bool:
    vanish = _properties(run).get("vanish")
    return vanish is not None and attribute(vanish, "val", "1") not in ("0", "false", "off")


def _is_raised(run: Element) -> bool:
    align = _properties(run).get("vertAlign")
    return align is not None and attribute(align, "val") == "superscript"


def _raised(text: str) -> str:
    """A raised number keeps its sense: 10^6 is not 106."""
    return f"^{text}" if re.fullmatch(r"[+\-−–\u2011]?\d+", text) else text


def math_line(element: Element) -> str:
    """An equation in one line."""
    tag = local(element)
    if tag in ("t", "delText"):
        return element.text or ""
    parts: dict[str, str] = {}
    inside: list[str] = []
    for item in element:
        name = local(item)
        if name.endswith("Pr"):
            signs = {local(sign): attribute(sign, "val") for sign in item if local(sign) in ("chr", "begChr", "endChr")}
            parts |= signs
            continue
        line = math_line(item)
        parts[name] = parts.get(name, "") + line
        inside.append(line)
    if tag == "oMathPara":
        return "\n".join(inside)
    separator = "," if tag == "d" else " " if tag == "mr" else "; " if tag in ("m", "eqArr") else ""
    return formula.omml(tag, parts, separator.join(inside))
