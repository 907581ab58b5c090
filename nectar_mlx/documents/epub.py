"""E-books: the chapters of an EPUB in reading order."""

import re

from nectar_mlx.documents.archive import Archive, Element, attribute, child, children, local, resolve
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.html import declared_encoding, html_text, links
from nectar_mlx.documents.reading import Document, Places, Unreadable

_TEXTS_NAMES = "application/xhtml+xml text/html text/x-oeb1-document application/x-dtbook+xml application/xml text/xml"
_TEXTS = ("", *_TEXTS_NAMES.split())


def read_epub(data: bytes, name: str) -> Document:
    """An e-book under its title, with a place for each chapter; chapters that are missing are named."""
    book = Archive(data, "EPUB")
    package_path = _package(book)
    package = book.xml(package_path)
    hrefs, left_out = _spine(package)
    contents = _contents(book, package_path, package)
    protected = _protected(book)
    title = next((item.text or "" for item in package.iter() if local(item) == "title"), "")
    places = Places("chapter", f"# {title.strip()}" if title.strip() else "")
    paths = dict.fromkeys(book.find(resolve(package_path, href)) or f"?{href}" for href in hrefs)
    for path in paths or contents:
        if path.startswith("?"):
            left_out.append(f"chapter {path[1:]}: the book does not hold it")
        elif path in protected:
            raise Unreadable("the EPUB is protected (DRM)")
        elif text := _chapter(book, path, left_out):
            places.add(_heading(text, contents.get(path, ""), len(places) + 1), text)
    if not places:
        raise Unreadable(f"the EPUB holds no text{': ' + left_out[0] if left_out else ''}")
    return Document("epub", *places.result(), left_out=left_out)


def _package(book: Archive) -> str:
    """The path of the list of the book's files."""
    root = book.xml(book.find("META-INF/container.xml") or "META-INF/container.xml")
    paths = [book.find(attribute(item, "full-path")) for item in root.iter() if local(item) == "rootfile"]
    return next(filter(None, paths), "")


def _contents(book: Archive, package_path: str, package: Element) -> dict[str, str]:
    """The titles of the chapters in the book's table of contents, by their paths, in its order."""
    titles: dict[str, str] = {}
    for item in (item for item in package.iter() if local(item) == "item"):
        is_page = "nav" in item.get("properties", "").split()
        path = book.find(resolve(package_path, item.get("href", "")))
        if not path or not (is_page or item.get("media-type") == "application/x-dtbncx+xml"):
            continue
        try:
            entries = links(decode(book.read(path))[0]) if is_page else _points(book.xml(path))
        except Unreadable:
            continue  # the book can be read without
        for href, title in entries:
            if (chapter := book.find(resolve(path, href))) and title.strip():
                titles.setdefault(chapter, " ".join(title.split()))
    return titles


def _points(root: Element) -> list[tuple[str, str]]:
    """The references and titles of a table of contents of the older kind (NCX)."""
    found = []
    for point in (item for item in root.iter() if local(item) == "navPoint"):
        content, label = child(point, "content"), child(point, "navLabel")
        if content is not None and label is not None:
            found.append((attribute(content, "src"), "".join(label.itertext())))
    return found


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


def _heading(text: str, listed: str, number: int) -> str:
    """The chapter's number with its own heading, else with the title in the table of contents."""
    found = re.search(r"^#+ (.{1,80})", text, re.MULTILINE)
    return f"{number} {found[1] if found else listed[:80]}".strip()
