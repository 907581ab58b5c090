"""Shared by all commands: exit codes, messages, progress bars, common options, and loading a .nectar with its model.

The answer or the JSON goes to stdout, everything else to stderr. Exit codes: 0 done; 2 an error in the user's input,
with one line that says what is wrong and what to do; 130 interrupted.
"""

import argparse
import math
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from .core import terminal
from .core.progress import Update
from .errors import NectarError

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.nn as nn

    from .core.types import Tokenizer
    from .nectar import Nectar

DONE, FAULT, INTERRUPTED = 0, 2, 130
_quiet = False  # of the command that runs: no notices


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
        self.exit(FAULT, terminal.one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses the arguments and does the work. An error becomes an exit code and one line."""
    global _quiet
    _quiet = False
    for stream in (sys.stdout, sys.stderr):  # what an encoding has no character for is written out, not an error
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
        _quiet = getattr(args, "quiet", False)
        work(args)
        sys.stdout.flush()
    except SystemExit as exit:  # argparse: after --help, or after its message about an error
        return exit.code if isinstance(exit.code, int) else FAULT
    except NectarError as error:
        complain(f"{parser.prog}: {error}")
        return FAULT
    except BrokenPipeError:  # the reader of our output is gone, so there is no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        complain(f"{parser.prog}: interrupted")
        return INTERRUPTED
    return DONE


def say(line: str) -> None:
    """One line for a person, on stderr; nothing with --quiet."""
    if not _quiet:
        complain(line)


def complain(line: str) -> None:
    """One line for a person, on stderr, with --quiet, too: what is wrong."""
    print(terminal.one_line(line), file=sys.stderr, flush=True)


def show(text: str, *, end: str = "\n") -> None:
    """Text of an answer or a file, on stdout: as it is in a file or a pipe, without escape sequences on a terminal."""
    print(terminal.shown_on(sys.stdout, text), end=end, flush=True)


def hint(text: str) -> None:
    """Text on stderr as it comes, such as a model's thoughts; nothing with --quiet."""
    if not _quiet:
        print(terminal.shown_on(sys.stderr, text), end="", file=sys.stderr, flush=True)


def paragraph(text: str) -> None:
    """A text on stdout, in lines as wide as the terminal."""
    show(textwrap.fill(text, _width(), break_on_hyphens=False, break_long_words=False))


def row(label: str, value: str) -> None:
    """A name and its value on stdout, side by side."""
    indent = " " * 20
    whole = {"break_on_hyphens": False, "break_long_words": False}  # so that a path can be copied
    show(textwrap.fill(f"{label:<19} {value}", _width(), subsequent_indent=indent, **whole) if value else label)


def _width() -> int:
    """Columns of the terminal, 100 at most; a file or a pipe gets 100."""
    return max(40, min(100, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100))


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `run` looks for."""
    parser.add_argument("--quiet", "-q", action="store_true", help="the answer alone: no notices, no progress")


@contextmanager
def progress(description: str, total: int, /) -> Iterator[Update]:
    """A `core.progress.Progress` that draws a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    label = TextColumn("{task.description}")
    columns = (SpinnerColumn(), label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=_quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


def add_nectar(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `load`."""
    parser.add_argument("nectar", help="a .nectar file, or the id of one on the hub (user/name)")
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")


def load(path: str, model_name: str | None = None) -> "tuple[nn.Module, Tokenizer, Nectar]":
    """The model, the tokenizer and the .nectar; NectarError if it is damaged or was fitted on another model."""
    from . import models, store
    from .models import hub

    file = hub.nectar_file(path)
    model, tokenizer = models.load(model_name or store.model_name(file), log=say)
    return model, tokenizer, load_nectar(file, model, tokenizer)


def load_nectar(file: "Path", model: "nn.Module", tokenizer: "Tokenizer") -> "Nectar":
    """`Nectar.load` with its warnings as lines on stderr."""
    from .nectar import Nectar

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        nectar = Nectar.load(file, model, tokenizer)
    for warning in caught:
        say(str(warning.message))
    if not nectar.faithful:
        say(f"{file.name}: {nectar.verdict}")
    return nectar


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `writing.write`."""
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="the longest answer (512, or fewer if the model's window is nearly full)",
    )
    parser.add_argument(
        "--temp", type=_temperature, default=0.0, metavar="T", help="sampling temperature (0: the likeliest token)"
    )
    parser.add_argument(
        "--top-p", type=_mass, default=1.0, metavar="P", help="sample from the likeliest tokens of this mass (1)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the sampling (0)")
    parser.add_argument("--allow-loops", action="store_true", help="do not stop a model that repeats itself")
    parser.add_argument("--think", action="store_true", help="let the model think before it answers, if it can")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="bits of the conversation's own cache")


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    """Adds the option for a .nectar that has a file of exact keys."""
    parser.add_argument(
        "--exact",
        type=share,
        metavar="SHARE",
        help="largest share of the text's keys to read exactly at each step (0.01 with a .kv file, else 0)",
    )


def add_chunks(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `chunk_for`."""
    parser.add_argument(
        "--whole",
        action="store_true",
        help="answer from all chunks of a text that was read in chunks, not from the one nearest to the question",
    )


def chunk_for(nectar: "Nectar", tokenizer: "Tokenizer", question: str, args: argparse.Namespace) -> int | None:
    """The chunk nearest to the question, with a line that names it; None for the whole text."""
    chunk = None if args.whole else nectar.nearest(tokenizer, question)
    if chunk is not None:
        say(f"from chunk {chunk + 1} of {len(nectar.chunks)}")
    return chunk


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `check_sources`."""
    parser.add_argument("--sources", action="store_true", help="show the passages that the answer used most")


def check_sources(nectar: "Nectar", args: argparse.Namespace) -> None:
    """NectarError if sources are wanted but no exact keys are read."""
    if args.sources:
        nectar.hybrid.check_reads(args.exact)


def _number(text: str, low: float, high: float, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:  # NaN, too
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, 0, 1, "a number from 0 to 1")


def _temperature(text: str) -> float:
    return _number(text, 0, 5, "a temperature from 0 to 5")


def _mass(text: str) -> float:
    return _number(text, 1e-9, 1, "above 0 and at most 1")


def _seed(text: str) -> int:
    return _integer(text, 0, 2**64 - 1, "a whole number from 0 to 2^64 - 1")


def _positive(text: str) -> int:
    return _integer(text, 1, 10**9, "a whole number from 1 to a billion")


def _integer(text: str, low: int, high: int, wanted: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)


def size(text: str) -> int:
    """Bytes from a text such as 500M or 4G (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 4G")
    number = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    return int(min(number, 1e18))  # a text of enough digits is an infinity
