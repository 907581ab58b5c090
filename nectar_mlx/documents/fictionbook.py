"""FictionBook e-books (FB2): the chapters, with notes behind them."""

from collections.abc import Iterator

from nectar_mlx.documents import blocks
from nectar_mlx.documents.archive import Element, child, children, local, parse_xml
from nectar_mlx.documents.reading import Document, Places, Unreadable


def read_fictionbook(data: bytes, name: str) -> Document:
    """A book under its title, with a place for each chapter."""
    book = parse_xml(data, "FB2 file")
    title = child(book, "description", "title-info", "book-title")
    heading = "" if title is None else _line(title)
    places = Places("chapter", f"# {heading}" if heading else "")
    for body in children(book, "body"):
        chapters = [item for item in body if local(item) == "section"]
        if len(chapters) == 1 and child(chapters[0], "section") is not None:
            chapters = list(chapters[0])
        for chapter in chapters or [body]:
            if text := blocks.joined(list(_blocks(chapter, 1))):
                own = child(chapter, "title")
                places.add(f"{len(places) + 1} {'' if own is None else _line(own)[:80]}".strip(), text)
    if not places:
        raise Unreadable("the FB2 file holds no text")
    return Document("fb2", *places.result())


def _blocks(element: Element, level: int) -> Iterator[str]:
    tag = local(element)
    if tag in ("title", "subtitle"):
        yield blocks.heading(level, _line(element))
    elif tag in ("p", "v", "text-author", "date"):
        yield _line(element)
    elif tag == "table":
        yield blocks.table([[_line(cell) for cell in row] for row in children(element, "tr")])
    elif tag != "image":
        for item in element:
            yield from _blocks(item, level + (tag == "section"))


def _line(element: Element) -> str:
    return " ".join("".join(_texts(element)).split())


def _texts(element: Element) -> Iterator[str]:
    is_note = local(element) == "a" and any(value == "note" for value in element.attrib.values())
    yield "[" if is_note else ""
    yield element.text or ""
    for item in element:
        yield from _texts(item)
        yield " " if local(item) in ("p", "v") else ""
        yield item.tail or ""
    yield "]" if is_note else ""
