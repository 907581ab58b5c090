"""`nectar demo`: reads part of Python's own manual once, then answers with the full KV cache and with the file.

Agreement is the share of the full cache's answer tokens that are also the file's first choice.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, output, store
from .core import terminal
from .core.types import JsonObject

if TYPE_CHECKING:
    from .evaluation.side_by_side import Answer

SOURCE = "Python manual"
TOPICS = ("with", "try", "raise", "assert", "pass", "del", "return", "break", "continue", "import")
QUESTIONS = (
    "What does the with statement do?",
    "How does a try statement handle an exception?",
    "What is the assert statement for?",
)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("demo", "Reads part of Python's manual once and answers from a small file.")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a name, a folder, a .gguf file or a hub id")
    parser.add_argument("--context-tokens", type=int, default=2000, metavar="N", help="tokens to read (2000)")
    parser.add_argument("--budget", default="4%", metavar="SHARE", help="as for fit: 2%%, 20M or auto (4%%)")
    parser.add_argument("--queries", type=int, default=6_000, metavar="N", help="captured queries a head (6000)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of the regression (100)")
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="the longest answer (40)")
    parser.add_argument("--output", type=Path, help="keep the file here")
    parser.add_argument("--force", action="store_true", help="replace the file of --output if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def manual() -> str:
    """The language manual that comes with CPython, with a few topics first."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in itertools.chain(TOPICS, sorted(topics)) if name in topics)


def _work(arguments: argparse.Namespace) -> None:
    if arguments.output:
        store.check_writable(arguments.output)
        output.check(arguments.output, arguments.force, {"source": SOURCE, "model": arguments.model})
    with tempfile.TemporaryDirectory() as folder:
        _demonstrate(arguments, arguments.output or Path(folder) / "manual.nectar")


def _demonstrate(arguments: argparse.Namespace, path: Path) -> None:
    from . import models
    from .evaluation import side_by_side
    from .fitting import pipeline, prefill
    from .fitting.config import FitConfig, parse_budget
    from .mlxlm import attention_patch
    from .nectar import Nectar

    options = {name: getattr(arguments, name) for name in ("queries", "steps", "context_tokens")}
    config = FitConfig(**options, **parse_budget(arguments.budget), trial_steps=40, conversations=16)
    model, tokenizer = models.load(arguments.model, log=cli.say, progress=cli.progress)
    cli.say(f"Reading {config.context_tokens:,} tokens of the Python manual, once, and fitting it.")
    fitted = pipeline.fit(
        model, tokenizer, manual(), config=config, name=arguments.model, source=SOURCE, progress=cli.progress
    )
    made = Nectar(*fitted)
    made.save(path)

    started = time.perf_counter()
    nectar = Nectar.load(path, model, tokenizer)
    load_seconds = time.perf_counter() - started
    started = time.perf_counter()
    with cli.progress("reading the manual again, for the full cache", len(nectar.prefix)) as update:
        context = prefill.read_text(model, nectar.prefix, attention_patch.route(model), progress=update)
    read_seconds = time.perf_counter() - started
    answers = side_by_side.answers(model, tokenizer, nectar, context, QUESTIONS, max_tokens=arguments.max_tokens)
    result = {
        "tokens": len(nectar.prefix),
        "cache_bytes": nectar.cache_nbytes,
        "file_bytes": path.stat().st_size,
        "read_seconds": round(read_seconds, 2),
        "load_seconds": round(load_seconds, 3),
        "fit": made.report,
        "answers": [asdict(answer) for answer in answers],
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result, answers)


def _show(result: JsonObject, answers: "Sequence[Answer]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    seconds = sum(result["fit"]["seconds"].values())
    table = Table(title=f"{result['tokens']:,} tokens of the Python manual", title_justify="left")
    for name in ("", "full KV cache", "the file"):
        table.add_column(name)
    table.add_row("kept", f"{result['cache_bytes'] / 1e6:.1f} MB (bf16)", f"{result['file_bytes'] / 1e6:.2f} MB")
    table.add_row("before a question", f"{result['read_seconds']:.1f} s", f"{result['load_seconds']:.2f} s")
    table.add_row("made in", "every time anew", f"{seconds:.0f} s, once")
    console.print(table)
    for answer in answers:
        table = Table(title=answer.question, title_justify="left", show_lines=False)
        table.add_column(f"full KV cache, {answer.full_seconds:.1f} s", ratio=1)
        table.add_column(f"the file, {answer.nectar_seconds:.1f} s, agreement {answer.agreement:.0%}", ratio=1)
        table.add_row(*(Text(terminal.printable(text)) for text in (answer.full, answer.nectar)))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
