"""Shared by all commands: exit codes, messages, progress bars, common options, and loading a .nectar with its model.

The answer or the JSON goes to stdout, everything else to stderr. Exit codes: 0 done; 2 an error in the user's input,
with one line that says what is wrong and what to do; 130 interrupted.
"""

import argparse
import os
import re
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

from .core.clock import duration
from .core.progress import Overall, Status, Update
from .core.terminal import printable
from .core.types import LayerCache, Tokenizer
from .errors import NectarError

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.nn as nn
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from rich.console import RenderableType

    from .nectar import Nectar

DONE, FAULT, INTERRUPTED = 0, 2, 130
LINE_SECONDS = 10.0  # between lines of progress, where there is no terminal


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
        self.exit(FAULT, f"{self.prog}: {printable(message, one_line=True)} (see {self.prog} --help)\n")


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses the arguments and does the work. An error becomes an exit code and one line."""
    try:
        work(parser.parse_args(argv))
        sys.stdout.flush()
    except SystemExit as exit:  # argparse: after --help, or after its message about an error
        return exit.code if isinstance(exit.code, int) else FAULT
    except NectarError as error:
        say(f"{parser.prog}: {printable(str(error), one_line=True)}")
        return FAULT
    except BrokenPipeError:  # the reader of our output is gone, so there is no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return INTERRUPTED
    return DONE


def say(line: str) -> None:
    """A line for a person, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def show(text: str = "", *, end: str = "\n") -> None:
    """An answer, or a part of one, on stdout."""
    print(printable(text), end=end, flush=True)


@contextmanager
def progress(description: str, total: int, /) -> Iterator[Update]:
    """A `core.progress.Progress` of a task that has one stage, or tells each on its own."""
    with overall() as task, task(description, total) as update:
        yield update


@contextmanager
def overall() -> "Iterator[Overall]":
    """A progress of all stages of a task: one bar on a terminal, else a line every LINE_SECONDS, on stderr."""
    from rich.console import Console
    from rich.live import Live

    task, console = Overall(), Console(stderr=True)
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


def _say_status(task: Overall, ended: threading.Event) -> None:
    while not ended.wait(LINE_SECONDS):
        status = task.status()
        if status.description:
            say(f"{_stage(status)}: {status.share:.0%}, {_times(status)}")


def _bar(status: Status) -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1, completed=status.share, width=30)
    row.add_row(Text(_stage(status)), bar, Text(f"{status.share:3.0%}  {_times(status)}"))
    return row


def _stage(status: Status) -> str:
    """The stage, its number where there are several, and how much of it is done."""
    number = f"stage {status.stage} of {status.stages}, " if status.stages > 1 else ""
    part = f" ({min(status.done, status.total):,} of {status.total:,})" if status.total > 1 else ""
    return f"{number}{status.description}{part}"


def _times(status: Status) -> str:
    total = f" of about {duration(status.total_seconds)}" if status.total_seconds is not None else ""
    return f"{duration(status.elapsed)}{total}"


def add_nectar(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `load`."""
    parser.add_argument("nectar", help="a .nectar file, or the id of one on the hub (user/name)")
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")
    add_fetch(parser)


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `may_fetch`."""
    parser.add_argument("--fetch", action="store_true", help="download the model that the file names if it is not here")


def may_fetch(name: str, *, fetch: bool) -> bool:
    """Whether to download the model that a file names: whoever made the file chose it, so the user is asked."""
    if fetch or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return fetch
    print(f"The file names the model {printable(name, one_line=True)}, which is not here. Download it? [y/N] ", end="",
          file=sys.stderr, flush=True)  # fmt: skip
    return sys.stdin.readline().strip().lower() in ("y", "yes")


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


def load_nectar(file: "Path", model: "nn.Module", tokenizer: Tokenizer) -> "Nectar":
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
    """Adds the arguments of `generate`."""
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="the longest answer (512, or fewer if the model's window is nearly full)",
    )
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature (0: the likeliest token)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
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


def chunk_for(nectar: "Nectar", tokenizer: Tokenizer, question: str, args: argparse.Namespace) -> int | None:
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


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def size(text: str) -> int:
    """Bytes from a text such as 500M or 4G (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 4G")
    number = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    return int(min(number, 1e18))  # a text of enough digits is an infinity


def generate(
    model: "nn.Module",
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    cache: Sequence[LayerCache],
    args: argparse.Namespace,
    *,
    max_tokens: int,
) -> "Iterator[GenerationResponse]":
    """mlx-lm's responses to a prompt behind a cache, with the options of `add_generation`. max_tokens: the longest
    answer, from `window.answer_tokens`.
    """
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(args.seed)
    sampler = make_sampler(args.temp, top_p=args.top_p)
    yield from stream_generate(
        model,
        cast("TokenizerWrapper", tokenizer),
        list(prompt),
        max_tokens=max_tokens,
        sampler=sampler,
        prompt_cache=list(cache),
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
