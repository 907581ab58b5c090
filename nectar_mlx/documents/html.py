"""Web pages as light Markdown, without what is not the page's text: navigation, footers, cookie notices."""

import plistlib
import re
from collections import Counter
from collections.abc import Iterator
from html import unescape
from typing import Protocol

from nectar_mlx.documents import formula
from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.page import Page
from nectar_mlx.documents.reading import Document, Unreadable, told
from nectar_mlx.documents.tags import repaired

_HIDDEN = set(
    [
        "title",
        "script",
        "style",
        "noscript",
        "template",
        "svg",
        "select",
        "button",
        "iframe",
        "object",
        "canvas",
        "audio",
        "video",
        "datalist",
        "rp",
    ]
)
_STRUCTURE = {"h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "pre", "blockquote", "table"}
_ROLES = {"navigation": "navigation", "menu": "navigation", "menubar": "navigation", "contentinfo": "the footer"}
_COOKIE = (
    r"cookies?[\s_-]*(?:$|bar|banner|notice|notif|consent|popup|policy|modal|overlay|law|message|dialog|settings|info)"
)
_NOTICE = re.compile(rf"(?:^|[\s_-])(?:{_COOKIE}|consent|gdpr)", re.IGNORECASE)
_TITLE = re.compile(r"<title[^<>]{0,200}>([^<]{1,300})</title", re.IGNORECASE)
_NOSCRIPT = re.compile(r"</?noscript[^>]{0,200}>", re.IGNORECASE)
_NOT_SHOWN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)


class Node(Protocol):
    """What is used of a node of a parsed page."""

    @property
    def tag(self) -> str | None: ...
    @property
    def child(self) -> "Node | None": ...
    @property
    def next(self) -> "Node | None": ...
    @property
    def text_content(self) -> str | None: ...
    @property
    def attributes(self) -> dict[str, str | None]: ...
    @property
    def mem_id(self) -> int: ...


def read_html(data: bytes, name: str) -> Document:
    """A web page."""
    html, notes = decode(data, declared=declared_encoding(data))
    text, left_out = html_text(html)
    return Document("html", _titled(text, html), left_out=notes + left_out)


def _titled(text: str, page: str) -> str:
    """The text under the page's title where it has no heading of its own."""
    found = _TITLE.search(page)
    title = " ".join(unescape(found[1]).split()) if found else ""
    has_heading = re.search("^#{1,2} ", text, re.MULTILINE) or title in text
    return text if has_heading or not text.strip() else f"# {title}\n\n{text}"


def read_webarchive(data: bytes, name: str) -> Document:
    """A page that Safari has saved."""
    try:
        page = plistlib.loads(data)["WebMainResource"]
        content, kind = bytes(page["WebResourceData"]), str(page.get("WebResourceMIMEType", "text/html"))
        declared = declared_encoding(content) or str(page.get("WebResourceTextEncodingName", ""))
    except Exception as error:  # whatever a damaged property list makes of its parser
        raise Unreadable("a damaged web archive") from error
    if not kind.startswith(("text/", "application/xhtml")):
        raise Unreadable(f"a web archive of the kind {kind}")
    html, notes = decode(content, declared=declared)
    text, left_out = (html, []) if kind == "text/plain" else html_text(html)
    return Document("html", _titled(text, html), left_out=notes + left_out)


def declared_encoding(data: bytes) -> str:
    """The encoding that a page or an XML file names in its first bytes; empty if none."""
    pattern = rb"<(?:meta[^>]{0,500}charset|\?xml[^>]{0,500}encoding)\s*=\s*[\"']?\s*([\w:.-]{1,40})"
    found = re.search(pattern, data[:4096], re.IGNORECASE)
    return found[1].decode("ascii", errors="ignore") if found else ""


def html_text(page: str) -> tuple[str, list[str]]:
    """The text that a page shows, and what was left out of it.

    A page that is nothing but navigation is read whole.
    """
    from selectolax.lexbor import LexborHTMLParser

    html = repaired(page)
    root: Node | None = LexborHTMLParser(html).root if html.strip() else None
    reader = None if root is None else _Reader(root, whole=False)
    if reader is None or not reader.text.strip():
        if _NOSCRIPT.search(page):
            return html_text(_NOSCRIPT.sub("", page))  # all that there is without scripts
        return _Reader(root, whole=True).text if root is not None else "", []
    return reader.text, told(reader.left_out)


def links(page: str) -> list[tuple[str, str]]:
    """Where the links of a page lead, and their texts."""
    from selectolax.lexbor import LexborHTMLParser

    found = LexborHTMLParser(repaired(page)).css("a[href]") if page.strip() else []
    return [(link.attributes.get("href") or "", link.text()) for link in found]


