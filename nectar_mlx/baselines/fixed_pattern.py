"""The fixed pattern of Sparse Transformers (arXiv 1904.10509): as a choice of keys, and as a way to read the text.

"fixed pattern" keeps the keys that the pattern shows to the last token, and attention sinks: the tokens just before it
and the summary columns of every earlier block. "sparse prefill" keeps all keys of a sparse prefill (`fit --prefill
fixed`): its divergence is the cost of that prefill.
"""

import mlx.core as mx

from ..fitting import chunks
from .base import Baseline, EvalContext, View

_SINKS, _SUMMARY = 4, 8


def fixed_pattern(ctx: EvalContext, nbytes: int) -> View:
    count = ctx.affordable_each(nbytes, "exact")
    places, detail = support(ctx.length, count)
    index = mx.broadcast_to(mx.array(places), (ctx.geometry.n_kv_heads, len(places)))
    return ctx.keep(lambda layer: index, detail=detail)


def support(length: int, count: int) -> tuple[list[int], str]:
    """At most `count` of the positions 0 … length - 1, half of them at the end, and a description of the choice."""
    sinks = min(_SINKS, count)
    columns = (count - sinks) // 2
    summary = max(1, min(_SUMMARY, columns))
    blocks = columns // summary
    local = min(length, count) - sinks - blocks * summary
    stride = (length - sinks - local) // max(1, blocks)
    chosen = [sinks + stride * (block + 1) - summary + i for block in range(blocks) for i in range(summary)]
    places = [*range(sinks), *chosen, *range(length - local, length)]
    return places, f"{sinks} sinks, {summary} columns in every {stride}, the last {local} keys"


def sparse_prefill(ctx: EvalContext, nbytes: int) -> View:
    context = ctx.context
    read = chunks.read_chunks(ctx.model, context.prefix, ctx.geometry, chunks=context.chunks, prefill="fixed")
    return View(
        banks=read.banks,
        windows=read.windows,
        start=read.start,
        nbytes=ctx.geometry.cache_bytes(ctx.length),
        detail="all keys and values, as read with --prefill fixed",
    )


BASELINES = (
    Baseline(name="fixed pattern", build=fixed_pattern),
    Baseline(name="sparse prefill", build=sparse_prefill, sized=False, extra=True),
)
