"""`nectar demo`: reads part of Python's own manual once, then answers with the full KV cache and with the file alone.

Every question is answered twice: with the full KV cache, and from the file. Agreement is the share of the full cache's
answer tokens that the file would have chosen too.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli, store

if TYPE_CHECKING:
    import mlx.nn as nn

    from .fitting.prefill import Context
    from .nectar import Nectar

TOPICS = ("with", "try", "raise", "assert", "pass", "del", "return", "break", "continue", "import")
QUESTIONS = (
    "What does the with statement do?",
    "How does a try statement handle an exception?",
    "What is the assert statement for?",
)


@dataclass(frozen=True)
class Answer:
    """One question answered both ways; seconds include reading the question, not the context."""

    question: str
    full: str
    nectar: str
    full_seconds: float
    nectar_seconds: float
    agreement: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("demo", "Reads part of Python's manual once and answers from a small file.")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a name, a folder, a .gguf file or a hub id")
    parser.add_argument("--context-tokens", type=int, default=2000, metavar="N", help="of the manual (2000)")
    parser.add_argument("--budget", type=float, default=0.04, help="bytes to keep / bytes of the bf16 KV cache (0.04)")
    parser.add_argument("--queries", type=int, default=6_000, metavar="N", help="captured queries a head (6000)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of the regression (100)")
    parser.add_argument("--max-tokens", type=int, default=40, metavar="N", help="of an answer (40)")
    parser.add_argument("--output", type=Path, help="keep the file here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return cli.run(parser, _work, argv)


def manual() -> str:
    """FittedChunk of the language manual that every CPython carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in itertools.chain(TOPICS, sorted(topics)) if name in topics)


def _work(arguments: argparse.Namespace) -> None:
    if arguments.output:
        store.check_writable(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        _demonstrate(arguments, arguments.output or Path(folder) / "manual.nectar")


def _demonstrate(arguments: argparse.Namespace, path: Path) -> None:
    from . import models
    from .fitting import pipeline, prefill
    from .fitting.config import FitConfig
    from .mlxlm import attention_patch
    from .nectar import Nectar

    model, tokenizer = models.load(arguments.model, log=cli.say)
    names = ("budget", "queries", "steps", "context_tokens")
    config = FitConfig(**{name: getattr(arguments, name) for name in names}, trial_steps=40, conversations=16)
    cli.say(f"Reading {config.context_tokens:,} tokens of the Python manual, once, and fitting it.")
    fitted = pipeline.fit(
        model, tokenizer, manual(), config=config, name=arguments.model, source="Python manual", progress=cli.progress
    )
    made = Nectar(*fitted)
    made.save(path)

    started = time.perf_counter()
    nectar = Nectar.load(path, model, tokenizer)
    load_seconds = time.perf_counter() - started
    started = time.perf_counter()
    with cli.progress("reading the manual again, for the full cache", len(nectar.prefix)) as done:
        context = prefill.read_text(model, nectar.prefix, attention_patch.route(model), progress=done)
    read_seconds = time.perf_counter() - started

    answers = [_answer(model, tokenizer, nectar, context, question, arguments.max_tokens) for question in QUESTIONS]
    told = {
        "tokens": len(nectar.prefix),
        "cache_bytes": nectar.cache_nbytes,
        "file_bytes": path.stat().st_size,
        "read_seconds": round(read_seconds, 2),
        "load_seconds": round(load_seconds, 3),
        "fit": made.report,
        "answers": [asdict(a) for a in answers],
    }
    if arguments.json:
        print(json.dumps(told))
    else:
        _show(told, answers)


def _answer(
    model: "nn.Module", tokenizer: Any, nectar: "Nectar", context: "Context", question: str, max_tokens: int
) -> Answer:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from .fitting import fidelity
    from .fitting.samples.conversation import Conversation

    prompt = nectar.prompt(tokenizer, question, enable_thinking=False)

    def greedy(cache: Any) -> tuple[list[int], float]:
        started, tokens = time.perf_counter(), []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache):
            tokens.append(int(token))
            if tokens[-1] in tokenizer.eos_token_ids:
                break
        return tokens, round(time.perf_counter() - started, 2)

    full, full_seconds = greedy(context.make_cache())
    ours, seconds = greedy(nectar.make_cache())
    forced = fidelity.compare(model, context.make_cache, {"nectar": nectar.make_cache}, [Conversation(prompt, full)])[
        "nectar"
    ]
    words = [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in (full, ours)]
    return Answer(question, words[0], words[1], full_seconds, seconds, round(float(forced.agree.mean()), 3))


def _show(told: dict[str, Any], answers: Sequence[Answer]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    seconds = sum(told["fit"]["seconds"].values())
    table = Table(title=f"{told['tokens']:,} tokens of the Python manual", title_justify="left")
    for name in ("", "full KV cache", "the file"):
        table.add_column(name)
    table.add_row("kept", f"{told['cache_bytes'] / 1e6:.1f} MB (bf16)", f"{told['file_bytes'] / 1e6:.2f} MB")
    table.add_row("before a question", f"{told['read_seconds']:.1f} s", f"{told['load_seconds']:.2f} s")
    table.add_row("made in", "every time anew", f"{seconds:.0f} s, once")
    console.print(table)
    for answer in answers:
        table = Table(title=answer.question, title_justify="left", show_lines=False)
        table.add_column(f"full KV cache, {answer.full_seconds:.1f} s", ratio=1)
        table.add_column(f"the file, {answer.nectar_seconds:.1f} s, agreement {answer.agreement:.0%}", ratio=1)
        table.add_row(answer.full, answer.nectar)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
