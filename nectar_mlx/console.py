"""What commands say to a person: lines, notices and answers, and the progress of a task.

The answer or the JSON goes to stdout, everything else to stderr.
"""

import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

from .core import terminal
from .core.clock import duration
from .core.wrapping import Wrap

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .core.progress import Overall, Status, Update

LINE_SECONDS = 10.0  # between lines of progress, where there is no terminal
_quiet = False  # of the command that runs: no notices


def set_quiet(quiet: bool) -> None:
    """Whether the command that runs says its answer alone: no notices, no progress."""
    global _quiet
    _quiet = quiet


def say(line: str) -> None:
    """One line for a person, on stderr; nothing with --quiet."""
    if not _quiet:
        complain(line)


def complain(line: str) -> None:
    """One line for a person, on stderr, with --quiet, too: what is wrong."""
    flow = Flow(_tell, sys.stderr)
    flow.add(terminal.printable(line, one_line=True) + "\n")


def show(text: str = "", *, end: str = "\n") -> None:
    """An answer, or a part of one, on stdout."""
    print(terminal.printable(text), end=end, flush=True)


def hint(text: str) -> None:
    """Text on stderr as it comes, such as a model's thoughts; nothing with --quiet."""
    if not _quiet:
        _tell(terminal.printable(text))


class Flow:
    """A text that is shown as it comes. At a terminal its lines end at words; elsewhere nothing is changed."""

    def __init__(self, show: Callable[[str], None], stream: TextIO):
        """show: of this module, that shows a part of a text. stream: that it writes to."""
        self._show = show
        at_terminal = stream is not None and stream.isatty()  # Python has none where a program has no console
        self._wrap = Wrap(lambda: _columns(stream)) if at_terminal else None

    def add(self, text: str) -> None:
        self._show(text if self._wrap is None else self._wrap.feed(terminal.printable(text)))

    def finish(self) -> None:
        """Shows the last word."""
        if self._wrap is not None:
            self._show(self._wrap.finish())


def answering() -> Flow:
    """An answer on stdout, as `show` shows it."""
    return Flow(partial(show, end=""), sys.stdout)


def show_answer(text: str) -> None:
    """A whole answer, or what belongs to it, on stdout."""
    answering().add(f"{text}\n")


def thinking() -> Flow:
    """A model's thoughts on stderr, as `hint` shows them."""
    return Flow(hint, sys.stderr)


def _columns(stream: TextIO) -> int:
    """Of the terminal that a stream writes to; 0 where that is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _tell(text: str) -> None:
    """On stderr; where that cannot be written (a log on a full disk), there is nobody to tell, and the work goes on."""
    with suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


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
    """The part of the task, or else the number of the stage where there are several; the stage, and how much of it is
    done."""
    number = f"stage {status.stage} of {status.stages}, " if status.stages > 1 else ""
    number = f"{status.part}, " if status.part else number
    part = f" ({min(status.done, status.total):,} of {status.total:,})" if status.total > 1 else ""
    return f"{number}{status.description}{part}"


def _times(status: "Status") -> str:
    total = f" of about {duration(status.total_seconds)}" if status.total_seconds is not None else ""
    return f"{duration(status.elapsed)}{total}"
