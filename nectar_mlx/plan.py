"""`nectar plan --model Qwen3-8B --tokens 100k`: what a fit would take, without the model or the text."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import cli
from .core.clock import duration
from .core.types import JsonObject

if TYPE_CHECKING:
    from .fitting.config import FitConfig
    from .fitting.estimate import Machine, Shape

TOKENS = (10_000, 100_000, 1_000_000, 10_000_000)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("plan", "Estimates time, memory and size of a fit. Nothing is loaded or fetched.")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="published names, or folders (all known ones)")
    parser.add_argument("--tokens", type=cli.size, nargs="+", metavar="N", help="of the text: 50000, 50k (10k to 10M)")
    parser.add_argument("--machine", metavar="NAME", help="only machines with this in their name, such as M4 or H100")
    parser.add_argument("--budget", default="auto", metavar="SHARE", help="as for fit (auto: counted as 4%%)")
    parser.add_argument("--kind", default="auto", help="as for fit (auto)")
    parser.add_argument("--effort", default="normal", help="as for fit: quick, normal or best (normal)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    from .errors import NectarError
    from .fitting import machines

    chosen = arguments.machine or ""
    named = [machine for machine in (machines.here(), *machines.MACHINES) if chosen.lower() in machine.name.lower()]
    if not named:
        raise NectarError(f"no machine with {chosen!r} in its name: {', '.join(m.name for m in machines.MACHINES)}")
    if not all(arguments.tokens or TOKENS):
        raise NectarError("--tokens must be at least 1")
    options = {name: getattr(arguments, name) for name in ("budget", "kind", "effort")}
    configs = [(machine, machines.settings(machine, **options)) for machine in named]
    shapes = [machines.named_shape(name) for name in arguments.model or machines.SHAPES]
    rows = [
        _row(shape, tokens, machine, config)
        for shape in shapes
        for tokens in arguments.tokens or TOKENS
        for machine, config in configs
    ]
    if arguments.json:
        print(json.dumps(rows))
    else:
        _show(rows)


def _row(shape: "Shape", tokens: int, machine: "Machine", config: "FitConfig") -> JsonObject:
    from .fitting.estimate import estimate

    expected = estimate(shape, machine, config, tokens)
    return {
        "model": shape.name,
        "tokens": tokens,
        "machine": machine.name,
        "seconds": round(expected.seconds, 1),
        "memory_bytes": int(expected.memory),
        "file_bytes": int(expected.size),
        "disk_bytes": int(expected.size + expected.disk),
        "chunks": expected.chunks,
        "layerwise": expected.layerwise,
        "fits": expected.memory <= machine.memory,
        "basis": machine.basis,
    }


def _show(rows: Sequence[JsonObject]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "tokens", "machine", "time", "memory", "file", "how", "rate")
    for row in rows:
        how = [f"{row['chunks']:,} chunks"] if row["chunks"] > 1 else []
        how += ["layer by layer"] if row["layerwise"] else []
        time = duration(row["seconds"]) if row["fits"] else "does not fit"
        memory, size = f"{row['memory_bytes'] / 1e9:,.1f} GB", f"{row['file_bytes'] / 1e6:,.1f} MB"
        table.add_row(
            row["model"], f"{row['tokens']:,}", row["machine"], time, memory, size, ", ".join(how), row["basis"]
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    cli.say("estimates: times may be off by half, and on machines that are calculated by more")


if __name__ == "__main__":
    sys.exit(main())
