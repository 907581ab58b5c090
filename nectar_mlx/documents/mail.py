"""Mails (EML, MBOX, saved web archives): headers, the text, and the attachments that can be read."""

import re
from collections.abc import Iterator
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser
from email.policy import Compat32

from nectar_mlx.documents.encoding import decode
from nectar_mlx.documents.html import html_text
from nectar_mlx.documents.reading import Document, Inner, Places, Unreadable

_HEADERS = ("From", "To", "Cc", "Date", "Subject")
_SIGNATURES = {"application/pgp-signature", "application/pkcs7-signature", "application/x-pkcs7-signature"}
_MOST_HEADER = 2000  # characters
_MOST_PARTS = 1000
_MOST_DEPTH = 20
_START = re.compile(rb"^From \S+ [^\n]*\b\d{4}\b", re.MULTILINE)


class _Raw(Compat32):
    """Headers as they are in the file, up to a length; bytes that are not ASCII come as surrogates."""

    def header_fetch_parse(self, name: str, value: str) -> str:
        return value[:_MOST_HEADER]


def read_mail(data: bytes, name: str, *, inner: Inner) -> Document:
    """One mail; `inner` reads what is attached to it."""
    left_out: list[str] = []
    text = _mail_text(data, inner, left_out)
    return Document("mail", text, left_out=left_out)


def read_emlx(data: bytes, name: str, *, inner: Inner) -> Document:
    """A mail as Apple's Mail keeps it: its length, the mail, and what the program notes about it."""
    length, _, rest = data.partition(b"\n")
    if not length.strip().isdigit() or len(length) > 20:
        raise Unreadable("not a mail of Apple's Mail: it does not start with its length")
    return read_mail(rest[: int(length)], name, inner=inner)


def read_mbox(data: bytes, name: str, *, inner: Inner) -> Document:
    """A mailbox with a place for each mail."""
    places, left_out = Places("mail"), []
    for number, mail in enumerate(_mails(data), 1):
        notes: list[str] = []
        try:
            text = _mail_text(mail, inner, notes)
        except Unreadable as error:
            notes.append(str(error))
            text = ""
        left_out += [f"mail {number}: {note}" for note in notes]
        if text:
            subject = re.match(r"# (.{1,80})", text)
            places.add(f"{number} {subject[1]}" if subject else str(number), text)
    return Document("mbox", *places.result(), left_out=left_out)


def _mails(data: bytes) -> Iterator[bytes]:
    """The mails of a mailbox: each starts at a line "From …" that follows an empty line."""
    data = data.replace(b"\r\n", b"\n")
    found = [match.start() for match in _START.finditer(data)]
    starts = [0, *(start for start in found if start > 1 and data[start - 2 : start] == b"\n\n")]
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        mail = data[start:end]
        if mail.startswith(b"From "):
            mail = mail.partition(b"\n")[2]
        yield re.sub(rb"^>(>*From )", rb"\1", mail, flags=re.MULTILINE)


def _mail_text(data: bytes, inner: Inner, left_out: list[str]) -> str:
    if data.count(b"\n--") > 50_000 or data[:_MOST_HEADER].count(b"\0"):
        raise Unreadable("not a mail")
    message = BytesParser(policy=_Raw()).parsebytes(data)
    if not any(message.get(header) for header in (*_HEADERS, "Content-Type", "MIME-Version", "Message-ID")):
        raise Unreadable("not a mail: it has no headers")
    return "\n\n".join([*_heading(message, "#", left_out), *_body(message, inner, left_out)])


def _heading(message: Message, signs: str, left_out: list[str]) -> list[str]:
    """The subject as a heading, and the headers that a person reads."""
    long = [name for name, value in message.raw_items() if len(value) > _MOST_HEADER and name.title() in _HEADERS]
    left_out += [f"the header {name} behind its first {_MOST_HEADER:,} characters" for name in long]
    lines = [f"{header}: {value}" for header in _HEADERS if (value := _header(message, header))]
    subject = _header(message, "Subject")
    return [part for part in (f"{signs} {subject}" if subject else "", "\n".join(lines)) if part]


def _header(message: Message, name: str) -> str:
    """A header as a person reads it; as it is written where it cannot be decoded."""
    raw = str(message.get(name, ""))[:_MOST_HEADER]
    try:
        text = str(make_header(decode_header(raw)))
    except (LookupError, ValueError, MessageError):
        text = raw
    if re.search("[\udc80-\udcff]", text):
        text, _ = decode(text.encode("utf-8", "surrogateescape"))
    return " ".join(text.split())


