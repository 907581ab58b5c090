"""What can be chosen when fitting, and what follows from it: rows, bytes, sizes of heads."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .. import store
from .._exp import SLOW_EXP
from ..adapter import Geometry
from ..errors import NectarError
from ..heads import KINDS, Size
from ..store import BITS, Layout
from . import budget, starts
from .prefill import Prefill
from .study import DeviceStudy, Study

STEPS = 300 if SLOW_EXP else 1500  # of a regression
# Nodes alone are settled, each row in as many as it needs; more nodes make up for what each loses.
_BITS = {"quadrature": None, "retrieval+nectar": 6, "exact": 16}  # others 8
_ALIASES = {"hybrid": "retrieval+nectar"}
_FEWEST_ROWS, _MOST_ROWS = 20_000, 20_000 if SLOW_EXP else 120_000  # a head; more than the most gain little


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What can be chosen when fitting.

    budget: bytes kept / bytes of the bf16 KV cache, or "auto": the smallest at which answers are expected to be close
    to the full cache's (`auto_budget`). size: bytes to keep, instead of a budget.
    kind: auto, quadrature, mlp, corrected or exact. bits: of a stored matrix entry, 16 or 4 to 8, rounded at once
    (default: for nodes as many as each needs, 4 on average, 6 for those beside exact keys, 8 for networks).
    queries: captured rows a head (default: 20,000; on a GPU up to 120,000, as the memory holds). steps: of the
    regression (default: 1,500 on a GPU, 300 on a CPU). context_tokens: cut the text after so many tokens. memory: bytes
    that the KV cache of the context, or of a chunk of it, may take before the fit goes layer by layer, and captured
    rows before they go to disk (default: half of what is free).
    layerwise: whether it goes layer by layer whatever the memory. prefill: how the text is read, dense, or fixed
    (sparsely, for texts whose dense prefill takes too long).
    """

    budget: float | Literal["auto"] = "auto"
    size: int | None = None
    kind: str = "auto"
    bits: int | None = None
    queries: int | None = None
    steps: int | None = None
    seed: int = 0
    context_tokens: int | None = None
    memory: int | None = None
    layerwise: bool | None = None
    prefill: Prefill = "dense"
    answer_tokens: int = 96
    checks: int = 16 if SLOW_EXP else 96  # questions that a finished file is checked with
    temperature: float = 0.9
    conversations: int = 28 if SLOW_EXP else 384  # sampled side by side, at most
    power: float | None = None  # of the errors that bytes follow; default: 0.6, below a budget of 1% 0.75
    scout_steps: int = 100
    rate: float | None = None  # default: 1.5e-2 for nodes, 2.5e-2 beside exact keys, 6e-3 for networks and feature maps
    batch: int = 512 if SLOW_EXP else 2048
    samples: int = 4096  # rows that Attention Matching solves on

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _ALIASES.get(self.kind, self.kind))
        if self.budget != "auto" and not 0 < self.budget <= 1:
            raise NectarError(
                f"a budget of {self.budget:g} is not in (0, 1]: it is the share of the KV cache to keep, such as 0.02 "
                "or 2%; or give a size such as 20M, or auto"
            )
        if self.bits not in (None, *BITS):
            raise NectarError(f"{self.bits} bits are not supported: choose {', '.join(map(str, BITS))}")
        if self.kind not in ("auto", *KINDS):
            raise NectarError(f"unknown kind {self.kind!r}: choose one of auto, {', '.join([*KINDS, *_ALIASES])}")
        if self.prefill not in ("dense", "fixed"):
            raise NectarError(f"unknown prefill {self.prefill!r}: choose dense or fixed")
        for name in ("size", "queries", "seed", "steps", "context_tokens", "memory"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "seed" else 1):
                raise NectarError(f"{name} must be positive, not {value}")


