"""Text from files and models, made harmless for a terminal."""

import re

# Control characters but tab and line break, what turns the direction of the text around it, and lone surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ACTIVE_OR_BREAK = re.compile(f"{_ACTIVE.pattern}|[\t\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    """The text with what a terminal would obey instead of show written out, as Python does: ESC is `\\x1b`.

    one_line: line breaks and tabs are, too, so that a name cannot pretend to be the next line.
    """
    pattern = _ACTIVE_OR_BREAK if one_line else _ACTIVE
    return pattern.sub(lambda match: repr(match[0])[1:-1], text)
