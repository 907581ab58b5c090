"""`decode`: a decode step beside other ways to keep a context; `fit`: where a fit's time and memory go; `selftest`: is
each kernel right, and how fast."""

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import __version__, cli, kernels
from .benchmarks import checks, measure, measure_decode, measure_fit
from .benchmarks import tune as tuning
from .benchmarks.measure import KEEPERS, SHAPES, Shape
from .core import plotting
from .errors import NectarError
from .fitting.config import FitConfig

_CONTEXTS = {"decode": "1k,8k,32k,128k,512k,1m", "fit": "8k,32k,128k", "selftest": "1k"}
Row = dict[str, Any]


def decode(
    shape: Shape, contexts: Sequence[int], methods: Sequence[str], *, live: int, whole: bool, rounds: int
) -> Row:
    """A decode step of every method at every context length, in rounds: see `measure_decode`.

    attention_ms is the attention of all layers alone; step_ms the whole model; `queued` ones are a step's share of a
    loop that queues the next step before it waits for this one, as mlx-lm's does, and give tokens_per_second. Bytes are
    what a step must read, their share that of the measured copy bandwidth.
    """
    found = measure_decode.measured(shape, contexts, methods, live=live, whole=whole, rounds=rounds)
    return _about() | {"shape": shape.name, "batch": shape.batch, "live": live} | found


def fit(shape: Shape, contexts: Sequence[int], config: FitConfig) -> Row:
    """Every stage of a fit at every context length that the memory holds; no text, no weights but random ones."""
    room = [n for n in contexts if 2 * shape.cache_bytes(n) < 0.8 * measure.memory()]
    if not room:
        raise NectarError(f"the keys and values of {min(contexts)} tokens do not fit the memory: ask for fewer tokens")
    rows = []
    for row in measure_fit.rows(shape, room, config):
        cli.say(f"{row['context']} tokens, {row['stage']}: {row['seconds']:.1f} s, {row['peak_memory'] / 1e9:.2f} GB")
        rows.append(row)
    for row in rows:
        row["share"] = row["seconds"] / sum(other["seconds"] for other in rows if other["context"] == row["context"])
    queries = max(row.pop("samples", 0) for row in rows)
    sizes = {"layers": shape.layers, "queries": queries, "steps": config.steps, "budget": config.budget}
    return _about() | {"shape": shape.name, "bandwidth": measure.bandwidth(), "rows": rows} | sizes


def selftest() -> Row:
    """Every kernel variant against plain float32 on the CPU, then the speed of the common ones."""
    _needs_a_kernel()
    shape = SHAPES["qwen3-1.7b"]
    rows = checks.rows()
    speed = {}
    queries = mx.random.normal((1, shape.n_heads, 1, shape.head_dim)).astype(measure.DTYPE)
    for context in (8192, 32768):
        keeper: measure.CacheVariant = measure.Full(shape, context, 64)
        speed[f"stock attention, {context} keys"] = measure.timed(lambda k=keeper: k.attention_step(queries)) * 1e3  # type: ignore[misc]
    for name in ("stock", "fused", "fused int8"):
        keeper = KEEPERS[name](shape, 0, 64)
        speed[f"{name}, 655 nodes"] = measure.timed(lambda k=keeper: k.attention_step(queries)) * 1e3  # type: ignore[misc]
    return _about() | {"bandwidth": measure.bandwidth(), "checks": rows, "ms_for_28_layers": speed}


def tune(shape: Shape) -> Row:
    """The decode kernel's speed with other numbers of rows in flight, query rows of a simdgroup, and blocks."""
    _needs_a_kernel()
    rows = []
    for row in tuning.rows(shape):
        what = ", ".join(f"{name} {row[name]}" for name in ("storage", "flight", "tile", "blocks"))
        cli.say(f"{what}: {row['ms']:.3f} ms" if "ms" in row else f"{what}: does not work")
        rows.append(row)
    return _about() | {"shape": shape.name, "layers": shape.layers, "bandwidth": measure.bandwidth(), "tuning": rows}


def _needs_a_kernel() -> None:
    if kernels.backend() == "ops":
        raise NectarError("this machine has neither Metal nor CUDA, so there is no kernel to test: use a Mac")


def _about() -> Row:
    info = mx.device_info()
    return {
        "nectar_mlx": __version__,
        "mlx": version("mlx"),
        "backend": kernels.backend(),
        "device": str(info.get("device_name") or info.get("architecture") or platform.processor()),
        "system": platform.platform(),
    }


