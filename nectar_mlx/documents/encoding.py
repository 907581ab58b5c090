"""Bytes as text: the byte order mark's encoding, UTF-8 even where a few bytes are wrong, or a legacy encoding."""

import codecs
import re
import unicodedata
from collections import Counter

from nectar_mlx.documents import legacy
from nectar_mlx.documents.reading import Unreadable

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ESCAPES = re.compile(r"\x1b\[[0-9;?]{0,32}[@-~]|\ufeff")  # colours of a terminal; marks amid files that were joined
_JAPANESE = re.compile(rb"\x1b\$[@B]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# What programs write under these names.
_WIDER = {
    **{"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874"},
    **{"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"},
}
_SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # are written together
_SAMPLE = 1 << 16  # bytes that a detector looks at


def decode(data: bytes, *, declared: str = "") -> tuple[str, list[str]]:
    """Text with plain newlines, and what had to be left out of it.

    Args:
        data: the bytes of a text.
        declared: the encoding that the document names, tried after the byte order mark and UTF-8.

    Raises:
        Unreadable: the bytes are not text.
    """
    text, notes = _decoded(data, declared)
    controls = len(_CONTROLS.findall(text))
    if controls > max(len(text) // 200, min(3, len(text) // 10)):
        raise Unreadable("not a text file")
    return re.sub(r"\r\n?|\x0c", "\n", _CONTROLS.sub("", _ESCAPES.sub("", text))), notes


def _decoded(data: bytes, declared: str) -> tuple[str, list[str]]:
    marked = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "")
    if not marked and b"\0" in data[:_SAMPLE]:
        marked = _unmarked(data)
        if not marked:
            if not _has_stray_zeros(data):
                raise Unreadable("not a text file")
            data = re.sub(rb"(?<=[^\0\s])\0+(?=[^\0\s])", b" ", data).replace(b"\0", b"")
    if marked and marked != "utf-8-sig":
        return _tolerant(data, marked)
    if not marked and _JAPANESE.search(data) and data.isascii():
        return _tolerant(data, "iso2022_jp")
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        if not marked and (encoding := _known(declared)) and encoding != "utf-8":
            return _tolerant(data, encoding)
        if marked or _is_mostly_utf8(data):
            return _tolerant(data, "utf-8-sig")
        return _legacy(data)


def _unmarked(data: bytes) -> str:
    """UTF-32 without its mark: two of four bytes are zeros or small. UTF-16: half of the bytes of western text are
    zeros, all at odd or all at even places; other texts are letters of one script, which other data would not be by
    chance."""
    sample = data[:_SAMPLE]
    for encoding, high in (("utf-32-le", (3, 2)), ("utf-32-be", (0, 1))):
        if len(data) % 4 == 0 and not any(sample[high[0] :: 4]) and max(sample[high[1] :: 4]) < 4:
            return encoding
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if odd > len(sample) // 5 and even == 0:
        return "utf-16-le"
    if even > len(sample) // 5 and odd == 0:
        return "utf-16-be"
    if _has_stray_zeros(data):  # two letters of ASCII are one of Chinese
        return ""
    return next((name for name in ("utf-16-le", "utf-16-be") if _is_one_script(sample, name)), "")


def _is_one_script(sample: bytes, encoding: str) -> bool:
    text = sample[: len(sample) // 2 * 2].decode(encoding, errors="replace")
    letters = [character for character in text if character.isalpha()]
    if "\0" in text or "\ufffd" in text or len(letters) < max(20, 0.6 * len(text)):
        return False
    scripts = Counter(_SCRIPTS.get(name := unicodedata.name(c, "").partition(" ")[0], name) for c in letters)
    return scripts.most_common(1)[0][1] > 0.9 * len(letters)


def _has_stray_zeros(data: bytes) -> bool:
    """Whether zeros are all that is strange in UTF-8, as in a log that a crash has cut, or in a list that they
    divide: runs of them count once."""
    runs = len(re.findall(rb"\0+", data))
    if runs > max(1, len(data) // 4):
        return False
    try:
        text = data.replace(b"\0", b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not _CONTROLS.search(text)


def _known(name: str) -> str:
    """The codec's name if it is one of a text encoding that ASCII is a part of, else nothing."""
    try:
        codec = codecs.lookup(name.strip())
        # "hex" and the like turn bytes into bytes, UTF-7 and its kin hide characters in others.
        readable = b"<a>".decode(codec.name) == "<a>" and codec.name not in ("utf-7", "unicode_escape", "idna")
    except (LookupError, ValueError, TypeError, AttributeError, UnicodeError):
        return ""
    if not readable or codec.name.startswith(("raw_unicode", "punycode")):
        return ""
    return _WIDER.get(codec.name, codec.name)


def _tolerant(data: bytes, encoding: str) -> tuple[str, list[str]]:
    text = data.decode(encoding, errors="replace")
    # A detector is not needed to see that half of the text is not in this encoding.
    bad = text.count("\ufffd")
    if bad > max(1, len(text) // 20) or (len(text) <= 2 and bad):
        raise Unreadable("not a text file" if encoding.startswith("utf") else f"not text in {encoding}")
    what = "character that is" if bad == 1 else "characters that are"
    return text, [f"{bad} {what} not valid {_name(encoding)}"] if bad else []


def _name(encoding: str) -> str:
    return encoding.removesuffix("-sig").upper().replace("_", "-")


def _is_mostly_utf8(data: bytes) -> bool:
    """Whether UTF-8 with a few wrong bytes is a better reading than another encoding.

    Characters of several bytes that are right by chance are rare: each further byte counts for two wrong ones.
    """
    text = data.decode("utf-8", errors="replace")
    wrong = text.count("\ufffd")
    further = len(text.encode("utf-8")) - len(text) - 2 * wrong
    return further >= 2 * wrong


def _legacy(data: bytes) -> tuple[str, list[str]]:
    if b"\xed" in data and (text := _with_pairs(data)):
        return text, []
    sample = data if len(data) <= _SAMPLE else data[: data.rfind(b"\n", 0, _SAMPLE) + 1 or _SAMPLE]
    encoding = legacy.guess(sample)
    text = data.decode(encoding or "ascii", errors="replace")
    strange = text.count("\ufffd")
    if strange > len(text) // (50 if encoding else 3):
        raise Unreadable("text in an unknown encoding; save it as UTF-8")
    return text, [] if encoding else [f"{strange} character{'s' * (strange > 1)} in an unknown encoding"]


def _with_pairs(data: bytes) -> str:
    """UTF-8 as Java and old databases write it: characters beyond the first 65,536 as two. Empty for other data."""
    try:
        halves = data.decode("utf-8", "surrogatepass").encode("utf-16-le", "surrogatepass")
    except UnicodeDecodeError:
        return ""
    return halves.decode("utf-16-le", "replace")
