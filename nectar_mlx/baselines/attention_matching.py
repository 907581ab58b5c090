"""Attention Matching in closed form (arXiv 2602.16284) on self-study queries.

With the same number of nodes for every head, or with budgets that follow the cost of each head's error in nats. Nodes
are stored in 5 bits, which gives the best result for the bytes, or in int8.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..fitting import budget, fidelity
from ..fitting.solve import attention_matching, regression
from ..heads import Bank, HeadArrays
from .base import Baseline, EvalContext, View

_POWERS = (0.25, 0.5, 0.75)
_CHECKED = 8  # conversations on which the power is chosen


def uniform(ctx: EvalContext, nbytes: int, *, bits: int | None = None) -> View:
    count = ctx.affordable_each(nbytes, "quadrature", bits)
    return _matched(ctx, [count] * ctx.n_heads, f"{count} nodes a head", bits=bits)


def budgets(ctx: EvalContext, nbytes: int, *, bits: int | None = None) -> View:
    """Nodes in proportion to a power of the cost of the uniform solution's errors; the best of a few powers."""
    nodes, most = ctx.affordable(nbytes, "quadrature", bits), ctx.length
    first = uniform(ctx, nbytes, bits=bits)
    errors = [e for layer in range(ctx.n_layers) for e in _errors(ctx, layer, first.banks[layer])]
    sizes = {
        power: [int(x) for x in budget.allocate(errors, total=nodes, power=power, least=4, most=most)]
        for power in _POWERS
    }
    views = {
        power: _matched(ctx, size, f"nodes in proportion to nats^{power}", bits=bits) for power, size in sizes.items()
    }
    divergences = fidelity.compare(
        ctx.model,
        ctx.context.make_cache,
        {str(power): view.make_cache for power, view in views.items()},
        ctx.answered[:_CHECKED],
    )
    return views[min(views, key=lambda power: float(divergences[str(power)].kl.mean()))]


def _errors(ctx: EvalContext, layer: int, bank: Bank) -> list[float]:
    K = ctx.geometry.n_kv_heads
    metric = ctx.metric[layer * K : layer * K + K]
    return [float(e) for e in np.array(regression.errors(bank, ctx.captured(layer), metric=metric))]


def _matched(ctx: EvalContext, sizes: Sequence[int], detail: str, *, bits: int | None) -> View:
    """Attention Matching with sizes[i] nodes in head i."""
    K, heads = ctx.geometry.n_kv_heads, list[HeadArrays]()
    for layer in range(ctx.n_layers):
        chosen = [
            attention_matching.most_important(ctx.importance[layer][k], min(sizes[layer * K + k], ctx.length))
            for k in range(K)
        ]
        layer_keys, layer_values = ctx.layer(layer)
        keys = [layer_keys[k][index] for k, index in enumerate(chosen)]
        values = [layer_values[k][index] for k, index in enumerate(chosen)]
        heads += attention_matching.match(ctx.captured(layer), keys, values, scale=ctx.geometry.scale)
    return ctx.stored("quadrature", heads, bits=bits, detail=detail)


BASELINES = (
    Baseline(name="Attention Matching", build=uniform),
    Baseline(name="Attention Matching + budgets", build=budgets),
    Baseline(name="Attention Matching in int8", build=partial(uniform, bits=8), extra=True),
    Baseline(name="Attention Matching + budgets in int8", build=partial(budgets, bits=8), extra=True),
)
