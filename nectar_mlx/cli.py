"""Shared by all commands: exit codes, messages, progress bars, common options, and loading a .nectar with its model.

The answer or the JSON goes to stdout, everything else to stderr. Exit codes: 0 done; 2 an error in the user's input,
with one line that says what is wrong and what to do; 130 interrupted.
"""

import argparse
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, cast

from .core.progress import Update
from .core.types import LayerCache, Tokenizer
from .errors import NectarError

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.nn as nn
    from mlx_lm.generate import GenerationResponse
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .nectar import Nectar
    from .retrieval.sources import Source

DONE, FAULT, INTERRUPTED = 0, 2, 130


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
        self.exit(FAULT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses the arguments and does the work. An error becomes an exit code and one line."""
    try:
        work(parser.parse_args(argv))
        sys.stdout.flush()
    except SystemExit as exit:  # argparse: after --help, or after its message about an error
        return exit.code if isinstance(exit.code, int) else FAULT
    except NectarError as error:
        say(f"{parser.prog}: {error}")
        return FAULT
    except BrokenPipeError:  # the reader of our output is gone, so there is no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return INTERRUPTED
    return DONE


def say(line: str) -> None:
    """One line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int, /) -> Iterator[Update]:
    """A `core.progress.Progress` that draws a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    label = TextColumn("{task.description}")
    columns = (SpinnerColumn(), label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
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
    """Adds the options of `show_sources`."""
    parser.add_argument("--sources", action="store_true", help="show the passages that say what the answer says")
    parser.add_argument(
        "--cite", action="store_true", help="mark each sentence with its source's number, or [?] if none supports it"
    )


def show_sources(sources: "Sequence[Source]") -> None:
    """A line each, numbered from 1."""
    for number, source in enumerate(sources, 1):
        say(f"[{number}] {source.quoted()}")
    if not sources:
        say("no passage of the text says this")


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