def rows_for(config: FitConfig, *, heads: int, head_dim: int) -> int:
    """Rows a head, of so many heads at a time: as asked for, or as many as are useful and the memory easily holds."""
    if config.queries:
        return config.queries
    # Of all memory, not of what is free: an interrupted fit goes on with the same rows.
    room = config.memory or _machine().total // 8
    row = (Study if SLOW_EXP else DeviceStudy).nbytes(heads, 1, head_dim)
    return max(_FEWEST_ROWS, min(_MOST_ROWS, room // row))


def layout_for(config: FitConfig, geometry: Geometry, *, n_layers: int) -> Layout:
    kind = "quadrature" if config.kind == "auto" else config.kind
    return Layout(
        kind=kind,
        n_layers=n_layers,
        n_kv_heads=geometry.n_kv_heads,
        head_dim=geometry.head_dim,
        scale=geometry.scale,
        bits=config.bits if config.bits and kind != "exact" else _BITS.get(kind, 8),
    )


def parse_budget(text: str) -> dict[str, Any]:
    """What a person writes, "auto", "0.02", "2%" or "20M", as fields of a `FitConfig`. NectarError for all else."""
    match = re.fullmatch(r"\s*(-?[\d.]+(?:e-?\d+)?)\s*(%|[kKMG]B?)?\s*", text)
    if text.strip() == "auto":
        return {"budget": "auto"}
    try:
        number, unit = (float(match[1]), match[2] or "") if match else (math.nan, "")
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise NectarError(f"a budget is auto, a share such as 0.02 or 2%, or a size such as 500K or 20M, not {text!r}")
    if unit and unit != "%":
        return {"size": int(number * 1000 ** " KMG".index(unit[0].upper()))}
    return {"budget": number / 100 if unit else number}


def share_of(config: FitConfig, geometry: Geometry, n: int) -> float | None:
    """The share of the KV cache of n tokens that is asked for; None where it is still to be chosen."""
    if config.size is not None:
        return config.size / geometry.cache_bytes(n)
    return None if config.budget == "auto" else config.budget


def affordable_bytes(
    share: float,
    *,
    geometry: Geometry,
    layout: Layout,
    n: int,
    parts: int = 1,
    aside: float = 0,
    at_least: bool = False,
) -> float:
    """What a share of the KV cache leaves for the heads of n tokens; what else the file holds is set aside where that
    matters.

    parts: of the text, each of which gets heads of its own. aside: bytes of nodes that are kept whatever the budget.
    at_least: the smallest heads where the share is too small for them, instead of a NectarError.
    """
    n_heads = layout.n_layers * layout.n_kv_heads
    whole = geometry.cache_bytes(n)
    windows = whole - replace(geometry, windows=(0,) * layout.n_layers).cache_bytes(n)
    kept = share * whole
    besides = windows + 4 * n + (24 + 2 * layout.head_dim) * n_heads + 6000
    available = kept - min(besides, kept / 10) - aside
    needed = parts * n_heads * starts.smallest_bytes(layout)
    if available < needed and not at_least:
        smallest = (needed + aside) / 0.9
        raise NectarError(
            f"a budget of {share:.2%} ({kept / 1e6:.2g} MB) is too small for {n:,} tokens: it takes at least "
            f"{math.ceil(1000 * smallest / whole) / 10:g}% ({smallest / 1e6:.2g} MB); --budget auto chooses one"
        )
    return max(available, needed)


def allocate(
    errors: np.ndarray, nbytes: float, *, share: float, layout: Layout, config: FitConfig, n: int
) -> list[Size]:
    """Every head's size for n tokens, by the errors [n_heads] that it made among equals. share: of the KV cache."""
    least, most = starts.smallest_bytes(layout), store.head_bytes(layout, starts.size_for(layout, float("inf"), most=n))
    power = config.power or (0.6 if share >= 0.01 else 0.75)  # of few bytes the heads that matter need more
    each = budget.allocate(errors.tolist(), total=nbytes, power=power, least=least, most=most)
    return [starts.size_for(layout, b, most=n) for b in each]


def free_memory() -> int:
    return int(_machine().available)


def _machine() -> Any:
    import psutil

    return psutil.virtual_memory()
