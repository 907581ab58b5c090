"""Shared by all commands: exit codes, messages, progress bars, common options, and loading a .nectar with its model.

The answer or the JSON goes to stdout, everything else to stderr. Exit codes: 0 done; 2 an error in the user's input,
with one line that says what is wrong and what to do; 130 interrupted.
"""

import argparse
import os
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .core import numbers, terminal
from .core.clock import duration
from .core.numbers import share as share
from .core.numbers import size as size
from .errors import NectarError

if TYPE_CHECKING:
    import mlx.nn as nn
    from rich.console import RenderableType

    from .core.progress import Overall, Status, Update
    from .core.types import Tokenizer
    from .nectar import Nectar
    from .retrieval.sources import Source

DONE, FAULT, INTERRUPTED = 0, 2, 130
LIBRARY = "library"  # in the place of a .nectar
ASKED = "a .nectar file, the id of one on the hub (user/name), or the word library: all that `nectar add` took in"
LINE_SECONDS = 10.0  # between lines of progress, where there is no terminal
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
        self.exit(FAULT, terminal.printable(f"{self.prog}: {message} (see {self.prog} --help)", one_line=True) + "\n")


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
    print(terminal.printable(line, one_line=True), file=sys.stderr, flush=True)


def show(text: str = "", *, end: str = "\n") -> None:
    """An answer, or a part of one, on stdout."""
    print(terminal.printable(text), end=end, flush=True)


def hint(text: str) -> None:
    """Text on stderr as it comes, such as a model's thoughts; nothing with --quiet."""
    if not _quiet:
        print(terminal.printable(text), end="", file=sys.stderr, flush=True)


def paragraph(text: str) -> None:
    """A text on stdout, in lines as wide as the terminal."""
    show(textwrap.fill(text, _width(), break_on_hyphens=False, break_long_words=False))


def row(label: str, value: str) -> None:
    """A name and its value on stdout, side by side."""
    indent = " " * 20
    wrapper = textwrap.TextWrapper(_width(), subsequent_indent=indent, break_on_hyphens=False)
    wrapper.break_long_words = False  # so that a path can be copied
    show(wrapper.fill(f"{label:<19} {value}") if value else label)


def _width() -> int:
    """Columns of the terminal, 100 at most; a file or a pipe gets 100."""
    import shutil  # with the archive modules, which an answer does not need

    return max(40, min(100, shutil.get_terminal_size().columns if sys.stdout.isatty() else 100))


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `run` looks for."""
    parser.add_argument("--quiet", "-q", action="store_true", help="the answer alone: no notices, no progress")


@contextmanager
def progress(description: str, total: int, /) -> "Iterator[Update]":
    """A `core.progress.Progress` of a task that has one stage, or tells each on its own."""
    with overall() as task, task(description, total) as update:
        yield update


@contextmanager
def overall() -> "Iterator[Overall]":
    """A progress of all stages of a task: one bar on a terminal, else a line every LINE_SECONDS, on stderr."""
    from rich.console import Console
    from rich.live import Live

    from .core.progress import Overall

    task, console = Overall(), Console(stderr=True)
    if _quiet:
        yield task
        return
    if console.is_terminal:
        with Live(console=console, get_renderable=lambda: _bar(task.status()), refresh_per_second=4, transient=True):
            yield task
        return
    ended = threading.Event()
    thread = threading.Thread(target=_say_status, args=(task, ended), daemon=True)
    thread.start()
    try:
        yield task
    finally:
        ended.set()
        thread.join()


def _say_status(task: "Overall", ended: threading.Event) -> None:
    while not ended.wait(LINE_SECONDS):
        status = task.status()
        if status.description:
            say(f"{_stage(status)}: {status.share:.0%}, {_times(status)}")


def _bar(status: "Status") -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    # One line, whatever the terminal's width: of the stage's name as much as there is room for.
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    row.add_column()
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=1, completed=status.share, width=12)
    row.add_row(Text(_stage(status)), bar, Text(f"{status.share:3.0%} {_times(status)}"))
    return row


def _stage(status: "Status") -> str:
    """The stage, its number where there are several, and how much of it is done."""
    number = f"stage {status.stage} of {status.stages}, " if status.stages > 1 else ""
    part = f" ({min(status.done, status.total):,} of {status.total:,})" if status.total > 1 else ""
    return f"{number}{status.description}{part}"


def _times(status: "Status") -> str:
    total = f" of about {duration(status.total_seconds)}" if status.total_seconds is not None else ""
    return f"{duration(status.elapsed)}{total}"


def add_nectar(
    parser: argparse.ArgumentParser, *, what: str = "a .nectar file, or the id of one on the hub (user/name)"
) -> None:
    """Adds the arguments of `load`. what: that can be asked, for --help."""
    parser.add_argument("nectar", metavar="FILE", help=what)
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")
    add_fetch(parser)


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `may_fetch`."""
    parser.add_argument("--fetch", action="store_true", help="download the model that the file names if it is not here")


