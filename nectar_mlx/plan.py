"""`nectar plan --model Qwen3-8B --tokens 100k`: what a fit would take, without the model or the text."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import cli
from .core.clock import duration
from .core.types import JsonObject

_HERE = "this machine"  # its name among the machines


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "plan",
        "Estimates time, memory and size of a fit. Nothing is loaded or fetched. Of a text that is here: "
        "`nectar fit --context FILE --dry-run`.",
    )
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="published names, folders or .gguf files (all known ones)"
    )
    parser.add_argument(
        "--tokens",
        type=cli.tokens,
        nargs="+",
        metavar="N",
        help="of the text: 50000, 50k (10k to 10M; without --model 10k)",
    )
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="only machines with this in their name, such as M4 or H100 (all known ones; without --model this machine)",
    )
    parser.add_argument("--all", action="store_true", help="without --model, too, all sizes and machines")
    parser.add_argument(
        "--machines", type=int, default=1, metavar="N", help="equal ones that share the fit, 1 to 8 (1)"
    )
    parser.add_argument("--budget", default="auto", metavar="SHARE", help="as for fit (auto: counted as 4%%)")
    parser.add_argument("--kind", default="auto", help="as for fit (auto)")
    parser.add_argument("--effort", default="normal", help="as for fit: quick, normal or best (normal)")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="FILE",
        help="as for fit; the file need not exist yet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    from .errors import NectarError
    from .fitting import machines

    # All models, sizes and machines are some 400 rows.
    brief = not (arguments.model or arguments.all)
    chosen = (arguments.machine or (_HERE if brief else "")).lower()
    named = [machines.here()] if _HERE.startswith(chosen) else []  # "Mac" is in it, too
    named += [machine for machine in machines.MACHINES if chosen in machine.name.lower()]
    if not named:
        known = "; ".join([_HERE, *(machine.name for machine in machines.MACHINES)])
        raise NectarError(f"no machine with {arguments.machine!r} in its name: {known}")
    if not 1 <= arguments.machines <= 8:
        raise NectarError(f"--machines must be 1 to 8, not {arguments.machines}")
    sizes = arguments.tokens or machines.TOKENS[: 1 if brief else None]
    if not all(sizes):
        raise NectarError("--tokens must be at least 1")
    options = {name: getattr(arguments, name) for name in ("budget", "kind", "effort")}
    configs = [(machine, machines.settings(machine, **options)) for machine in named]
    shapes = [machines.named_shape(name) for name in arguments.model or machines.SHAPES]
    rows = [
        machines.planned(shape, tokens, machine, config, machines=arguments.machines, others=bool(arguments.others))
        for shape in shapes
        for tokens in sizes
        for machine, config in configs
    ]
    if arguments.json:
        print(json.dumps(rows))
    else:
        _show(rows, others=bool(arguments.others))
        if brief:
            cli.say("--model, --tokens and --machine choose others; --all shows all")


def _show(rows: Sequence[JsonObject], *, others: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from .fitting.others import ALONE

    table = Table("model", "tokens", "machine", "time", "memory", "file", "how", "rate")
    for row in rows:
        how = [f"{row['chunks']:,} chunks"] if row["chunks"] > 1 else []
        how += ["layer by layer"] if row["layerwise"] else []
        time = duration(row["seconds"]) if row["fits"] else "does not fit"
        memory, size = f"{row['memory_bytes'] / 1e9:,.1f} GB", f"{row['file_bytes'] / 1e6:,.1f} MB"
        machine = row["machine"] if row["machines"] == 1 else f"{row['machines']} × {row['machine']}"
        table.add_row(row["model"], f"{row['tokens']:,}", machine, time, memory, size, ", ".join(how), row["basis"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if others and any(row["chunks"] > 1 or row["layerwise"] for row in rows):
        cli.say(ALONE)
    for name in ("undistilled", "exceeded"):
        for reason in dict.fromkeys(row[name] for row in rows if row[name]):
            cli.say(reason)
    cli.say("estimates: times may be off by half, and on machines that are calculated by more")


if __name__ == "__main__":
    sys.exit(main())
