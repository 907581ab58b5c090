"""What a terminal may be shown, what is typed at it, and yes-or-no questions."""

import re
import sys
from typing import TextIO

from ..errors import NectarError

# Control characters but tab and newline, marks that reverse the direction of writing, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which control characters are written out: an escape sequence is shown as `\\x1b[31m`, not obeyed."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same, and line breaks are written out, too: a file's name cannot pass for a message of its own."""
    return printable(text).replace("\n", "\\n")


def shown_on(stream: TextIO, text: str) -> str:
    """`printable` where the stream is a terminal; a file or a program gets the text as it is."""
    return printable(text) if stream.isatty() else text


def typed(text: str, where: str) -> str:
    """A text that a person gave; NectarError unless it is Unicode. where: the place, for the message."""
    bad = re.search("[\ud800-\udfff]", text)
    if bad is None:
        return text
    code = ord(bad[0])
    what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair, U+{code:04X}"
    raise NectarError(f"{where} is not UTF-8 text: it has a {what}, at character {bad.start() + 1}")


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
        raise NectarError(f"{one_line(question)} There is no terminal to answer at: {otherwise}")
    while True:
        print(f"{one_line(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            print(file=sys.stderr)
        if answer.strip().lower() in ("y", "yes"):
            return True
        if answer.strip().lower() in ("", "n", "no"):
            return False