def _walk(root: Node) -> Iterator[tuple[Node, bool]]:
    """Each node when it starts (True) and, if it is an element, when it ends (False)."""
    stack = [(root, True)]
    while stack:
        node, starts = stack.pop()
        yield node, starts
        if not starts:
            continue
        if node is not root and (following := node.next) is not None:
            stack.append((following, True))
        if node.tag != "-text":
            stack.append((node, False))
            if (inside := node.child) is not None:
                stack.append((inside, True))


def _layout_tables(root: Node) -> set[int]:
    """The tables that arrange a page: their cells hold headings, lists or other tables."""
    layouts: set[int] = set()
    tables: list[int] = []
    for node, starts in _walk(root):
        tag = node.tag
        if starts and tag in _STRUCTURE and tables:
            layouts.add(tables[-1])
        if tag == "table":
            if starts:
                tables.append(node.mem_id)
            else:
                tables.pop()
    return layouts


class _Reader:
    """Walks over a page and writes what is shown; counts what is left out."""

    def __init__(self, root: Node, *, whole: bool) -> None:
        self.left_out: Counter[str] = Counter()
        self._whole = whole
        self._layouts = _layout_tables(root)
        self._page = Page()
        self._articles = 0
        self._formulas: list[list[str]] = []
        self._in_note = False
        hidden = 0  # open elements inside one that is not shown
        for node, starts in _walk(root):
            tag = node.tag or ""
            if tag == "-text":
                if not hidden:
                    self._data(node.text_content or "")
            elif not starts:
                if hidden:
                    hidden -= 1
                else:
                    self._end(tag)
            elif hidden or tag.startswith(("-", "!")) or self._is_hidden(tag, node):
                hidden += 1
            else:
                self._start(tag, node)
        self.text = self._page.text()

    def _is_hidden(self, tag: str, node: Node) -> bool:
        if tag in _HIDDEN:
            return True
        attributes = node.attributes
        if attributes.get("hidden", "until-found") != "until-found" or _NOT_SHOWN.search(attributes.get("style") or ""):
            return True
        if tag in ("span", "i") and attributes.get("aria-hidden") == "true":
            return True
        what = self._furniture(tag, attributes)
        if what and not self._whole:
            self.left_out[what] += 1
            return True
        return False

    def _furniture(self, tag: str, attributes: dict[str, str | None]) -> str:
        """The name of a part of the page that is not its text; empty for what is."""
        if tag == "nav":
            return "navigation"
        if tag == "footer":
            return "" if self._articles else "the footer"
        if role := _ROLES.get(attributes.get("role") or ""):
            return role
        named = f"{attributes.get('id') or ''} {attributes.get('class') or ''}"
        if tag not in ("html", "body", "main", "article") and _NOTICE.search(named):
            return "a cookie notice"
        return ""

    def _start(self, tag: str, node: Node) -> None:
        if self._formulas or tag == "math":
            self._formulas.append([])
            return
        if tag == "article":
            self._articles += 1
        if tag == "li" and (value := node.attributes.get("value")):
            self._page.number_from(value)
        if tag == "a" and _is_note(node.attributes):
            self._in_note = True
            self._page.data("[")
        if tag == "img":
            self._picture(node.attributes.get("alt") or "")
        else:
            spans = node.attributes if tag in ("td", "th") else {}
            self._page.start(
                tag,
                layout=tag == "table" and node.mem_id in self._layouts,
                columns=spans.get("colspan") or "",
                rows=spans.get("rowspan") or "",
            )
        if tag == "ol":
            self._page.number_from(node.attributes.get("start") or "")

    def _end(self, tag: str) -> None:
        if self._formulas:
            line = formula.mathml(tag, self._formulas.pop())
            if self._formulas:
                self._formulas[-1].append(line)
            else:
                self._page.data(formula.tidy(line))
            return
        if tag == "article":
            self._articles -= 1
        if tag == "a" and self._in_note:
            self._in_note = False
            self._page.data("]")
        self._page.end(tag)

    def _data(self, text: str) -> None:
        if self._formulas:
            self._formulas[-1].append(" ".join(text.split()))
        else:
            self._page.data(text)

    def _picture(self, description: str) -> None:
        if any(character.isalnum() for character in description):
            self._page.data(f"[{' '.join(description.split())}]")


def _is_note(attributes: dict[str, str | None]) -> bool:
    """Whether a link leads to a note: its number would be a part of the word before it."""
    return "noteref" in (attributes.get("epub:type") or "") or attributes.get("role") == "doc-noteref"
