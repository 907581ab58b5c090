"""What all commands share: exit codes, messages, progress, and loading a .nectar with its model.

stdout carries the answer or the JSON, stderr everything else. Exit codes: 0 done, 2 the user's input is at fault (one
line says what is wrong and what to do), 130 interrupted.
"""

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import NectarError

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.nn as nn

    from .nectar import Nectar

DONE, FAULT, INTERRUPTED = 0, 2, 130


class _WholeNames(argparse.HelpFormatter):
    """Lines end between words: a name with hyphens can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line. `command` is the command's name as typed after `nectar`."""

    def __init__(self, command: str, description: str | None = None):
        super().__init__(
            prog=f"nectar {command}", description=description, allow_abbrev=False, formatter_class=_WholeNames
        )

    def error(self, message: str) -> NoReturn:
        self.exit(FAULT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses the arguments, does the work, and turns what can go wrong into an exit code and one line."""
    try:
        work(parser.parse_args(argv))
        sys.stdout.flush()
    except SystemExit as leaving:  # argparse: --help, or arguments that it has complained about
        return leaving.code if isinstance(leaving.code, int) else FAULT
    except NectarError as error:
        say(f"{parser.prog}: {error}")
        return FAULT
    except BrokenPipeError:  # whoever read our output has left: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return INTERRUPTED
    return DONE


def say(line: str) -> None:
    """One line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs; yields what to tell how many of `total` are done. Needs a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


def add_nectar(parser: argparse.ArgumentParser) -> None:
    """The arguments of `load`."""
    parser.add_argument("nectar", help="a .nectar file, or the id of one on the hub (user/name)")
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")


def load(path: str, model_name: str | None = None) -> "tuple[nn.Module, Any, Nectar]":
    """A .nectar with its model and tokenizer; NectarError if it is damaged or was fitted on another model."""
    from . import models, store
    from .models import hub

    file = hub.nectar_file(path)
    model, tokenizer = models.load(model_name or store.model_name(file), log=say)
    return model, tokenizer, load_nectar(file, model, tokenizer)


def load_nectar(file: "Path", model: "nn.Module", tokenizer: Any) -> "Nectar":
    """`Nectar.load`, its warnings as lines for a person."""
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
    """The arguments of `generate`."""
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="of an answer (512, or as many as the model's window has room for)",
    )
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature (0: the likeliest token)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--think", action="store_true", help="let a model that can think do so before it answers")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="quantise the conversation's own cache")


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    """The options of answers from a .nectar with exact keys beside it."""
    parser.add_argument(
        "--exact",
        type=share,
        metavar="SHARE",
        help="of the text's keys to read exactly at each step, at most (0.01 if there is a .kv file, else 0)",
    )


def add_chunks(parser: argparse.ArgumentParser) -> None:
    """The option of `chunk_for`."""
    parser.add_argument(
        "--whole",
        action="store_true",
        help="answer from all parts of a text that was read in parts, not from the one nearest to the question",
    )


def chunk_for(nectar: "Nectar", tokenizer: Any, question: str, args: argparse.Namespace) -> int | None:
    """The part of a text read in parts that a question is answered from, which a person is told; None: all of it."""
    number = None if args.whole else nectar.nearest(tokenizer, question)
    if number is not None:
        say(f"from part {number + 1} of {len(nectar.chunks)}")
    return number


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The option of `check_sources`."""
    parser.add_argument("--sources", action="store_true", help="tell the passages that an answer rests on")


def check_sources(nectar: "Nectar", args: argparse.Namespace) -> None:
    """NectarError if sources are asked for that no exact key can tell."""
    if args.sources and not nectar.hybrid_banks(args.exact):
        raise NectarError("only exact keys tell sources: fit with --kind hybrid, and leave --exact above 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def generate(
    model: "nn.Module",
    tokenizer: Any,
    prompt: Sequence[int],
    cache: Sequence[Any],
    args: argparse.Namespace,
    *,
    max_tokens: int,
) -> Iterator[Any]:
    """mlx-lm's responses to a prompt behind a cache, under the options of `add_generation`. max_tokens: of the answer,
    as `window.answer_tokens` allows.
    """
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(args.seed)
    sampler = make_sampler(args.temp, top_p=args.top_p)
    yield from stream_generate(
        model, tokenizer, list(prompt), max_tokens=max_tokens, sampler=sampler, prompt_cache=list(cache)
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
