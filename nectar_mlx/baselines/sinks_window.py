"""Attention sinks and a recent window (StreamingLLM, arXiv 2309.17453): the first four keys and the last ones."""

import mlx.core as mx

from .base import Baseline, EvalContext, View

_SINKS = 4


def sinks_window(ctx: EvalContext, nbytes: int) -> View:
    count = ctx.affordable_each(nbytes, "exact")
    sinks = min(_SINKS, count)
    window = count - sinks
    places = mx.array([*range(sinks), *range(ctx.length - window, ctx.length)])
    index = mx.broadcast_to(places, (ctx.geometry.n_kv_heads, count))
    return ctx.keep(lambda layer: index, detail=f"the first {sinks} and the last {window} keys")


BASELINES = (Baseline(name="sinks + window", build=sinks_window),)
