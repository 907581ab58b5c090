"""What `bench decode` measures: decode steps of every method at every context length, in rounds.

A host changes from minute to minute by more than what is to be compared. So every round times every cell, a method at a
context length, for a moment; a cell's figure is the median of its rounds, and how much a step grows with the context is
asked within each round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import cli
from . import measure
from .measure import KEEPERS, CacheVariant, Shape

Row = dict[str, Any]
Work = Callable[[CacheVariant, int], float]  # (keeper, repeats) -> median seconds

_MOMENT, _MOST = 0.1, 20  # about so many seconds, and at most so many repeats, of a work in a round
_KEPT = {"full": 1.0, "4-bit cache": 4.5 / 16}  # bytes that grow with the context / those of a 16-bit cache


@dataclass
class Cell:
    """A method at a context length. By work: its repeats in a round, and its seconds, one figure a round."""

    context: int
    method: str
    keeper: CacheVariant | None = None  # None: it cannot be measured here
    error: str | None = None
    peak_memory: int = 0
    repeats: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def measured(
    shape: Shape, contexts: Sequence[int], methods: Sequence[str], *, live: int, whole: bool, rounds: int
) -> Row:
    """`rows`, one a cell: medians of the rounds, and [lower, upper] quartiles; `growth`, one a method: how much longer
    each work takes behind the longest context than behind the shortest, a share of it, [lower quartile, median, upper].

    A cell whose cache does not fit the memory beside those before it, or for which MLX has no kernel, has no figures.
    whole: the whole model is run, not its attention alone.
    """
    model = measure.routed(shape) if whole else None
    weights = 0 if model is None else measure.nbytes_of(model)
    works = _works(shape, model)
    cells, taken, alone = list[Cell](), float(weights), mx.get_active_memory()
    for context in contexts:
        for method in methods:
            cells.append(cell := Cell(context, method))
            nbytes = _KEPT.get(method, 0.0) * shape.cache_bytes(context + live)
            if taken + nbytes < 0.8 * measure.memory():
                _start(cell, shape, live, works, alone)
                taken += nbytes if cell.keeper else 0
    # Side by side in time are the cells whose ratios count: a method behind every context.
    running = [cell for method in methods for cell in cells if cell.method == method and cell.keeper]
    for number in range(rounds):
        for name, work in works.items():
            for cell in running[:: -1 if number % 2 else 1]:  # a host that drifts favours neither end
                assert cell.keeper is not None
                cell.seconds[name].append(work(cell.keeper, cell.repeats[name]))
        for method in methods:
            cli.say(f"round {number + 1} of {rounds}, {method}: {_last([c for c in running if c.method == method])}")
    bandwidth = measure.bandwidth()
    by_method = ([cell for cell in running if cell.method == method] for method in methods)
    growth = [_growth(of_method) for of_method in by_method if len(of_method) > 1]
    rows = [_row(cell, shape, weights, bandwidth) for cell in cells]
    return {"rounds": rounds, "bandwidth": bandwidth, "rows": rows, "growth": growth}


def _works(shape: Shape, model: nn.Module | None) -> dict[str, Work]:
    """What is timed: all layers' attention and the whole model's step, each waited for, and queued as in mlx-lm."""
    queries = mx.random.normal((shape.batch, shape.n_heads, 1, shape.head_dim)).astype(measure.DTYPE)
    tokens = mx.zeros((shape.batch, 1), mx.int32)
    mx.eval(queries, tokens)

    def of(step: Callable[[CacheVariant, mx.array], mx.array], given: mx.array) -> tuple[Work, Work]:
        return (
            lambda keeper, repeats: measure.timed(lambda: step(keeper, given), repeats=repeats, warm=1),
            lambda keeper, repeats: measure.queued(lambda x: step(keeper, x), given, repeats=repeats, warm=1),
        )

    alone, queued = of(lambda keeper, x: keeper.attention_step(x), queries)
    works = {"attention": alone, "queued_attention": queued}
    if model is not None:
        works["step"], works["queued_step"] = of(lambda keeper, x: keeper.model_step(model, x), tokens)
    return works


def _start(cell: Cell, shape: Shape, live: int, works: dict[str, Work], alone: int) -> None:
    """Makes the cell's caches and does each work once to compile it, once to see how long it takes. alone: bytes in use
    before any cell was made."""
    mx.clear_cache()
    others = mx.get_active_memory() - alone
    mx.reset_peak_memory()
    try:
        keeper = KEEPERS[cell.method](shape, cell.context, live)
        for name, work in works.items():
            work(keeper, 1)
            cell.repeats[name] = max(3, min(_MOST, int(_MOMENT / work(keeper, 1))))
            cell.seconds[name] = []
        cell.keeper, cell.peak_memory = keeper, mx.get_peak_memory() - others
    except RuntimeError as error:  # MLX has no quantised matmul of some shapes on CUDA
        cell.error = str(error).splitlines()[0]


def _last(cells: Sequence[Cell]) -> str:
    """The newest figures, for whoever waits, and for a run that is cut short."""
    names = cells[0].seconds if cells else ()
    return "; ".join(f"{name}_ms " + " ".join(f"{c.seconds[name][-1] * 1e3:.3f}" for c in cells) for name in names)


def _row(cell: Cell, shape: Shape, weights: int, bandwidth: float) -> Row:
    row: Row = {"context": cell.context, "method": cell.method}
    if cell.error:
        row["error"] = cell.error
    if cell.keeper is None:
        return row
    for name, seconds in cell.seconds.items():
        low, row[f"{name}_ms"], high = (_quartiles(np.array(seconds)) * 1e3).tolist()
        row[f"{name}_quartiles_ms"] = [low, high]
    row["attention_bytes"] = nbytes = cell.keeper.nbytes()
    row["attention_share"] = nbytes / (row["attention_ms"] / 1e3) / bandwidth
    if "queued_step_ms" in row:
        seconds_each = row["queued_step_ms"] / 1e3
        row |= {"tokens_per_second": shape.batch / seconds_each, "bytes": nbytes + weights}
        row["bandwidth_share"] = row["bytes"] / seconds_each / bandwidth
    return row | {"peak_memory": cell.peak_memory}


def _growth(cells: Sequence[Cell]) -> Row:
    """Of one method. A round's two figures stem from the same moment, so their ratio does not depend on the host."""
    first, *_, last = sorted(cells, key=lambda cell: cell.context)
    row: Row = {"method": first.method, "from": first.context, "to": last.context}
    for name in first.seconds:
        ratios = np.array(last.seconds[name]) / np.array(first.seconds[name])
        row[name] = (_quartiles(ratios) - 1).tolist()
    return row


def _quartiles(figures: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.percentile(figures, (25, 50, 75))
    return found