def _body(message: Message, inner: Inner, left_out: list[str]) -> list[str]:
    texts: list[str] = []
    for number, part in enumerate(_parts(message, left_out)):
        if number >= _MOST_PARTS:
            left_out.append(f"parts after the first {_MOST_PARTS}")
            break
        kind, name = part.get_content_type(), _file_name(part)
        if part.is_multipart():
            if kind == "message/rfc822":
                texts += _heading(part.get_payload(0), "##", left_out)  # type: ignore[arg-type]
        elif kind in _SIGNATURES:
            continue
        elif kind in ("text/plain", "text/html") and (not name or not _is_attached(part)):
            texts.append(_text(part, kind, left_out))
        elif name or kind.startswith("text/"):
            texts += _attached(part, name or "attachment.txt", inner, left_out)
        else:
            left_out.append(f"a part of the kind {kind}")
    return texts


def _parts(message: Message, left_out: list[str]) -> Iterator[Message]:
    """The parts to be read: of alternatives one, the plain text where it says anything."""
    stack, deeper = [(message, 0)], 0
    while stack:
        part, depth = stack.pop()
        if depth > _MOST_DEPTH:
            deeper += 1
            continue
        yield part
        payload = part.get_payload() if part.is_multipart() else ""
        inside = [item for item in payload if isinstance(item, Message)] if isinstance(payload, list) else []
        if part.get_content_type() == "multipart/alternative" and inside:
            inside = [_chosen(inside)]
        stack += [(item, depth + 1) for item in reversed(inside)]
    if deeper:
        left_out.append(f"{deeper} part{'s' * (deeper > 1)} nested more than {_MOST_DEPTH} deep")


def _chosen(alternatives: list[Message]) -> Message:
    for item in alternatives:
        if item.get_content_type() == "text/plain" and len(_payload(item).strip()) > 1:
            return item
    return alternatives[-1]


def _is_attached(part: Message) -> bool:
    return str(part.get("Content-Disposition", "")).lower().lstrip().startswith("attachment")


def _file_name(part: Message) -> str:
    try:
        name = part.get_filename() or ""
        return " ".join(str(make_header(decode_header(name))).split())[:200]
    except (LookupError, ValueError, TypeError, MessageError):
        return "attachment"


def _payload(part: Message) -> bytes:
    try:
        payload = part.get_payload(decode=True)
    except (LookupError, ValueError, AssertionError):
        return b""
    return payload if isinstance(payload, bytes) else b""


def _text(part: Message, kind: str, left_out: list[str]) -> str:
    data = _payload(part)
    if not data.strip():
        return ""
    text, notes = decode(data, declared=_parameter(part, "charset"))
    if kind == "text/html":
        text, hidden = html_text(text)
        notes += hidden
    elif _parameter(part, "format").lower() == "flowed":
        text = _flowed(text, joined=_parameter(part, "delsp").lower() == "yes")
    left_out += notes
    return text.strip("\n")


def _parameter(part: Message, name: str) -> str:
    """A parameter of the part's kind; empty where it cannot be told."""
    try:
        value = part.get_param(name) or ""
    except (LookupError, ValueError, TypeError):
        return ""
    return value if isinstance(value, str) else value[2]


def _flowed(text: str, *, joined: bool) -> str:
    """Lines that end in a space go on in the next one of the same quotation (RFC 3676); joined: without the space."""
    lines: list[str] = []
    goes_on, depth = False, 0
    for line in text.split("\n"):
        quoted = len(line) - len(line.lstrip(">"))
        content = line[quoted:].removeprefix(" ")
        if goes_on and quoted == depth and content != "-- ":
            lines.append(content)
        else:
            lines.append(f"{chr(10) if lines else ''}{'>' * quoted}{' ' if quoted else ''}{content}")
        depth, goes_on = quoted, content.endswith(" ") and content != "-- "
        if goes_on and joined:
            lines[-1] = lines[-1][:-1]
    return "".join(lines)


def _attached(part: Message, name: str, inner: Inner, left_out: list[str]) -> list[str]:
    data = _payload(part)
    try:
        document = inner(data, name)
    except Unreadable as error:
        left_out.append(f"attachment {name} ({len(data):,} bytes): {error}")
        return []
    left_out += [f"attachment {name}: {note}" for note in document.left_out]
    return [f"## Attachment {name}\n\n{document.text}"] if document.text.strip() else []