_DECODE = (
    ("context", "context", "d"),
    ("method", "method", ""),
    ("attention ms", "attention_ms", ".3f"),
    ("queued", "queued_attention_ms", ".3f"),
    ("step ms", "step_ms", ".2f"),
    ("queued", "queued_step_ms", ".2f"),
    ("quartiles", "queued_step_quartiles_ms", ".2f"),
    ("tokens/s", "tokens_per_second", ".1f"),
    ("MB read", "bytes", ".0f"),
    ("share of bandwidth", "bandwidth_share", ".0%"),
    ("peak GB", "peak_memory", ".2f"),
)
_GROWTH = (
    ("method", "method", ""),
    ("from", "from", "d"),
    ("to", "to", "d"),
    ("attention", "attention", "+.1%"),
    ("queued", "queued_attention", "+.1%"),
    ("step", "step", "+.1%"),
    ("queued", "queued_step", "+.1%"),
)
_FIT = (
    ("context", "context", "d"),
    ("stage", "stage", ""),
    ("seconds", "seconds", ".2f"),
    ("share", "share", ".0%"),
    ("peak GB", "peak_memory", ".2f"),
)
_TUNING = (
    ("storage", "storage", ""),
    ("rows in flight", "flight", "d"),
    ("query rows", "tile", "d"),
    ("blocks", "blocks", "d"),
    ("ms", "ms", ".3f"),
    ("chosen", "mark", ""),
)
_CHECKS = tuple((key, key, "") for key in ("kind", "head_dim", "group", "length", "batch", "dtype", "storage"))


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """Markdown."""
    units = {"bytes": 1e6, "peak_memory": 1e9}
    lines = [[title for title, _, _ in columns], ["---"] * len(columns)]
    for row in rows:
        scaled = {key: value / units[key] if key in units else value for key, value in row.items()}
        lines.append([_cell(scaled[key], spec) if key in row else "–" for _, key, spec in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any, spec: str) -> str:
    """A list is quartiles, with or without the median."""
    return " / ".join(format(x, spec) for x in value) if isinstance(value, list) else format(value, spec)


def _report(result: Row) -> str:
    head = f"{result['device']}, {result['backend']}, MLX {result['mlx']}"
    head += f", copies at {result['bandwidth'] / 1e9:.0f} GB/s"
    if "live" in result:
        head = f"{result['shape']}, {result['live']} live tokens, medians of {result['rounds']} rounds; {head}"
        grown = f"What the longest context adds to the shortest, quartiles:\n\n{_table(result['growth'], _GROWTH)}"
        return "\n\n".join([head, _table(result["rows"], _DECODE), *[grown] * bool(result["growth"])])
    if "rows" in result:
        sizes = f"{result['layers']} layers, {result['queries']} queries a head, {result['steps']} steps"
        return f"{result['shape']}, {sizes}, budget {result['budget']:g}; {head}\n\n{_table(result['rows'], _FIT)}"
    report = _report_tuning if "tuning" in result else _report_checks
    return f"{head}\n\n{report(result)}"


def _report_checks(result: Row) -> str:
    checked = result["checks"]
    wrong = [row for row in checked if not row["ok"]]
    speed = [{"what": what, "ms": ms} for what, ms in result["ms_for_28_layers"].items()]
    parts = [
        f"{len(checked) - len(wrong)} of {len(checked)} kernels right, "
        f"largest error {max(row['error'] for row in checked):.1e}",
        _table(wrong, (*_CHECKS, ("error", "error", ".1e"), ("reason", "reason", ""))) if wrong else "",
        "Seconds of the first call, in which a text is compiled (of sparse ones: forwards / backwards):",
        _table(checked, (*_CHECKS, ("first call", "first_calls", ".2f"))),
        "Attention of one decode step of Qwen3-1.7B's 28 layers:",
        _table(speed, (("", "what", ""), ("ms", "ms", ".3f"))),
    ]
    return "\n\n".join(part for part in parts if part)


def _report_tuning(result: Row) -> str:
    """The choices of each storage from the fastest to the slowest; an asterisk marks the library's."""
    rows = [row | {"mark": "*" * row["chosen"]} for row in result["tuning"]]
    rows.sort(key=lambda row: (row["storage"], row.get("ms", math.inf)))
    head = (
        f"Attention of one decode step of {result['shape']}'s {result['layers']} layers, {tuning.NODES} nodes a head:"
    )
    return f"{head}\n\n{_table(rows, _TUNING)}"


def _plot(result: Row, path: Path) -> None:
    figure, axes = plotting.subplots(figsize=(7, 4))
    draw = _plot_decode if "live" in result else _plot_fit
    draw(axes, result["rows"])
    axes.set(title=f"{result['shape']} on {result['device']}")
    axes.legend()
    plotting.save(figure, path)


def _plot_decode(axes: Any, rows: Sequence[Row]) -> None:
    whole = any("step_ms" in row for row in rows)
    key, label = ("tokens_per_second", "tokens/s") if whole else ("attention_ms", "attention, ms")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["context"], row[key]) for row in rows if row["method"] == method and key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xscale="log", xlabel="context, tokens", ylabel=label)


