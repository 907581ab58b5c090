"""Whether a text ends in a loop: small models fall into one and never leave it, at temperature 0 for certain."""

import re

_LOOK_BACK = 4_000  # characters
_LENGTH = 240  # characters that a loop has, at least
_ROUNDS = 3
_EVERY = 64  # characters between two looks
_NUMBERING = re.compile(r"(?m)^\s*(?:\d+|[-*•])[.)]?\s+")  # of a list whose entries are all alike


class Repetition:
    """Watches a text that grows. `add` returns True once its end repeats itself.

    A loop is at least 3 rounds of the same characters, with 240 characters in all; the numbers of a list do not count.
    Runs of one punctuation mark (a line under a heading, a table's border) and blanks are none.
    """

    def __init__(self) -> None:
        self._tail, self._unseen = "", 0

    def add(self, piece: str) -> bool:
        """piece: what the text is longer by."""
        self._tail = (self._tail + piece)[-_LOOK_BACK:]
        self._unseen += len(piece)
        if self._unseen < _EVERY:
            return False
        self._unseen = 0
        return loops(self._tail)


def loops(text: str) -> bool:
    """Whether a text ends in a loop."""
    text = _NUMBERING.sub("", text)
    backwards = text[::-1]
    # borders[i]: the longest proper prefix of backwards[:i + 1] that is also its suffix; its period follows (Knuth,
    # Morris, Pratt).
    borders, border = [0] * len(backwards), 0
    for i in range(1, len(backwards)):
        while border and backwards[i] != backwards[border]:
            border = borders[border - 1]
        border += backwards[i] == backwards[border]
        borders[i] = border
        period = i + 1 - border
        if i + 1 >= max(_LENGTH, _ROUNDS * period) and re.search(r"\w", backwards[:period]):
            return True
    return False
