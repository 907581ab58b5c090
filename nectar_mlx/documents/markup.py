"""HTML, EPUB and DOCX as readable text: headings, lists and tables keep their shape in Markdown's signs."""

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

MAX_BYTES = 1 << 28
"""What may be unpacked of one document: far more than any book's text, far less than a zip bomb."""

_BLOCK = re.compile(
    "address|article|aside|blockquote|body|caption|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form|header"
    "|hr|html|main|nav|p|pre|section|summary|table|tbody|tfoot|thead"
)
_HEADING = re.compile("h([1-6])")
_HIDDEN = {"title", "script", "style", "noscript", "template", "svg", "math", "select", "button", "iframe", "object"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
_PACKAGE = "{http://www.idpf.org/2007/opf}"


class Unreadable(Exception):
    """The document holds no text that can be read; the message says why."""


def html_text(html: str) -> str:
    """The text that a page shows."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.text()


class _Page(HTMLParser):
    """Collects blocks of text; the one being read is a prefix (list marker, heading signs) and a line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._blocks: list[str] = []
        self._prefix = ""
        self._line = ""
        self._preformatted = False
        self._hidden: list[str] = []
        self._lists: list[int | None] = []
        self._row: list[str] | None = None
        self._in_cell = False

    def text(self) -> str:
        self._end_row()
        self._end_block()
        return re.sub(r"\n{3,}", "\n\n", "".join(self._blocks)).strip("\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden or tag in _HIDDEN:
            if tag not in _VOID:
                self._hidden.append(tag)
        elif tag == "br":
            self._line += "\n"
        elif tag in ("ul", "ol"):
            self._end_block("\n" if self._lists else "\n\n")
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self._end_block("\n")
            self._prefix = self._next_marker()
        elif tag in ("td", "th"):
            self._end_cell()
            self._in_cell = self._row is not None
        elif tag == "tr":
            self._end_row()
            self._end_block("\n")
            self._row = []
        elif heading := _HEADING.fullmatch(tag):
            self._end_block()
            self._prefix = "#" * int(heading[1]) + " "
        elif _BLOCK.fullmatch(tag):
            # A block right after a list marker goes on the same line.
            if self._line.strip() or not self._prefix:
                self._end_block()
            self._preformatted = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag in self._hidden:
                del self._hidden[self._hidden.index(tag) :]
        elif tag in ("ul", "ol"):
            if self._lists:
                self._lists.pop()
            self._end_block("\n" if self._lists else "\n\n")
        elif tag == "li":
            self._end_block("\n")
        elif tag in ("td", "th"):
            self._end_cell()
        elif tag == "tr":
            self._end_row()
        elif _BLOCK.fullmatch(tag) or _HEADING.fullmatch(tag):
            if tag == "table":
                self._end_row()
            self._end_block()
            self._preformatted = False

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._preformatted:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            if not self._line or self._line[-1] in " \n":
                data = data.lstrip(" ")
        self._line += data

    def _next_marker(self) -> str:
        indent = "  " * (len(self._lists) - 1)
        number = self._lists[-1] if self._lists else None
        if number is None:
            return f"{indent}- "
        self._lists[-1] = number + 1
        return f"{indent}{number + 1}. "

    def _end_cell(self) -> None:
        if self._in_cell and self._row is not None:
            self._row.append(" ".join(self._line.split()))
            self._line, self._in_cell = "", False

    def _end_row(self) -> None:
        self._end_cell()
        row, self._row = self._row, None
        if row and any(row):
            self._line = " | ".join(row)
            self._end_block("\n")

    def _end_block(self, gap: str = "\n\n") -> None:
        if self._row is not None:
            self._line += " "
            return
        line = self._line.strip("\n").rstrip()
        if line:
            self._blocks.append(f"{self._prefix}{line}{gap}")
        elif gap == "\n\n":
            self._blocks.append("\n")
        self._prefix = self._line = ""


def epub_text(data: bytes) -> str:
    """The text of an e-book's chapters in reading order, under its title."""
    book = _Archive(data, "EPUB")
    rootfile = book.xml("META-INF/container.xml").find(f".//{_CONTAINER}rootfile")
    package_path = rootfile.get("full-path", "") if rootfile is not None else ""
    package = book.xml(package_path)
    items = {item.get("id"): item.get("href", "") for item in package.iter(f"{_PACKAGE}item")}
    chapters = [items.get(reference.get("idref"), "") for reference in package.iter(f"{_PACKAGE}itemref")]
    paths = [
        posixpath.normpath(posixpath.join(posixpath.dirname(package_path), unquote(href))) for href in chapters if href
    ]
    encrypted = (
        book.read("META-INF/encryption.xml").decode(errors="replace") if book.has("META-INF/encryption.xml") else ""
    )
    if any(f'"{path}"' in encrypted for path in paths):
        raise Unreadable("the EPUB is protected (DRM)")
    title = next((element.text or "" for element in package.iter("{http://purl.org/dc/elements/1.1/}title")), "")
    texts = [html_text(book.read(path).decode("utf-8", errors="replace")) for path in paths if book.has(path)]
    if not any(texts):
        raise Unreadable("the EPUB holds no text")
    return "\n\n".join(text for text in (f"# {title}" if title else "", *texts) if text)


def docx_text(data: bytes) -> str:
    """The text of a Word document with its headings, lists, tables and footnotes; deleted text is left out."""
    document = _Archive(data, "DOCX")
    body = document.xml("word/document.xml").find(f"{_WORD}body")
    headings = _heading_levels(document.xml("word/styles.xml")) if document.has("word/styles.xml") else {}
    text = "" if body is None else "".join(_word_blocks(body, headings))
    if document.has("word/footnotes.xml"):
        notes = "".join(_word_blocks(document.xml("word/footnotes.xml"), headings)).strip()
        text += f"\n\n{notes}" if notes else ""
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _heading_levels(styles: ElementTree.Element) -> dict[str, int]:
    """The level of each style that is a heading: the ids are translated, the names are not."""
    levels = {}
    for style in styles.iter(f"{_WORD}style"):
        name = style.find(f"{_WORD}name")
        match = re.fullmatch(r"heading ([1-6])|title", "" if name is None else name.get(f"{_WORD}val", "").lower())
        if match:
            levels[style.get(f"{_WORD}styleId", "")] = int(match[1] or 1)
    return levels


def _word_blocks(parent: ElementTree.Element, headings: dict[str, int]) -> Iterator[str]:
    for element in parent:
        if element.tag == f"{_WORD}p":
            yield _word_paragraph(element, headings)
        elif element.tag == f"{_WORD}tbl":
            for row in element.iter(f"{_WORD}tr"):
                cells = (" ".join("".join(_word_blocks(cell, {})).split()) for cell in row.iter(f"{_WORD}tc"))
                yield " | ".join(cells) + "\n"
            yield "\n"
        elif element.tag != _FALLBACK:
            yield from _word_blocks(element, headings)


def _word_paragraph(paragraph: ElementTree.Element, headings: dict[str, int]) -> str:
    text = "".join(_word_runs(paragraph)).strip()
    if not text:
        return ""
    style = paragraph.find(f"{_WORD}pPr/{_WORD}pStyle")
    if style is not None and (level := headings.get(style.get(f"{_WORD}val", ""))):
        return f"{'#' * level} {text}\n\n"
    numbering = paragraph.find(f"{_WORD}pPr/{_WORD}numPr")
    if numbering is None:
        return f"{text}\n\n"
    indent = numbering.find(f"{_WORD}ilvl")
    depth = "0" if indent is None else indent.get(f"{_WORD}val", "0")
    return f"{'  ' * min(int(depth), 8) if depth.isdigit() else ''}- {text}\n"


def _word_runs(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        if child.tag == f"{_WORD}t":
            yield child.text or ""
        elif child.tag == f"{_WORD}tab":
            yield "\t"
        elif child.tag in (f"{_WORD}br", f"{_WORD}cr"):
            yield "\n"
        elif child.tag not in (_FALLBACK, f"{_WORD}pPr", f"{_WORD}rPr"):
            yield from _word_runs(child)


class _Archive:
    """The members of a zip file, none of which may make more of itself than it should."""

    def __init__(self, data: bytes, kind: str) -> None:
        self._kind = kind
        self._left = MAX_BYTES
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise Unreadable(f"not a whole {kind} file") from error

    def has(self, path: str) -> bool:
        return path in self._zip.namelist()

    def read(self, path: str) -> bytes:
        try:
            with self._zip.open(path) as member:
                data = member.read(self._left + 1)
        except KeyError as error:
            raise Unreadable(f"not a {self._kind} file: it has no {path or 'contents'}") from error
        except RuntimeError as error:
            raise Unreadable(f"the {self._kind} file is encrypted") from error
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            raise Unreadable(f"a damaged {self._kind} file ({path})") from error
        self._left -= len(data)
        if self._left < 0:
            raise Unreadable(f"the {self._kind} file unpacks to more than {MAX_BYTES >> 20} MiB")
        return data

    def xml(self, path: str) -> ElementTree.Element:
        data = self.read(path)
        if b"<!ENTITY" in data.replace(b"\0", b""):
            raise Unreadable(f"the {self._kind} file defines XML entities, which no such file needs")
        try:
            return ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise Unreadable(f"a damaged {self._kind} file ({path})") from error
