"""The parser of every command's arguments: errors are one line that says what was meant."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from .core import terminal

FAULT = 2  # the exit code of an error in the user's input


class _HelpFormatter(argparse.HelpFormatter):
    """Breaks lines between words only, so that a name with hyphens can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line. command: the name that follows `nectar`."""

    def __init__(self, command: str, description: str | None = None):
        super().__init__(
            prog=f"nectar {command}", description=description, allow_abbrev=False, formatter_class=_HelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        required = message.removeprefix("the following arguments are required: ")
        if required != message:
            message = self._missing(required.split(", ")[0])
        self.exit(FAULT, terminal.printable(f"{self.prog}: {message} (see {self.prog} --help)", one_line=True) + "\n")

    def _missing(self, name: str) -> str:
        """What the argument of this name is for: argparse names it only."""
        for action in self._actions:
            if action.help and name in (*action.option_strings, action.metavar, action.dest):
                return f"{name} is missing: {action.help}"
        return f"{name} is missing"


def refuse_unknown(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Ends with an error for the first option that there is not: argparse would first miss the one that is misspelled,
    and does not say which was meant."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in takewhile(lambda word: word != "--", argv):
        name = word.partition("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w-]+", name) and name not in known:
            import difflib  # an answer does not need it

            near = difflib.get_close_matches(f"--{name.lstrip('-')}", known, n=1)
            parser.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
