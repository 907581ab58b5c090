"""Where the bytes go: what a budget leaves for heads, and what each head gets of it.

Fitting every head with the same number of bytes first and giving more to the heads that err more is the largest
single gain after the choice of queries: it halves the divergence at the same size.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .. import store
from ..errors import NectarError
from ..heads import Quadrature, Size
from ..mlxlm.attention_patch import Geometry
from ..store import MEAN_BITS, Layout
from .config import FitConfig

SMALL = 0.01  # share of the KV cache: of fewer bytes the heads that matter need more, and files gain by distillation
MOST_BITS, OVERHEAD_BITS = 11.0, 0.5  # of a number; the second for biases, exponents and what training adds
_MANY, _FEWEST_BITS = 200, 3.0  # nodes a head from which they take MEAN_BITS; what half as many take


def share_of(config: FitConfig, geometry: Geometry, n: int) -> float | None:
    """The share of the KV cache of n tokens that is asked for; None where it is still to be chosen."""
    if config.size is not None:
        return config.size / geometry.cache_bytes(n)
    return None if config.budget == "auto" else config.budget


def distills(
    config: FitConfig,
    layout: Layout,
    share: float | None,
    *,
    chunks: bool = False,
    layerwise: bool = False,
    others: bool = False,
) -> bool:
    """Whether heads are trained through the whole model in the end. chunks, layerwise: how the text is fitted. others:
    whether other files are in view."""
    hindered = undistilled(config, layout, share, chunks=chunks, layerwise=layerwise, others=others)
    return _small(config, share) and not hindered


def undistilled(
    config: FitConfig, layout: Layout, share: float | None, *, chunks: bool, layerwise: bool, others: bool
) -> str:
    """Why heads are not trained through the whole model, for a person, where their fit is of the effort that trains
    small files so; "" for all other fits. Arguments as for `distills`."""
    reasons = {
        "on a CPU": not config.distillation_steps,
        "heads of this kind": layout.bank is not Quadrature or layout.bits is not None,
        "texts that are fitted in chunks": chunks,
        "texts that are fitted layer by layer": layerwise,
        "with other files in view": others,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if not reason or not _small(config, share):
        return ""
    return f"--effort best trains files below {SMALL:.0%} through the whole model, but not {reason}"


def beyond_budget(kept: float, *, windows: float, keys: float) -> float:
    """Bytes by which a file is larger than those that it is to keep, because of what sliding windows take, which is
    kept whatever the budget: `affordable_bytes` gives a tenth of it away at most. keys: bytes of the keys and values
    that heads stand for, in bfloat16."""
    finest = keys * (MOST_BITS + OVERHEAD_BITS) / 16
    return max(0.0, windows + min(0.9 * kept, finest) - kept)


def exceeded(share: float | None, kept: float, *, windows: float, keys: float) -> str:
    """That a file will be larger than its budget by more than a tenth, for a person; "" where it will not. share: that
    is asked for, None where none is. Other arguments as for `beyond_budget`."""
    more = beyond_budget(kept, windows=windows, keys=keys)
    if share is None or more <= kept / 10:
        return ""
    return (
        f"the budget of {share:.2%} is {_size(kept)}, but the model's sliding windows, which are kept as they are, "
        f"take {_size(windows)}: the file will have about {_size(kept + more)}"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def node_bits(layout: Layout, nbytes: float) -> float:
    """That a number of a node takes on average where heads have so many bytes on average: where nodes are few, more of
    them do more than finer ones (docs/log/rounding.md)."""
    nodes = nbytes / store.head_bytes(layout, layout.bank.size_for(_MANY)) * _MANY
    return min(MEAN_BITS, max(_FEWEST_BITS, MEAN_BITS + math.log2(max(nodes, 1) / _MANY)))


def _small(config: FitConfig, share: float | None) -> bool:
    return config.distillation_steps is not None and share is not None and share < SMALL


def affordable_bytes(
    share: float,
    *,
    geometry: Geometry,
    layout: Layout,
    n: int,
    chunks: int = 1,
    preamble: int = 0,
    at_least: bool = False,
) -> float:
    """What a share of the KV cache leaves for the heads of n tokens; what else the file holds is subtracted where that
    matters.

    chunks: of the text, each of which gets heads of its own. preamble: tokens whose keys are kept beside those of the
    chunks, whatever the budget. at_least: the smallest heads where the share is too small for them, instead of a
    NectarError.
    """
    n_heads = layout.n_layers * layout.n_kv_heads
    whole = geometry.cache_bytes(n)
    windows = geometry.window_bytes(n)
    kept = share * whole
    besides = windows + 4 * n + (24 + 2 * layout.head_dim) * n_heads + 6000
    # Keys that are kept as they are take more than nodes that were trained for their grids.
    plain = replace(layout, bits=layout.bits or 8)
    preamble_bytes = n_heads * store.head_bytes(plain, (preamble,)) if preamble else 0.0
    available = kept - min(besides, kept / 10) - preamble_bytes
    needed = chunks * n_heads * smallest_bytes(layout)
    if available < needed and not at_least:
        smallest = (needed + preamble_bytes) / 0.9
        raise NectarError(
            f"a budget of {share:.2%} ({kept / 1e3:,.1f} kB) is too small for {n:,} tokens: it takes at least "
            f"{math.ceil(1000 * smallest / whole) / 10:g}% ({smallest / 1e3:,.1f} kB); --budget auto chooses one"
        )
    return max(available, needed)


def head_sizes(
    errors: np.ndarray, nbytes: float, *, share: float, layout: Layout, config: FitConfig, n: int
) -> list[Size]:
    """Every head's size for n tokens, by the errors [n_heads] that it made among equals. share: of the KV cache."""
    bits = node_bits(layout, nbytes / len(errors))
    least, most = smallest_bytes(layout), store.head_bytes(layout, layout.bank.size_for(n), bits=bits)
    power = config.power or (0.6 if share >= SMALL else 0.75)
    head_bytes = allocate(errors.tolist(), total=nbytes, power=power, least=least, most=most)
    return [size_for(layout, b, bits=bits, most=n) for b in head_bytes]


