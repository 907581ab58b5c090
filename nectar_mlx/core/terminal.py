"""What a terminal may be shown, what is typed at it, and yes-or-no questions."""

import re
import sys

from ..errors import NectarError

# Control characters but tab and line break, what turns the direction of the text around it, and lone surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ACTIVE_OR_BREAK = re.compile(f"{_ACTIVE.pattern}|[\t\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    """The text with what a terminal would obey instead of show written out, as Python does: ESC is `\\x1b`.

    one_line: line breaks and tabs are, too, so that a name cannot pretend to be the next line.
    """
    pattern = _ACTIVE_OR_BREAK if one_line else _ACTIVE
    return pattern.sub(lambda match: repr(match[0])[1:-1], text)


def quoted(document: str, place: str, score: float, text: str) -> str:
    """A passage of a document as one line: where it stands, how much of an answer it supports, its words."""
    where = ", ".join(filter(None, [document, place])) or "the text"
    return f"{where} ({score:.0%}): {' '.join(text.split())}"


def typed(text: str, where: str) -> str:
    """A text that a person gave; NectarError unless it is Unicode. where: the place, for the message."""
    bad = re.search("[\ud800-\udfff]", text)
    if bad is None:
        return text
    code = ord(bad[0])
    what = f"a byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair, U+{code:04X}"
    raise NectarError(f"{where} is not UTF-8 text: it has {what}, at character {bad.start() + 1}")


def standard_input(*, line: bool = False) -> str:
    """Everything on standard input, or its next line; NectarError unless it is UTF-8."""
    try:
        return typed(sys.stdin.readline() if line else sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise NectarError(f"standard input is not UTF-8 text: byte 0x{byte:02x} at {error.start:,}") from None


def at_terminal() -> bool:
    """Whether a person can be asked something."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, *, otherwise: str) -> bool:
    """Asks a yes-or-no question on stderr; the end of input is a no. Where there is no terminal, NectarError with the
    question's reason and what to do otherwise."""
    if not at_terminal():
        raise NectarError(f"{printable(question, one_line=True)} There is no terminal to answer at: {otherwise}")
    while True:
        print(f"{printable(question, one_line=True)} [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            print(file=sys.stderr)
        if answer.strip().lower() in ("y", "yes"):
            return True
        if answer.strip().lower() in ("", "n", "no"):
            return False
