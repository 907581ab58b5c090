"""HTML repaired before it is parsed: nothing unclosed swallows the rest, nothing takes quadratic time."""

import re

_SIGN = re.compile(r"<(?:!--|[!?]|(/?)([a-zA-Z][^\s/>]*))")
MAX_DEPTH = 256  # open elements; finding where a tag belongs takes time in proportion to them
MAX_TAG = 1 << 16  # characters; a parser compares each attribute with those before it
_MOST_ATTRIBUTES = 100
_EMBEDDED = re.compile(r"data:[^\"'\s<>()]{1000,}")  # a picture in an attribute
_OPEN_QUOTE = re.compile(r"=\s*([\"'])")
_QUOTED = re.compile(r"=\s*(?:\"[^\"]*\"|'[^']*')")
# Each paragraph opens again what is open of these.
_FORMATTING = frozenset(["b", "big", "code", "em", "font", "i", "nobr", "s", "small", "strike", "strong", "tt", "u"])
_MOST_FORMATTING = 32
_RAW = {"script", "style", "noscript"}
_VOID_NAMES = "area base br col embed hr img input link meta param source track wbr"
_VOID = frozenset(_VOID_NAMES.split())
HIDDEN_NAMES = "button canvas iframe math object select svg template textarea title xmp noembed noframes"
HIDDEN = frozenset(HIDDEN_NAMES.split())
# Their ends may be left out, so their number says nothing about depth.
_IMPLIED_NAMES = "p li dt dd td th tr thead tbody tfoot option optgroup colgroup caption rt rp html head body"
_IMPLIED = frozenset(_IMPLIED_NAMES.split())


def repaired(html: str) -> str:
    """The page with tags removed that would hide what follows them, nest too deep or hold too many attributes."""
    return _Repair(html).result()


class _Repair:
    """One pass over the signs of a page; `_pieces` is what is kept, each sign a piece of its own."""

    def __init__(self, html: str) -> None:
        self._html = html
        self._pieces: list[str] = []
        self._absent: set[str] = set()
        self._depth = 0
        self._formatting = 0
        self._open: dict[str, list[int]] = {}

    def result(self) -> str:
        position = 0
        while match := _SIGN.search(self._html, position):
            self._pieces.append(self._html[position : match.start()])
            position = self._sign(match)
        self._pieces.append(self._html[position:])
        for places in self._open.values():
            for place in places:
                self._pieces[place] = " "
        return "".join(self._pieces)

    def _sign(self, match: re.Match[str]) -> int:
        """Keeps or drops one sign; returns where the text goes on."""
        start, name = match.start(), (match[2] or "").lower()
        if match[0] == "<!--":
            end = self._find("-->", start + 2)
            return end if end >= 0 else match.end()
        end = self._find(">", start)
        if end < 0:
            self._pieces.append("" if name else "&lt;" + match[0][1:])
            return match.end() if not name else len(self._html) if self._is_cut(start) else match.end()
        if not name:
            return end
        if match[1]:
            self._close(name, self._html[start:end])
        elif name in _RAW:
            return self._raw(name, end)
        else:
            end, tag = self._whole_tag(name, start, end)
            self._start(name, tag)
        return end

    def _whole_tag(self, name: str, start: int, end: int) -> tuple[int, str]:
        """The end of a tag and its text. An attribute may hold ">"; one whose quote is never closed holds nothing."""
        tag = self._html[start:end]
        opened = _OPEN_QUOTE.search(_QUOTED.sub("", tag))
        if opened is None:
            return end, tag
        close = self._html.find(opened[1], end, end + MAX_TAG)
        after = self._html[close + 1 : close + 2]
        finish = (
            self._html.find(">", close, close + MAX_TAG) if close >= 0 and (after.isspace() or after in "/>") else -1
        )
        return (end, f"<{name}>") if finish < 0 else (finish + 1, self._html[start : finish + 1])

    def _is_cut(self, start: int) -> bool:
        return len(self._html) - start < MAX_TAG and "<" not in self._html[start + 1 : start + 1 + MAX_TAG]

    def _raw(self, name: str, end: int) -> int:
        """Skips a script or a style sheet; one without an end ends at the next tag."""
        close = self._find_close(name, end)
        if close >= 0:
            return close
        following = self._html.find("<", end)
        return following if following >= 0 else len(self._html)

    def _start(self, name: str, tag: str) -> None:
        if len(tag) > MAX_TAG:
            tag = _EMBEDDED.sub("", tag)
        if len(tag) > MAX_TAG or tag.count("=") > _MOST_ATTRIBUTES or tag.count(" ") > 20 * _MOST_ATTRIBUTES:
            tag = f"<{name}>"
        if name in HIDDEN and tag.endswith("/>"):
            return  # it holds nothing, but would hide what follows
        if name in _FORMATTING:
            self._formatting += 1
            tag = tag if self._formatting <= _MOST_FORMATTING else ""
        if name in HIDDEN:
            self._open.setdefault(name, []).append(len(self._pieces))
        elif name not in _VOID and name not in _IMPLIED:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                tag = " "
        self._pieces.append(tag)

    def _close(self, name: str, tag: str) -> None:
        if name in _FORMATTING:
            self._formatting = max(0, self._formatting - 1)
            tag = tag if self._formatting < _MOST_FORMATTING else ""
        if name in HIDDEN:
            if not self._open.get(name):
                return
            self._open[name].pop()
        elif name not in _VOID and name not in _IMPLIED:
            self._depth = max(0, self._depth - 1)
            if self._depth >= MAX_DEPTH:
                return
        self._pieces.append(tag)

    def _find(self, what: str, start: int) -> int:
        """Where `what` ends behind `start`, or -1; what is absent once is not searched for again."""
        if what in self._absent:
            return -1
        found = self._html.find(what, start)
        if found < 0:
            self._absent.add(what)
            return -1
        return found + len(what)

    def _find_close(self, name: str, start: int) -> int:
        if name in self._absent:
            return -1
        match = re.compile(rf"</{name}[^>]{{0,100}}>", re.IGNORECASE).search(self._html, start)
        if match is None:
            self._absent.add(name)
            return -1
        return match.end()
