"""Rich text (RTF): what is shown, with changes accepted; notes stand behind the text."""

import codecs
import re
from dataclasses import dataclass, replace
from functools import partial

from nectar_mlx.documents.blocks import row
from nectar_mlx.documents.reading import Document, Unreadable

_TOKEN = re.compile(
    rb"\\(?P<word>[a-zA-Z]{1,32})(?P<number>-?\d{1,10})? ?|\\'(?P<hex>[0-9a-fA-F]{2})|\\(?P<sign>.)"
    rb"|(?P<brace>[{}])|[\r\n]+|(?P<text>[^\\{}\r\n]+)",
    re.DOTALL,
)
_SKIPPED_NAMES = (
    "colortbl stylesheet info pict objdata objclass objname sp sn sv shprslt fldinst datafield atnid atnauthor atndate "
    "atnref bkmkstart bkmkend xe tc rxe pn themedata datastore listtable listoverridetable revtbl filetbl ftnsep "
    "ftnsepc aftnsep aftnsepc aftncn ftncn mbegChr mendChr mchr mtype mpos msepChr mdegHide mmathPict upr htmltag"
)
_SKIPPED = frozenset(_SKIPPED_NAMES.split())
_STARRED = {"shpinst", "shptxt", "annotation", "moMath", "moMathPara", "shppict", "ud"}  # read though they are optional
_SHOWN = {
    **{"tab": "\t", "line": "\n", "emdash": "—", "endash": "–", "bullet": "•", "lquote": "‘", "rquote": "’"},
    **{"ldblquote": "“", "rdblquote": "”", "emspace": " ", "enspace": " ", "qmspace": " ", "nestcell": ", "},
    **{"nestrow": "; "},
}
_SIGNS = {"~": "\u00a0", "-": "\u00ad", "_": "\u2011", "\\": "\\", "{": "{", "}": "}"}
_BREAKS = {"par", "sect", "page", "column", "shptxt"}
_CHARSETS = {
    **{77: "mac_roman", 128: "shift_jis", 129: "cp949", 134: "gb18030", 136: "big5", 161: "cp1253", 162: "cp1254"},
    **{163: "cp1258", 177: "cp1255", 178: "cp1256", 186: "cp1257", 204: "cp1251", 222: "cp874", 238: "cp1250"},
}
_SYMBOLS = 2
_ENCODINGS = {"mac": "mac_roman", "pc": "cp437", "pca": "cp850", "ansi": "cp1252"}
_MARGINS = {"header", "headerl", "headerr", "headerf", "footer", "footerl", "footerr", "footerf"}
_STATES = "fonttbl f fcharset footnote v deleted webHidden super nosupersub sub plain uc u ansicpg intbl pard cell row"
_HANDLED = {*_SKIPPED, *_STARRED, *_SHOWN, *_BREAKS, *_ENCODINGS, *_MARGINS, *_STATES.split()}


def read_rtf(data: bytes, name: str) -> Document:
    """A rich text file; its pictures are counted, not read."""
    if not data.lstrip().startswith(b"{\\rtf"):
        raise Unreadable("not an RTF file")
    reader = _Reader(data)
    # Two \u are one character where they are a surrogate pair.
    text = reader.text().encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    lines = [line.rstrip() for line in text.split("\n")]
    left_out = [f"{reader.pictures} picture{'s' * (reader.pictures > 1)}"] if reader.pictures else []
    return Document("rtf", "\n".join(lines).strip("\n"), left_out=left_out)


@dataclass(frozen=True)
class _State:
    """What holds until the end of a group."""

    skipped: bool = False
    hidden: bool = False
    raised: bool = False
    font: int = 0
    replacements: int = 1  # characters after each Unicode one, for readers that do not know it
    note: int = 0  # the number of the note that the text belongs to; 0 for the text itself
    in_table: bool = False
    in_fonts: bool = False


