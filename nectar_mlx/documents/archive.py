"""Zip files and the XML in them, read within limits of size and depth."""

import io
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from urllib.parse import unquote
from xml.etree import ElementTree

from nectar_mlx.documents.reading import Unreadable

MAX_BYTES = 1 << 28
"""What may be unpacked of one document: far more than any book's text, far less than a zip bomb."""
MAX_DEPTH = 200
"""How deep XML may be nested: a table in a table in a text box takes about 40."""

Element = ElementTree.Element


class Archive:
    """The members of a zip file, none of which may make more of itself than it should."""

    def __init__(self, data: bytes, kind: str) -> None:
        self._kind = kind
        self._left = MAX_BYTES
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise Unreadable(f"not a whole {kind} file") from error
        self._names = {name: name for name in self._zip.namelist()}
        self._folded = {_folded(name): name for name in self._names}

    def names(self) -> list[str]:
        return list(self._names)

    def find(self, path: str) -> str:
        """The member's name for a path that may differ in case; empty if there is none."""
        return self._names.get(path) or self._folded.get(_folded(path), "")

    def check_size(self) -> None:
        """Raises Unreadable if all members together are too large to be unpacked."""
        if sum(member.file_size for member in self._zip.infolist()) > MAX_BYTES:
            raise Unreadable(self._too_large())

    def read(self, path: str) -> bytes:
        try:
            with self._zip.open(path) as member:
                data = member.read(self._left + 1)
        except KeyError as error:
            raise Unreadable(f"no {self._kind} file: it has no {path or 'contents'}") from error
        except RuntimeError as error:
            raise Unreadable(f"the {self._kind} file is encrypted") from error
        except Exception as error:  # each way of compressing has its own errors
            raise Unreadable(f"a damaged {self._kind} file ({path})") from error
        self._left -= len(data)
        if self._left < 0:
            raise Unreadable(self._too_large())
        return data

    def xml(self, path: str) -> Element:
        """The root element of a member."""
        return parse_xml(self.read(path), f"{self._kind} file ({path})")

    def _too_large(self) -> str:
        return f"the {self._kind} file unpacks to more than {MAX_BYTES / 1e6:.0f} MB"


def _folded(path: str) -> str:
    """A path as file systems compare them: some keep accents apart from their letters."""
    return unicodedata.normalize("NFC", path).replace("\\", "/").casefold()


def resolve(base: str, href: str) -> str:
    """The path in the archive that a reference in the member `base` leads to."""
    path = unquote(re.split(r"[#?]", href)[0]).replace("\\", "/")
    joined = path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(base), path)
    return posixpath.normpath(joined) if path else ""


def parse_xml(data: bytes, what: str) -> Element:
    """The root element; refuses what defines entities or default attributes, and what is nested too deep."""
    try:
        parser = ElementTree.XMLParser(target=_Builder(what))
        parser.feed(data)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Unreadable(f"a damaged {what}") from error
    assert isinstance(root, Element)
    return root


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree as long as it is not nested too deep and has no document type."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._depth = 0

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # A document type can define entities and default attributes, which multiply a small file.
        if not pubid and not system:
            raise Unreadable(f"the {self._what} defines XML entities, which no such file needs")

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable(f"the {self._what} is nested more than {MAX_DEPTH} deep")
        return super().start(tag, attrs)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag)


def local(element: Element) -> str:
    """The name of an element without its namespace."""
    return element.tag.rpartition("}")[2]


def attribute(element: Element, name: str, default: str = "") -> str:
    """The value of an attribute in any namespace."""
    for key, value in element.attrib.items():
        if key.rpartition("}")[2] == name:
            return value
    return default


def child(element: Element | None, *path: str) -> Element | None:
    """The first descendant along a path of local names."""
    for name in path:
        element = next(children(element, name), None)
    return element


def children(element: Element | None, name: str) -> Iterator[Element]:
    """The children with this local name."""
    return (item for item in ([] if element is None else element) if local(item) == name)
