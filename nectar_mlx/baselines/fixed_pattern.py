"""What the fixed pattern of Sparse Transformers (arXiv 1904.10509) reads of a text, kept; and read by that pattern.

The first keeps the keys that the pattern lets the last token see, with attention sinks: the tokens just before it and
summary columns of every earlier block. The second keeps all keys of a sparse prefill (`fit --prefill fixed`), so that
its divergence is what that way of reading costs.
"""

import mlx.core as mx

from ..fitting import chunks
from .base import Baseline, EvalContext, View

_SINKS, _SUMMARY = 4, 8


def fixed_pattern(task: EvalContext, nbytes: int) -> View:
    count = task.affordable_each(nbytes, "exact")
    places, detail = support(task.length, count)
    index = mx.broadcast_to(mx.array(places), (task.geometry.n_kv_heads, len(places)))
    return task.keep(lambda layer: index, detail=detail)


def support(length: int, count: int) -> tuple[list[int], str]:
    """At most `count` of the positions 0 … length - 1, half of them at the end; and how they were chosen."""
    sinks = min(_SINKS, count)
    columns = (count - sinks) // 2
    summary = max(1, min(_SUMMARY, columns))
    blocks = columns // summary
    local = min(length, count) - sinks - blocks * summary
    stride = (length - sinks - local) // max(1, blocks)
    chosen = [sinks + stride * (block + 1) - summary + i for block in range(blocks) for i in range(summary)]
    places = [*range(sinks), *chosen, *range(length - local, length)]
    return places, f"{sinks} sinks, {summary} columns in every {stride}, the last {local} keys"


def sparse_prefill(task: EvalContext, nbytes: int) -> View:
    context = task.context
    read = chunks.read_chunks(task.model, context.prefix, task.geometry, chunks=context.chunks, prefill="fixed")
    return View(
        banks=read.banks,
        windows=read.windows,
        start=read.start,
        nbytes=task.geometry.cache_bytes(task.length),
        detail="all keys and values, as read with --prefill fixed",
    )


BASELINES = (
    Baseline(name="fixed pattern", build=fixed_pattern),
    Baseline(name="sparse prefill", build=sparse_prefill, sized=False, extra=True),
)
