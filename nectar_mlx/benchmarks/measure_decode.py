"""`bench decode`: decode steps of every cache variant at every context length, in rounds.

The speed of a host drifts by more than the differences to be measured. So every round times every cell, a variant at a
context length, for a moment. A cell's figure is the median of its rounds, and the growth with the context is a ratio
within each round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.progress import Log, no_log
from ..core.types import DoubleArray, JsonObject
from . import measure
from .cache_variants import VARIANTS, CacheVariant
from .measure import Shape

Row = JsonObject
Work = Callable[[CacheVariant, int], float]  # (variant, repeats) -> median seconds

_SECONDS, _MAX_REPEATS = 0.1, 20  # of a work in a round: about, and at most
_SHARE_OF_CACHE = {"full": 1.0, "4-bit cache": 4.5 / 16}  # bytes that grow with the context / those of a 16-bit cache


@dataclass
class Timing:
    """One work of a cell: its repeats in a round, and its seconds, one figure a round."""

    repeats: int
    seconds: list[float] = field(default_factory=list)


@dataclass
class Cell:
    """A variant at a context length. variant: None if it cannot be measured here. timings: by work."""

    context: int
    method: str
    variant: CacheVariant | None = None
    error: str | None = None
    peak_memory: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)


def measured(
    shape: Shape,
    contexts: Sequence[int],
    methods: Sequence[str],
    *,
    live: int,
    whole: bool,
    rounds: int,
    log: Log = no_log,
) -> Row:
    """`rows`, one a cell: medians of the rounds, and [lower, upper] quartiles; `growth`, one a method: how much longer
    each work takes behind the longest context than behind the shortest, a share of it, [lower quartile, median, upper].

    A cell has no figures if its cache does not fit the memory with the cells before it, or if MLX has no kernel for it.
    whole: runs the whole model, not only its attention.
    """
    model = measure.routed(shape) if whole else None
    weights = 0 if model is None else measure.nbytes_of(model)
    works = works_of(shape, model)
    cells, taken, alone = list[Cell](), float(weights), mx.get_active_memory()
    for context in contexts:
        for method in methods:
            cells.append(cell := Cell(context, method))
            nbytes = _SHARE_OF_CACHE.get(method, 0.0) * shape.cache_bytes(context + live)
            if taken + nbytes < 0.8 * measure.memory():
                _start(cell, shape, live, works, alone)
                taken += nbytes if cell.variant else 0
    # Cells whose ratio counts, a method at every context, follow each other.
    running = [cell for method in methods for cell in cells if cell.method == method and cell.variant]
    for number in range(rounds):
        for name, work in works.items():
            for cell in running[:: -1 if number % 2 else 1]:  # a host that drifts favours neither end
                assert cell.variant is not None
                cell.timings[name].seconds.append(work(cell.variant, cell.timings[name].repeats))
        for method in methods:
            log(f"round {number + 1} of {rounds}, {method}: {_last([c for c in running if c.method == method])}")
    bandwidth = measure.bandwidth()
    by_method = ([cell for cell in running if cell.method == method] for method in methods)
    growth = [_growth(of_method) for of_method in by_method if len(of_method) > 1]
    rows = [row_of(cell, shape, weights, bandwidth) for cell in cells]
    return {"rounds": rounds, "bandwidth": bandwidth, "rows": rows, "growth": growth}


def works_of(shape: Shape, model: nn.Module | None) -> dict[str, Work]:
    """What is timed: all layers' attention and the whole model's step, each waited for, and queued as in mlx-lm."""
    queries = mx.random.normal((shape.batch, shape.n_heads, 1, shape.head_dim)).astype(measure.DTYPE)
    tokens = mx.zeros((shape.batch, 1), mx.int32)
    mx.eval(queries, tokens)

    def of(step: Callable[[CacheVariant, mx.array], mx.array], first: mx.array) -> tuple[Work, Work]:
        return (
            lambda variant, repeats: measure.timed(lambda: step(variant, first), repeats=repeats, warm=1),
            lambda variant, repeats: measure.queued(lambda x: step(variant, x), first, repeats=repeats, warm=1),
        )

    alone, queued = of(lambda variant, x: variant.attention_step(x), queries)
    works = {"attention": alone, "queued_attention": queued}
    if model is not None:
        works["step"], works["queued_step"] = of(lambda variant, x: variant.model_step(model, x), tokens)
    return works


def _start(cell: Cell, shape: Shape, live: int, works: dict[str, Work], alone: int) -> None:
    """Makes the cell's caches and does each work once to compile it, once to see how long it takes. alone: bytes in use
    before any cell was made."""
    mx.clear_cache()
    others = mx.get_active_memory() - alone
    mx.reset_peak_memory()
    try:
        variant = VARIANTS[cell.method](shape, cell.context, live)
        for name, work in works.items():
            work(variant, 1)
            cell.timings[name] = Timing(max(3, min(_MAX_REPEATS, int(_SECONDS / work(variant, 1)))))
        cell.variant, cell.peak_memory = variant, mx.get_peak_memory() - others
    except RuntimeError as error:  # MLX has no quantised matmul of some shapes on CUDA
        cell.error = str(error).splitlines()[0]


def _last(cells: Sequence[Cell]) -> str:
    """The figures of the last round, so that a run that is cut short leaves some."""
    names = cells[0].timings if cells else ()
    latest = {name: [c.timings[name].seconds[-1] * 1e3 for c in cells] for name in names}
    return "; ".join(f"{name}_ms " + " ".join(f"{ms:.3f}" for ms in figures) for name, figures in latest.items())


def row_of(cell: Cell, shape: Shape, weights: int, bandwidth: float) -> Row:
    row: Row = {"context": cell.context, "method": cell.method}
    if cell.error:
        row["error"] = cell.error
    if cell.variant is None:
        return row
    for name, timing in cell.timings.items():
        low, row[f"{name}_ms"], high = (_quartiles(np.array(timing.seconds)) * 1e3).tolist()
        row[f"{name}_quartiles_ms"] = [low, high]
    row["attention_bytes"] = nbytes = cell.variant.nbytes()
    row["attention_share"] = nbytes / (row["attention_ms"] / 1e3) / bandwidth
    if "queued_step_ms" in row:
        seconds_each = row["queued_step_ms"] / 1e3
        row |= {"tokens_per_second": shape.batch / seconds_each, "bytes": nbytes + weights}
        row["bandwidth_share"] = row["bytes"] / seconds_each / bandwidth
    return row | {"peak_memory": cell.peak_memory}


def _growth(cells: Sequence[Cell]) -> Row:
    """Of one method. A round measures both contexts at about the same time: the host's drift cancels in the ratio."""
    first, *_, last = sorted(cells, key=lambda cell: cell.context)
    row: Row = {"method": first.method, "from": first.context, "to": last.context}
    for name in first.timings:
        ratios = np.array(last.timings[name].seconds) / np.array(first.timings[name].seconds)
        row[name] = (_quartiles(ratios) - 1).tolist()
    return row


def _quartiles(figures: DoubleArray) -> DoubleArray:
    return np.asarray(np.percentile(figures, (25, 50, 75)))