def may_fetch(name: str, *, fetch: bool) -> bool:
    """Whether to download the model that a file names: whoever made the file chose it, so the user is asked."""
    if fetch or not terminal.at_terminal():
        return fetch
    return terminal.confirm(f"The file names the model {name}, which is not here. Download it?", otherwise="")


def load(path: str, model_name: str | None = None, *, fetch: bool = False) -> "tuple[nn.Module, Tokenizer, Nectar]":
    """The model, the tokenizer and the .nectar; NectarError if it is damaged or was fitted on another model.

    model_name: which the user gave. fetch: whether one that only the file names may be downloaded without asking.
    """
    from . import models, store
    from .models import hub

    file = hub.nectar_file(path)
    allowed = None if model_name else partial(may_fetch, fetch=fetch)
    name = model_name or store.model_name(file)
    model, tokenizer = models.load(name, log=say, progress=progress, may_fetch=allowed)
    return model, tokenizer, load_nectar(file, model, tokenizer)


def load_nectar(file: Path, model: "nn.Module", tokenizer: "Tokenizer", *, name: str = "") -> "Nectar":
    """`Nectar.load` with its warnings as lines on stderr. name: what a person knows the file by, if not its own."""
    from .nectar import Nectar

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        nectar = Nectar.load(file, model, tokenizer)
    for warning in caught:
        say(str(warning.message))
    if not nectar.faithful:
        say(f"{name or file.name}: {nectar.verdict}")
    return nectar


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `writing.write`."""
    parser.add_argument(
        "--max-tokens",
        type=numbers.positive,
        metavar="N",
        help="the longest answer (512, or fewer if the model's window is nearly full)",
    )
    parser.add_argument(
        "--temp",
        type=numbers.temperature,
        default=0.0,
        metavar="T",
        help="sampling temperature (0: the likeliest token)",
    )
    parser.add_argument(
        "--top-p", type=numbers.mass, default=1.0, metavar="P", help="sample from the likeliest tokens of this mass (1)"
    )
    parser.add_argument("--seed", type=numbers.seed, default=0, metavar="N", help="seed of the sampling (0)")
    parser.add_argument("--allow-loops", action="store_true", help="do not stop a model that repeats itself")
    parser.add_argument("--think", action="store_true", help="let the model think before it answers, if it can")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="bits of the conversation's own cache")
    parser.add_argument(
        "--recall",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where an answer quotes the text, the text's own words count, if the fit found that it helps (yes)",
    )


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


def chunk_for(
    nectar: "Nectar",
    model: "nn.Module",
    tokenizer: "Tokenizer",
    question: str,
    args: argparse.Namespace,
    *,
    before: int | None = None,
) -> int | None:
    """The chunk nearest to the question, with a line that names it; None for the whole text.

    Where no word tells, the chunk of the question before, or else that behind which the question is likeliest.
    """
    if args.whole:
        return None
    chunk = nectar.nearest(tokenizer, question)
    if chunk is not None:
        say(f"from chunk {chunk + 1} of {len(nectar.chunks)}")
        return chunk
    if before is not None:
        say(f"no word of the question tells a chunk: it stays with chunk {before + 1} of {len(nectar.chunks)}")
        return before
    chunk = nectar.likeliest_chunk(model, tokenizer, question)
    if chunk is not None:
        say(f"no word of the question tells a chunk: it is likeliest behind chunk {chunk + 1} of {len(nectar.chunks)}")
    return chunk


def add_sources(parser: argparse.ArgumentParser, *, cite: bool = True) -> None:
    """Adds the options for an answer's sources."""
    parser.add_argument("--sources", action="store_true", help="show the passages that say what the answer says")
    if cite:
        parser.add_argument(
            "--cite",
            action="store_true",
            help="mark each sentence with its source's number, or [?] if none supports it",
        )


def add_library(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says where the library is."""
    parser.add_argument(
        "--library",
        type=Path,
        metavar="DIR",
        help="the library's folder (default: $NECTAR_LIBRARY, the settings', else in the user's data folder)",
    )


def source_lines(sources: "Sequence[Source]") -> list[str]:
    """A line for each, numbered from 1; one line that says so where there is none."""
    lines = [f"[{number}] {source.quoted()}" for number, source in enumerate(sources, 1)]
    return lines or ["no passage of the text says this"]
