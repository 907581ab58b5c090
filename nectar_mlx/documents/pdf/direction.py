"""Hebrew, Arabic and other scripts that run from right to left: from the order on the page to that of reading."""

import re

_LETTERS = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff"
_STRETCH = re.compile(f"[{_LETTERS}]+|[^{_LETTERS}]+")
_LETTER = re.compile(f"[{_LETTERS}]")
_CLOSING = {")": "(", "]": "[", "}": "{"}


def is_right_to_left(text: str) -> bool:
    """Whether a text holds letters of such a script."""
    return _LETTER.search(text) is not None


def runs_right_to_left(text: str) -> bool:
    """Whether a line is read from the right: most of its letters are."""
    count = len(_LETTER.findall(text))
    return count > 0 and 2 * count >= sum(character.isalpha() for character in text)


def logical(line: str) -> str:
    """A line in the order of reading, from its characters in the order on the page, left to right."""
    if not is_right_to_left(line):
        return line
    if not runs_right_to_left(line):
        return re.sub(f"[{_LETTERS}](?:[{_LETTERS} ]*[{_LETTERS}])?", lambda match: match[0][::-1], line)
    pieces = [_reversed(stretch) for stretch in reversed(_STRETCH.findall(line))]
    return _with_brackets("".join(pieces))


def _reversed(stretch: str) -> str:
    """A stretch of one direction; words and numbers of the other direction inside stay as they are."""
    if is_right_to_left(stretch):
        return stretch[::-1]
    core = re.search(r"\w(?:.*\w)?", stretch, re.DOTALL)
    if core is None:
        return stretch[::-1]
    inside = core[0]
    if not any(character.isalpha() for character in inside):  # numbers stand in the line's own order
        inside = "".join(reversed(re.split(r"(\s+)", inside)))
    return stretch[core.end() :][::-1] + inside + stretch[: core.start()][::-1]


def _with_brackets(text: str) -> str:
    """Brackets are drawn mirrored in such lines, and pdfium turns some of them back: here the first one opens."""
    opened: list[str] = []
    fixed = []
    for character in text:
        opening = _CLOSING.get(character) or (character if character in _CLOSING.values() else "")
        if not opening:
            fixed.append(character)
        elif opening in opened:
            opened.remove(opening)
            fixed.append(next(closing for closing, other in _CLOSING.items() if other == opening))
        else:
            opened.append(opening)
            fixed.append(opening)
    return "".join(fixed)