def allocate(errors: Sequence[float], *, total: float, power: float, least: float, most: float) -> list[float]:
    """Bytes a head, proportional to error^power, within [least, most]; they add up to `total`, bounds allowing."""
    share = np.maximum(np.asarray(errors, dtype=np.float64), 1e-12) ** power
    if total <= least * len(share):
        return [least] * len(share)
    if total >= most * len(share):  # the bisection ends a rounding error below: a node less, and no finer bits for all
        return [most] * len(share)
    low, high = 0.0, most / share.min()
    for _ in range(100):  # bisection on the common factor: the sum grows with it
        factor = (low + high) / 2
        if np.clip(factor * share, least, most).sum() > total:
            high = factor
        else:
            low = factor
    return [float(x) for x in np.clip(low * share, least, most)]


def size_for(layout: Layout, nbytes: float, *, bits: float, most: int) -> Size:
    """The largest head of the kind that these bytes buy, the smallest one if they buy none. bits: of a number of a
    node. most: of nodes or hidden units.
    """
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if store.head_bytes(layout, layout.bank.size_for(middle), bits=bits) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return layout.bank.size_for(low)


def equal_size(layout: Layout, nbytes: float, *, heads: int, most: int) -> Size:
    """The size of each of so many equal heads that have these bytes together. most: as for `size_for`."""
    each = nbytes / heads
    return size_for(layout, each, bits=node_bits(layout, each), most=most)


def smallest_bytes(layout: Layout) -> float:
    """Bytes of the smallest head worth fitting: four nodes, or the smallest network."""
    return store.head_bytes(layout, layout.bank.size_for(4), bits=_FEWEST_BITS)
