"""The question without the document: as an ordinary chat, or behind an empty cache."""

import mlx.core as mx

from ..fitting import prefill
from ..heads import Bank, Quadrature
from .base import Baseline, EvalContext, View


def no_context(ctx: EvalContext, nbytes: int) -> View:
    """The chat template's head and the question right behind it: the model never sees the document."""
    head = prefill.read_head(ctx.model, ctx.tokenizer, ctx.context.prefix, ctx.geometry)
    detail = "an ordinary chat about the question alone"
    return View(banks=head.banks, windows=head.windows, start=head.start, nbytes=0, detail=detail)


def empty_cache(ctx: EvalContext, nbytes: int) -> View:
    """Only the live tokens, at their positions behind the document: without the document and the template's head."""
    g = ctx.geometry
    empty = {"keys": mx.zeros((1, g.head_dim)), "values": mx.zeros((1, g.head_dim)), "bias": mx.full((1,), -1e30)}
    banks: list[Bank] = [Quadrature.stack([empty] * g.n_kv_heads, scale=g.scale)] * ctx.n_layers
    detail = "the context cut out, positions kept"
    return View(
        banks=banks, windows=ctx.context.windows, start=ctx.context.start, nbytes=ctx.window_bytes, detail=detail
    )


BASELINES = (
    Baseline(name="no context", build=no_context, sized=False),
    Baseline(name="nothing", build=empty_cache, sized=False),
)
