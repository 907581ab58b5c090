"""Lines that end at words, for a text that comes in pieces and is shown at once."""

import unicodedata
from collections.abc import Callable

_BLANKS = " \t"
_TAB = 8
# Unicode's categories of what does not begin a line, or end one: marks, punctuation, and parts of one sign.
_NO_START = {"Mn", "Mc", "Me", "Cf", "Lm", "Sk", "Pe", "Pf", "Po"}
_NO_END = {"Cf", "Ps", "Pi"}


class Wrap:
    """Holds back the last word of what it is fed, until it is known how long that is.

    A word that is wider than the terminal is left to the terminal, so that it can be copied, and shown as it comes:
    Thai has no blanks, and a row of digits may be all of an answer. Between wide characters, as Chinese and Japanese
    have them, a line may end without a blank.
    """

    def __init__(self, columns: Callable[[], int]):
        """columns: of the terminal, which may change; 0 where that is not known, and no line is broken."""
        self._columns = columns
        self._column = 0  # where the next character goes
        self._blanks = self._word = ""
        self._begun = False  # whether the word's beginning was shown

    def feed(self, text: str) -> str:
        """More text -> what can be shown of it and of what was held back."""
        return "".join(self._add(character) for character in text)

    def finish(self) -> str:
        """What is held back still."""
        shown = self._placed() if self._word else ""
        self._begun = False
        return shown

    def _add(self, character: str) -> str:
        shown = ""
        if character == "\n":
            shown = self.finish() + "\n"
            self._column, self._blanks = 0, ""
        elif character in _BLANKS:
            shown = self.finish()
            self._blanks += character
        else:
            if self._word and _may_break(self._word[-1], character):
                shown = self.finish()
            self._word += character
            if 0 < 2 * self._columns() <= len(self._word):  # then it is wider, even if half of it are marks
                shown += self._placed()
                self._begun = True
        return shown

    def _placed(self) -> str:
        """The word, or more of it, with the blanks before it, or on a new line."""
        from rich.cells import cell_len  # takes longer than an answer's first word of a server

        columns, start = self._columns(), self._column
        for blank in self._blanks:
            start += _TAB - start % _TAB if blank == "\t" else 1
        blanks, self._blanks = self._blanks, ""
        word, self._word = self._word, ""
        width = cell_len(word)
        if self._column and not self._begun and 0 < columns < start + width:
            blanks, start = "\n", 0
        self._column = start + width
        if 0 < columns < self._column:  # the terminal breaks the word itself
            self._column = (self._column - 1) % columns + 1
        return blanks + word


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters that are no blanks."""
    if not (_is_wide(before) or _is_wide(after)):
        return False
    return unicodedata.category(before) not in _NO_END and unicodedata.category(after) not in _NO_START


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"
