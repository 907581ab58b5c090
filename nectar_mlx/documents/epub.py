"""E-books: the chapters of an EPUB in reading order."""

import re

from nectar_mlx.documents.archive import Archive, Element, attribute, children, local, resolve
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.html import declared_encoding, html_text
from nectar_mlx.documents.reading import Document, Places, Unreadable

_TEXTS_NAMES = "application/xhtml+xml text/html text/x-oeb1-document application/x-dtbook+xml application/xml text/xml"
_TEXTS = ("", *_TEXTS_NAMES.split())


def read_epub(data: bytes, name: str) -> Document:
    """An e-book under its title, with a place for each chapter; chapters that are missing are named."""
    book = Archive(data, "EPUB")
    rootfile = next((item for item in book.xml("META-INF/container.xml").iter() if local(item) == "rootfile"), None)
    package_path = "" if rootfile is None else book.find(attribute(rootfile, "full-path"))
    package = book.xml(package_path)
    hrefs, left_out = _spine(package)
    protected = _protected(book)
    title = next((item.text or "" for item in package.iter() if local(item) == "title"), "")
    places = Places("chapter", f"# {title.strip()}" if title.strip() else "")
    for href in dict.fromkeys(hrefs):
        path = book.find(resolve(package_path, href))
        if path and path in protected:
            raise Unreadable("the EPUB is protected (DRM)")
        if not path:
            left_out.append(f"chapter {href}: the book does not hold it")
        elif text := _chapter(book, path, left_out):
            places.add(_heading(text, len(places) + 1), text)
    if not places:
        raise Unreadable(f"the EPUB holds no text{': ' + left_out[0] if left_out else ''}")
    return Document("epub", *places.result(), left_out=left_out)


def _spine(package: Element) -> tuple[list[str], list[str]]:
    """The files of the chapters in reading order, and the chapters that name none."""
    items = {item.get("id", ""): item for item in package.iter() if local(item) == "item"}
    hrefs, missing = [], []
    for spine in (item for item in package.iter() if local(item) == "spine"):
        for reference in children(spine, "itemref"):
            item = items.get(reference.get("idref", ""))
            if item is None:
                missing.append(f"chapter {reference.get('idref', '')}: the book does not list it")
            elif item.get("media-type", "").partition(";")[0].strip().lower() in _TEXTS:
                hrefs.append(item.get("href", "").partition("#")[0])
            else:
                missing.append(f"chapter {item.get('href', '')}: {item.get('media-type')} is no text")
    return [href for href in hrefs if href], missing


def _protected(book: Archive) -> set[str]:
    path = book.find("META-INF/encryption.xml")
    if not path:
        return set()
    encryption = book.xml(path)
    return {book.find(resolve("", attribute(item, "URI"))) for item in encryption.iter() if attribute(item, "URI")}


def _chapter(book: Archive, path: str, left_out: list[str]) -> str:
    try:
        data = book.read(path)
        html, notes = decode(data, declared=declared_encoding(data)) if data else ("", [])
    except Unreadable as error:
        left_out.append(f"chapter {path}: {error}")
        return ""
    text, hidden = html_text(html)
    left_out += [f"chapter {path}: {note}" for note in notes + hidden]
    return text


def _heading(text: str, number: int) -> str:
    found = re.search(r"^#+ (.{1,80})", text, re.MULTILINE)
    return f"{number} {found[1]}" if found else str(number)