def _plot_fit(axes: Any, rows: Sequence[Row]) -> None:
    contexts = [f"{context:,}" for context in dict.fromkeys(row["context"] for row in rows)]
    below = [0.0] * len(contexts)
    for stage in measure_fit.STAGES:
        seconds = [row["seconds"] for row in rows if row["stage"] == stage]
        axes.bar(contexts, seconds, bottom=below, label=stage)
        below = [x + y for x, y in zip(below, seconds, strict=True)]
    axes.set(xlabel="context, tokens", ylabel="seconds")


def _tokens(text: str) -> list[int]:
    """ "1k,8k,1m" -> [1024, 8192, 1048576]."""
    units = {"k": 1 << 10, "m": 1 << 20}
    try:
        counts = [int(float(t.rstrip("km")) * units.get(t[-1:], 1)) for t in text.lower().split(",")]
    except (ValueError, OverflowError):
        counts = []
    if not counts or min(counts) < 1:
        raise NectarError(f"--contexts {text}: numbers such as 8k,128k,1m, with commas between them")
    return counts


def _work(arguments: argparse.Namespace) -> None:
    for name in ("live", "batch", "rounds", "layers", "queries", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise NectarError(f"--{name} {value}: at least 1")
    if arguments.plot:
        plotting.check(arguments.plot)
    shape = replace(SHAPES[arguments.shape], batch=arguments.batch)
    shape = replace(shape, layers=arguments.layers or shape.layers)
    contexts = _tokens(arguments.contexts or _CONTEXTS[arguments.what])
    if arguments.what == "selftest":
        result = tune(shape) if arguments.tune else selftest()
    elif arguments.what == "fit":
        config = FitConfig(queries=arguments.queries, steps=arguments.steps, budget=arguments.budget)
        result = fit(shape, contexts, config)
    else:
        methods = [m.strip() for m in arguments.methods.split(",")]
        if unknown := set(methods) - set(KEEPERS):
            raise NectarError(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(KEEPERS)}")
        if arguments.live >= measure.ROOM:
            raise NectarError(f"--live {arguments.live}: at most {measure.ROOM - 1}")
        options = {"live": arguments.live, "whole": not arguments.attention_only, "rounds": arguments.rounds}
        result = decode(shape, contexts, methods, **options)
    if arguments.plot and "rows" in result:
        _plot(result, arguments.plot)
    print(json.dumps(result) if arguments.json else _report(result))
    if not all(row["ok"] for row in result.get("checks", ())):
        raise NectarError("some kernels are wrong on this machine: set NECTAR_KERNEL=ops and report the table above")


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("what", choices=("decode", "fit", "selftest"))
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b", help="whose sizes; weights are random")
    parser.add_argument("--layers", type=int, metavar="N", help="of the model (default: as many as the shape has)")
    told = ", ".join(f"{what}: {_CONTEXTS[what]}" for what in ("decode", "fit"))
    parser.add_argument("--contexts", help=f"context lengths (default for {told})")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw tokens/s, or a fit's seconds, over the context length"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    of_decode = parser.add_argument_group("decode")
    of_decode.add_argument("--methods", default=",".join(KEEPERS), help=f"default {','.join(KEEPERS)}")
    of_decode.add_argument("--live", type=int, default=64, help="tokens after the context (default 64)")
    of_decode.add_argument("--batch", type=int, default=1, help="sequences that share the context (default 1)")
    of_decode.add_argument("--rounds", type=int, default=5, help="of measuring everything once (default 5)")
    of_decode.add_argument("--attention-only", action="store_true", help="do not run the rest of the model")
    of_selftest = parser.add_argument_group("selftest")
    of_selftest.add_argument(
        "--tune",
        action="store_true",
        help="measure the decode kernel with other numbers of rows in flight, query rows and blocks, and nothing else",
    )
    of_fit = parser.add_argument_group("fit")
    of_fit.add_argument("--queries", type=int, metavar="N", help="captured queries a head (default: as a fit)")
    of_fit.add_argument("--steps", type=int, metavar="N", help="of the regression (default: as a fit)")
    of_fit.add_argument("--budget", type=float, default=0.02, help="bytes to keep / bytes of the KV cache (0.02)")
    return cli.run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
