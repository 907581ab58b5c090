"""`python -m nectar_mlx.fit --model Qwen3-1.7B --context book.txt`: a text goes in, a .nectar comes out."""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, store
from .errors import NectarError

if TYPE_CHECKING:
    from .documents import Reading
    from .nectar import Nectar


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("fit", "Reads a text once and writes a small file that a model answers from.")
    parser.add_argument("--model", required=True, help="a name (Qwen3-1.7B), a folder, a .gguf file or a hub id")
    parser.add_argument("--context", required=True, nargs="+", metavar="FILE", help="files and folders to read")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="of a folder read only these: '*.md'"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="of a folder leave these aside")
    parser.add_argument("--strict", action="store_true", help="refuse if a file, or a part of one, cannot be read")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read, and stop")
    parser.add_argument("--output", type=Path, help="the file to write (default: the context's name with .nectar)")
    parser.add_argument("--context-tokens", type=int, metavar="N", help="read the first N tokens only")
    parser.add_argument(
        "--budget",
        metavar="SHARE",
        help="bytes to keep / bytes of the bf16 KV cache: 0.02 or 2%%; a size: 20M; or auto, the smallest at which "
        "answers are expected to be close to the full text's (auto)",
    )
    parser.add_argument("--size", metavar="SIZE", help="of the file, e.g. 20M: the same as --budget 20M")
    parser.add_argument(
        "--kind",
        default="auto",
        help="auto, quadrature, mlp, corrected, exact; with a file of exact keys: hybrid, completion, retrieval",
    )
    parser.add_argument(
        "--bits",
        type=int,
        help="of a stored matrix entry, rounded at once: 16, or 4 to 8 (nodes: each its own, 4 on average; those "
        "beside exact keys 6; networks 8)",
    )
    parser.add_argument("--queries", type=int, metavar="N", help="captured a head (20000; on a GPU up to 120000)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the regression (1500 on a GPU, 300 on a CPU)")
    parser.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="e.g. 4G (half of what is free): above it the fit goes layer by layer, captured queries to disk",
    )
    parser.add_argument(
        "--layerwise",
        action=argparse.BooleanOptionalAction,
        help="fit layer by layer, whatever the memory: only one layer's keys and values exist at a time",
    )
    parser.add_argument(
        "--prefill",
        default="dense",
        help="how the text is read: dense, or fixed (sparse attention, for texts too long for dense)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue where an interrupted fit stopped")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    if arguments.budget and arguments.size:
        raise NectarError("--budget and --size both say how much to keep: give one of them")
    output = arguments.output or _default_output(arguments.context)
    if not arguments.dry_run:
        store.check_writable(output)  # a result that cannot be written is not worth computing
    from . import documents

    reading = documents.read(
        arguments.context, include=arguments.include, exclude=arguments.exclude, strict=arguments.strict
    )
    if arguments.dry_run:
        _show(reading, as_json=arguments.json)
        return
    from . import models
    from .fitting import pipeline
    from .fitting.checkpoint import Checkpoint
    from .fitting.config import FitConfig, parse_budget
    from .nectar import Nectar

    names = ("kind", "bits", "queries", "steps", "seed", "context_tokens", "memory", "layerwise", "prefill")
    told = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in told.items() if value is not None}
    config = FitConfig(**given, **parse_budget(arguments.size or arguments.budget or "auto"))
    model, tokenizer = models.load(arguments.model, log=cli.say)
    folder = output.with_name(output.name + ".partial")
    if folder.exists() and not arguments.resume:
        cli.say(f"starting anew: {folder}, from which --resume would have gone on, is removed")
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint = Checkpoint(folder)
    try:
        fitted = pipeline.fit(
            model,
            tokenizer,
            reading.text,
            config=config,
            name=arguments.model,
            source=", ".join(Path(c).name for c in arguments.context),
            progress=cli.progress,
            checkpoint=checkpoint,
        )
        nectar = Nectar(*fitted)
        nectar.report["files"] = reading.as_list()
        nectar.save(output)
    except KeyboardInterrupt:
        cli.say(f"what was done is kept in {folder}: the same command with --resume continues")
        raise
    checkpoint.clear()
    _tell(output, nectar, as_json=arguments.json)
    cli.say(reading.summary())


def _show(reading: "Reading", *, as_json: bool) -> None:
    """What would be read."""
    for report in reading.files:
        cli.say(report.describe())
    cli.say(f"{reading.summary()}; about {len(reading.text) // 4:,} tokens")
    if as_json:
        print(json.dumps({"files": reading.as_list(), "characters": len(reading.text)}))


def _tell(output: Path, nectar: "Nectar", *, as_json: bool) -> None:
    size, whole, tokens = output.stat().st_size, nectar.cache_nbytes, len(nectar.prefix)
    cli.say(
        f"{output}: {size / 1e6:.2f} MB stand for {tokens:,} tokens: {size / whole:.1%} of the KV cache's "
        f"{whole / 1e6:.1f} MB, {size / tokens:,.0f} bytes a token; "
        f"{sum(nectar.report['seconds'].values()):.0f} s{_way(nectar)}"
    )
    if left_out := nectar.report.get("left_out_tokens"):
        cli.say(f"{left_out:,} more tokens of the text were left out: --context-tokens cut it")
    if nectar.verdict:
        cli.say(nectar.verdict)
    if as_json:
        facts = {"output": str(output), "bytes": size, "cache_bytes": whole, "tokens": tokens}
        print(json.dumps(facts | nectar.report))


def _way(nectar: "Nectar") -> str:
    """What of the way it was fitted a user may not expect."""
    told = ", layer by layer" if nectar.report.get("layerwise") else ""
    return told + (f", in {len(nectar.chunks)} chunks" if nectar.chunks else "")


def _default_output(context: Sequence[str]) -> Path:
    return Path(Path(context[0]).resolve().name).with_suffix(".nectar")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 4G")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


if __name__ == "__main__":
    sys.exit(main())
