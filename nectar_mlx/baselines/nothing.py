"""Without the document: the question as an ordinary chat, and the question behind nothing at all."""

import mlx.core as mx

from ..fitting import prefill
from ..heads import Bank, Quadrature
from .base import Baseline, EvalContext, View


def no_context(task: EvalContext, nbytes: int) -> View:
    """The chat template's head and the question right behind it: what the model says that never saw the document."""
    head = prefill.read_head(task.model, task.tokenizer, task.context.prefix, task.geometry)
    detail = "an ordinary chat about the question alone"
    return View(banks=head.banks, windows=head.windows, start=head.start, nbytes=0, detail=detail)


def nothing(task: EvalContext, nbytes: int) -> View:
    """Not even the template's head: the live tokens alone, at the positions they have behind the document."""
    g = task.geometry
    empty = {"keys": mx.zeros((1, g.head_dim)), "values": mx.zeros((1, g.head_dim)), "bias": mx.full((1,), -1e30)}
    banks: list[Bank] = [Quadrature.stack([empty] * g.n_kv_heads, scale=g.scale)] * task.n_layers
    detail = "the context cut out, positions kept"
    return View(
        banks=banks, windows=task.context.windows, start=task.context.start, nbytes=task.window_bytes, detail=detail
    )


BASELINES = (
    Baseline(name="no context", build=no_context, sized=False),
    Baseline(name="nothing", build=nothing, sized=False),
)
