"""Contacts (VCF) and calendars (ICS): a line for each entry of a card or an event, without pictures and keys."""

import quopri
import re
from collections.abc import Iterator

from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.reading import Document, Places, Unreadable

_SKIPPED_NAMES = "VERSION PRODID UID REV SEQUENCE DTSTAMP CREATED LAST-MODIFIED CALSCALE METHOD TRANSP STATUS CLASS N"
_SKIPPED = frozenset(_SKIPPED_NAMES.split())
_PARTS = {"VCARD": "contact", "VEVENT": "event", "VTODO": "event", "VJOURNAL": "event"}
_ENTRY = re.compile(r"(?:[\w-]+\.)?([\w-]+)((?:;(?:[^:;\"]|\"[^\"]*\")*+)*+):(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\([nN,;:\\])")


def read_cards(data: bytes, name: str) -> Document:
    """A place for each contact or event."""
    text, left_out = decode(data)
    parts = list(_parts(text))
    if not parts:
        raise Unreadable("it holds no contact and no event")
    places = Places(parts[0][0])
    for number, (_, lines) in enumerate(parts, 1):
        title = next((line.partition(": ")[2] for line in lines if line.startswith(("FN: ", "SUMMARY: "))), "")
        places.add(f"{number} {title[:80]}".strip(), "\n".join(lines))
    return Document("cards", *places.result(), left_out)


def _parts(text: str) -> Iterator[tuple[str, list[str]]]:
    """The kind and the lines of each contact or event."""
    kind, lines, inside = "", list[str](), 0
    for entry in _entries(text):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            continue
        name, options, value = match[1].upper(), match[2].upper(), match[3]
        part = value.strip().upper() if name in ("BEGIN", "END") else ""
        if name == "BEGIN" and part in _PARTS:
            kind, lines, inside = _PARTS[part], [], 0
        elif name == "END" and part in _PARTS:
            if kind and lines:
                yield kind, lines
            kind = ""
        elif part:
            inside += 1 if name == "BEGIN" else -1  # an alarm
        elif kind and not inside and name not in _SKIPPED and (value := _value(options, value)):
            lines.append(f"{name}: {value}")


def _entries(text: str) -> Iterator[str]:
    """Whole entries: a line that starts with a space goes on, and so does what ends with "=" in quoted-printable."""
    pieces: list[str] = []
    quoted = False
    for line in text.split("\n"):
        if pieces and (line[:1] in (" ", "\t") or (quoted and pieces[-1].endswith("="))):
            pieces.append(line[1:] if line[:1] in (" ", "\t") else f"\n{line}")
            continue
        if pieces:
            yield "".join(pieces)
        pieces, quoted = [line], "QUOTED-PRINTABLE" in line.upper()
    yield "".join(pieces)


def _value(options: str, value: str) -> str:
    """What a person reads; nothing for a picture or a key."""
    if re.search(r"ENCODING=(?:B\b|BASE64)", options) or value.startswith("data:"):
        return ""
    if "QUOTED-PRINTABLE" in options:
        value, _ = decode(quopri.decodestring(value.encode()))
    value = re.sub(r"^(\d{4})(\d\d)(\d\d)(?:T(\d\d)(\d\d)\d\dZ?)?$", _date, value.strip())
    value = re.sub(r"(?<!\\);+", ", ", value).strip(", ")  # the fields of an address
    return " ".join(_ESCAPED.sub(lambda match: " " if match[1] in "nN" else match[1], value).split())


def _date(match: re.Match[str]) -> str:
    day = f"{match[1]}-{match[2]}-{match[3]}"
    return f"{day} {match[4]}:{match[5]}" if match[4] else day