class _Reader:
    """One pass over the words and texts of a file."""

    def __init__(self, data: bytes) -> None:
        self.pictures = 0
        self._state = _State()
        self._encoding = "cp1252"
        self._fonts: dict[int, int] = {}
        self._bytes = bytearray()
        self._to_skip = 0
        self._starred = False
        self._cells: list[str] = []
        self._parts: dict[int, list[str]] = {0: []}
        self._cell_start = 0
        self._read(data)

    def text(self) -> str:
        self._decode()
        self._end_row()
        notes = [f"[{number}] {''.join(parts).strip()}" for number, parts in self._parts.items() if number]
        return "\n\n".join(["".join(self._parts[0]), *notes])

    def _read(self, data: bytes) -> None:
        outer: list[_State] = []
        position = 0
        while match := _TOKEN.match(data, position):
            position = match.end()
            if not match["hex"] and (match["text"] is None or match["text"].isascii()):
                self._decode()
            if match["brace"] == b"{":
                outer.append(self._state)
                self._to_skip = 0
            elif match["brace"]:
                if not outer:
                    return
                self._state = outer.pop()
                self._to_skip = 0
                if not outer:
                    return
            elif match["word"]:
                word, number = match["word"].decode(), match["number"]
                if word == "bin":
                    position += max(0, int(number or 0))
                else:
                    self._word(word, None if number is None else int(number))
            elif match["hex"]:
                self._raw(bytes.fromhex(match["hex"].decode()))
            elif match["text"]:
                self._raw(match["text"])
            elif match["sign"]:
                self._sign(match["sign"].decode("latin-1"))

    def _raw(self, text: bytes) -> None:
        if self._to_skip:
            skipped = min(self._to_skip, len(text))
            self._to_skip -= skipped
            text = text[skipped:]
        self._bytes += text
        if text.isascii() and len(text) > 1:
            self._decode()

    def _decode(self) -> None:
        if not self._bytes:
            return
        charset = self._fonts.get(self._state.font, 0)
        encoding = _CHARSETS.get(charset, self._encoding)
        text = bytes(self._bytes).decode(encoding, errors="replace")
        self._bytes.clear()
        if charset == _SYMBOLS and not text.isascii():
            text = "•"
        self._add(f"^{text}" if self._state.raised and re.fullmatch(r"[+\-]?\d+", text) else text)

    def _add(self, text: str) -> None:
        state = self._state
        if not (state.skipped or state.hidden or state.in_fonts):
            self._parts.setdefault(state.note, []).append(text)

    def _sign(self, sign: str) -> None:
        if sign == "*":
            self._starred = True
        elif sign in "\r\n":
            self._break()
        else:
            self._add(_SIGNS.get(sign, ""))

    def _word(self, word: str, number: int | None) -> None:
        starred, self._starred = self._starred, False
        self._to_skip = 0
        if not starred and word not in _HANDLED and not word.endswith("Pr"):
            return
        state = self._state
        on = number != 0
        change = partial(replace, state)
        if word == "pict" and not state.skipped:
            self.pictures += 1
        if word in _SKIPPED or (starred and word not in _STARRED) or re.fullmatch(r"m[a-zA-Z]*Pr", word):
            self._state = change(skipped=True)
        elif word == "ud":
            self._state = change(skipped=False)
        elif word == "fonttbl":
            self._state = change(in_fonts=True)
        elif word == "f":
            self._state = change(font=number or 0)
        elif word == "fcharset":
            self._fonts[state.font] = number or 0
        elif word in ("footnote", "annotation"):
            self._start_note()
        elif word in ("v", "deleted", "webHidden"):
            self._state = change(hidden=on)
        elif word in ("super", "nosupersub", "sub"):
            self._state = change(raised=word == "super" and on)
        elif word == "plain":
            self._state = change(hidden=False, raised=False)
        elif word == "uc":
            self._state = change(replacements=min(number if number is not None else 1, 100))
        elif word == "u" and number is not None:
            self._add(chr(number % 0x10000))
            self._to_skip = state.replacements
        elif word == "ansicpg":
            self._encoding = _known(f"cp{number}")
        elif word in _ENCODINGS and not self._parts[0]:
            self._encoding = _ENCODINGS[word]
        elif word in ("intbl", "pard"):
            self._state = change(in_table=word == "intbl")
        elif word == "cell":
            self._end_cell()
        elif word == "row":
            self._end_row()
        elif word in _BREAKS or word in _MARGINS:
            self._break()
        elif word in _SHOWN:
            self._add(_SHOWN[word])

    def _break(self) -> None:
        self._add(" " if self._state.in_table and not self._state.note else "\n")

    def _start_note(self) -> None:
        if self._state.skipped or self._state.hidden:
            return
        number = len(self._parts)
        self._add(f"[{number}]")
        self._parts[number] = []
        self._state = replace(self._state, note=number, raised=False)

    def _end_cell(self) -> None:
        if not self._state.skipped:
            parts = self._parts[0]
            before = "".join(parts[self._cell_start :])
            # What stands before the row is no cell.
            outside, _, inside = before.rpartition("\n") if not self._cells else ("", "", before)
            del parts[self._cell_start :]
            if outside:
                parts.append(outside + "\n")
            self._cells.append(inside)
            self._cell_start = len(parts)

    def _end_row(self) -> None:
        if self._cells:
            self._parts[0].append(row(self._cells) + "\n")
            self._cells = []
        self._cell_start = len(self._parts[0])


def _known(encoding: str) -> str:
    encoding = {"cp10000": "mac_roman", "cp65001": "utf-8", "cp54936": "gb18030"}.get(encoding, encoding)
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        return "cp1252"
