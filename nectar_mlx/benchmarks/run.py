"""The benchmarks as functions: each returns one JSON object with the machine, its settings and its rows."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

import mlx.core as mx

from .. import __version__, kernels
from ..core.progress import Log, no_log
from ..core.types import JsonObject
from ..errors import NectarError
from ..fitting.config import FitConfig
from . import checks, measure, measure_decode, measure_fit
from . import tune as tuning
from .cache_variants import VARIANTS, CacheVariant
from .measure import SHAPES, Shape

Row = JsonObject


def decode(
    shape: Shape,
    contexts: Sequence[int],
    methods: Sequence[str],
    *,
    live: int,
    whole: bool,
    rounds: int,
    log: Log = no_log,
) -> Row:
    """A decode step of every method at every context length, in rounds: see `measure_decode`.

    attention_ms is the attention of all layers alone, step_ms the whole model. The queued figures are a step's share of
    a loop that queues the next step before it waits for this one, as mlx-lm's does; they give tokens_per_second. Bytes
    are those that a step must read; their share is of the measured copy bandwidth.
    """
    rows = measure_decode.measured(shape, contexts, methods, live=live, whole=whole, rounds=rounds, log=log)
    return _machine() | {"shape": shape.name, "batch": shape.batch, "live": live} | rows


def fit(shape: Shape, contexts: Sequence[int], config: FitConfig, *, log: Log = no_log) -> Row:
    """Every stage of a fit at every context length that fits the memory, with random weights and tokens."""
    lengths = [n for n in contexts if 2 * shape.cache_bytes(n) < 0.8 * measure.memory()]
    if not lengths:
        raise NectarError(f"the keys and values of {min(contexts)} tokens do not fit the memory: ask for fewer tokens")
    rows = []
    for row in measure_fit.rows(shape, lengths, config):
        log(f"{row['context']} tokens, {row['stage']}: {row['seconds']:.1f} s, {row['peak_memory'] / 1e9:.2f} GB")
        rows.append(row)
    for row in rows:
        fit = [other for other in rows if other["context"] == row["context"]]
        row["share"] = row["seconds"] / sum(other["seconds"] for other in fit)
        row["prefills"] = row["seconds"] / fit[0]["seconds"]
    queries = max(row.pop("samples", 0) for row in rows)
    sizes = {"layers": shape.layers, "queries": queries, "steps": config.steps, "budget": config.budget}
    return _machine() | {"shape": shape.name, "bandwidth": measure.bandwidth(), "rows": rows} | sizes


def selftest() -> Row:
    """Every kernel variant against plain float32 on the CPU, then the speed of the common ones."""
    _require_kernels()
    shape = SHAPES["qwen3-1.7b"]
    rows = checks.rows()
    speed = {}
    for context in (8192, 32768):
        speed[f"stock attention, {context} keys"] = _attention_ms(VARIANTS["full"](shape, context, 64))
    for name in ("stock", "fused", "fused int8"):
        speed[f"{name}, 655 nodes"] = _attention_ms(VARIANTS[name](shape, 0, 64))
    return _machine() | {"bandwidth": measure.bandwidth(), "checks": rows, "ms_for_28_layers": speed}


def _attention_ms(variant: CacheVariant) -> float:
    shape = variant.shape
    queries = mx.random.normal((1, shape.n_heads, 1, shape.head_dim)).astype(measure.DTYPE)
    return measure.timed(lambda: variant.attention_step(queries)) * 1e3


def tune(shape: Shape, *, log: Log = no_log) -> Row:
    """The decode kernel's speed with other numbers of rows in flight, query rows of a simdgroup, and blocks."""
    _require_kernels()
    rows = []
    for row in tuning.rows(shape):
        choice = ", ".join(f"{name} {row[name]}" for name in ("storage", "flight", "tile", "blocks"))
        log(f"{choice}: {row['ms']:.3f} ms" if "ms" in row else f"{choice}: does not work")
        rows.append(row)
    return _machine() | {"shape": shape.name, "layers": shape.layers, "bandwidth": measure.bandwidth(), "tuning": rows}


def _require_kernels() -> None:
    if kernels.backend() == "ops":
        raise NectarError("this machine has neither Metal nor CUDA, so there is no kernel to test: use a Mac")


def _machine() -> Row:
    info = mx.device_info()
    return {
        "nectar_mlx": __version__,
        "mlx": version("mlx"),
        "backend": kernels.backend(),
        "device": str(info.get("device_name") or info.get("architecture") or platform.processor()),
        "system": platform.platform(),
    }
