"""Shared by all commands: exit codes, common options, and loading a .nectar with its model.

Exit codes: 0 done; 2 an error in the user's input, with one line that says what is wrong and what to do; 130
interrupted. What commands say goes through `console`.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import console
from .console import answering as answering
from .console import complain as complain
from .console import hint as hint
from .console import overall as overall
from .console import paragraph as paragraph
from .console import progress as progress
from .console import row as row
from .console import say as say
from .console import show as show
from .console import show_answer as show_answer
from .console import thinking as thinking
from .core import extras, interrupt, numbers, terminal
from .core.numbers import share as share
from .core.numbers import size as size
from .core.numbers import tokens as tokens
from .errors import NectarError
from .parser import FAULT as FAULT
from .parser import Parser as Parser
from .parser import refuse_unknown

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .core.types import Tokenizer
    from .nectar import Nectar
    from .retrieval.sources import Source

DONE, INTERRUPTED = 0, 130
LIBRARY = "library"  # in the place of a .nectar
NO_SOURCE = "no passage of the text says what the answer says"
ASKED = "a .nectar file, the id of one on the hub (user/name), or the word library: all that `nectar add` took in"


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses the arguments and does the work. An error becomes an exit code and one line."""
    console.set_quiet(False)
    for stream in (sys.stdout, sys.stderr):  # what an encoding has no character for is written out, not an error
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        argv = sys.argv[1:] if argv is None else argv
        refuse_unknown(parser, argv)
        args = parser.parse_args(argv)
        console.set_quiet(getattr(args, "quiet", False))
        with interrupt.kept(), _without_torch(), extras.backend_named():
            work(args)
        sys.stdout.flush()
    except SystemExit as exit:  # argparse: after --help, or after its message about an error
        return exit.code if isinstance(exit.code, int) else FAULT
    except NectarError as error:
        complain(f"{parser.prog}: {error}")
        return FAULT
    except BrokenPipeError:  # the reader of our output is gone, so there is no message
        _drop_output()
    except OSError as error:  # a full disk under stdout, mostly: what commands write themselves has its own message
        complain(f"{parser.prog}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        _drop_output()
        return FAULT
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        complain(f"{parser.prog}: there is no user of that name for a path that begins with ~")
        return FAULT
    except KeyboardInterrupt:
        complain(f"{parser.prog}: interrupted")
        return INTERRUPTED
    return DONE


@contextmanager
def _without_torch() -> Iterator[None]:
    """Inside, PyTorch is not found, unless it is imported already: no command needs it, and where it is installed
    transformers would import it and what goes with it, for five to fifteen seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _drop_output() -> None:
    """What stdout cannot take is forgotten: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `run` looks for."""
    parser.add_argument("--quiet", "-q", action="store_true", help="the answer alone: no notices, no progress")


def add_nectar(
    parser: argparse.ArgumentParser, *, what: str = "a .nectar file, or the id of one on the hub (user/name)"
) -> None:
    """Adds the arguments of `load`. what: that can be asked, for --help."""
    parser.add_argument("nectar", metavar="FILE", help=what)
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model answers: `model`, `adapter`, `fetch`."""
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")
    add_adapter(parser)
    add_fetch(parser)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="DIR", help="the folder of the model's adapter, from mlx_lm.lora")


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `may_fetch`."""
    parser.add_argument("--fetch", action="store_true", help="download the model that the file names if it is not here")


def may_fetch(name: str, *, fetch: bool) -> bool:
    """Whether to download the model that a file names: whoever made the file chose it, so the user is asked."""
    if fetch or not terminal.at_terminal():
        return fetch
    return terminal.confirm(f"The file names the model {name}, which is not here. Download it?", otherwise="")


def load(
    path: str, args: argparse.Namespace, *, group: "mx.distributed.Group | None" = None
) -> "tuple[nn.Module, Tokenizer, Nectar]":
    """The model, the tokenizer and the .nectar; NectarError if it is damaged or was fitted on another model.

    args: with the options of `add_model`. group: of ranks, as for `models.load`.
    """
    from . import store
    from .models import hub

    file = hub.nectar_file(path)
    model, tokenizer = load_model(store.model_name(file), args, group=group)
    return model, tokenizer, load_nectar(file, model, tokenizer)


def load_model(
    named: str, args: argparse.Namespace, *, group: "mx.distributed.Group | None" = None
) -> "tuple[nn.Module, Tokenizer]":
    """The model that the user gave, else the one that a file names, which is downloaded only if it may be; with the
    adapter that was given."""
    from . import models

    allowed = None if args.model else partial(may_fetch, fetch=args.fetch)
    return models.load(
        args.model or named, adapter=args.adapter, log=say, progress=progress, may_fetch=allowed, group=group
    )


def load_nectar(
    file: Path, model: "nn.Module", tokenizer: "Tokenizer", *, name: str = "", silent: bool = False
) -> "Nectar":
    """`Nectar.load` with its warnings, and a verdict worse than "close", as lines on stderr, unless it is to be silent.
    name: what a person knows the file by, if not its own."""
    from .nectar import Nectar

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            nectar = Nectar.load(file, model, tokenizer)
        except NectarError as error:
            raise NectarError(_named(error.message, file, name), advice=error.advice) from error
    if silent:
        return nectar
    for warning in caught:
        say(_named(str(warning.message), file, name))
    if not nectar.faithful:
        say(f"{name or file.name}: {nectar.verdict}")
    return nectar


def _named(message: str, file: Path, name: str) -> str:
    """A message about a file that a person knows by another name."""
    return message.replace(str(file), name).replace(file.name, name) if name else message


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
    """A line for each, numbered from 1."""
    return [f"[{number}] {source.quoted()}" for number, source in enumerate(sources, 1)]
