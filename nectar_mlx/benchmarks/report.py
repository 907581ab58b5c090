"""Results of `bench` as Markdown tables and as plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import plotting
from ..core.types import JsonObject
from . import measure_fit
from . import tune as tuning

Row = JsonObject

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
    ("prefills", "prefills", ".1f"),
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


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """A Markdown table. columns: title, key of the row, format."""
    units = {"bytes": 1e6, "peak_memory": 1e9}
    lines = [[title for title, _, _ in columns], ["---"] * len(columns)]
    for row in rows:
        scaled = {key: value / units[key] if key in units else value for key, value in row.items()}
        lines.append([_cell(scaled[key], spec) if key in row else "–" for _, key, spec in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | str | list[float], spec: str) -> str:
    """A number, or a list of quartiles with or without the median."""
    return " / ".join(format(x, spec) for x in value) if isinstance(value, list) else format(value, spec)


def text(result: Row) -> str:
    head = f"{result['device']}, {result['backend']}, MLX {result['mlx']}"
    head += f", copies at {result['bandwidth'] / 1e9:.0f} GB/s"
    if "live" in result:
        head = f"{result['shape']}, {result['live']} live tokens, medians of {result['rounds']} rounds; {head}"
        parts = [head, table(result["rows"], _DECODE)]
        if result["growth"]:
            parts += ["Growth from the shortest context to the longest, quartiles:", table(result["growth"], _GROWTH)]
        return "\n\n".join(parts)
    if "rows" in result:
        sizes = f"{result['layers']} layers, {result['queries']} queries a head, {result['steps']} steps"
        return f"{result['shape']}, {sizes}, budget {result['budget']:g}; {head}\n\n{table(result['rows'], _FIT)}"
    report = _report_tuning if "tuning" in result else _report_checks
    return f"{head}\n\n{report(result)}"


def _report_checks(result: Row) -> str:
    checked = result["checks"]
    wrong = [row for row in checked if not row["ok"]]
    speed = [{"what": what, "ms": ms} for what, ms in result["ms_for_28_layers"].items()]
    parts = [
        f"{len(checked) - len(wrong)} of {len(checked)} kernels right, "
        f"largest error {max(row['error'] for row in checked):.1e}",
        table(wrong, (*_CHECKS, ("error", "error", ".1e"), ("reason", "reason", ""))) if wrong else "",
        "Seconds of the first call, which compiles the kernel (of sparse ones: forwards / backwards):",
        table(checked, (*_CHECKS, ("first call", "first_calls", ".2f"))),
        "Attention of one decode step of Qwen3-1.7B's 28 layers:",
        table(speed, (("", "what", ""), ("ms", "ms", ".3f"))),
    ]
    return "\n\n".join(part for part in parts if part)


def _report_tuning(result: Row) -> str:
    """The choices of each storage from the fastest to the slowest; an asterisk marks the library's own."""
    rows = [row | {"mark": "*" if row["chosen"] else ""} for row in result["tuning"]]
    rows.sort(key=lambda row: (row["storage"], row.get("ms", math.inf)))
    head = (
        f"Attention of one decode step of {result['shape']}'s {result['layers']} layers, {tuning.NODES} nodes a head:"
    )
    return f"{head}\n\n{table(rows, _TUNING)}"


def plot(result: Row, path: Path) -> None:
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
