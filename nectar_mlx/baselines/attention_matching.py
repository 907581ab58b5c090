"""Attention Matching in closed form (arXiv 2602.16284) from self-study queries: with the same number of nodes for
every head, and with budgets that follow what the heads' errors cost the answers, in nats. Nodes are kept in 5 bits, in
which it is at its best, and in int8."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..fitting import budget, fidelity
from ..fitting.solve import attention_matching, regression
from ..heads import Bank, HeadArrays
from .base import Baseline, EvalContext, View

_POWERS = (0.25, 0.5, 0.75)
_CHECKED = 8  # conversations of the study on which the power is chosen


def uniform(task: EvalContext, nbytes: int, *, bits: int | None = None) -> View:
    count = task.affordable_each(nbytes, "quadrature", bits)
    return _matched(task, [count] * task.n_heads, f"{count} nodes a head", bits=bits)


def budgets(task: EvalContext, nbytes: int, *, bits: int | None = None) -> View:
    """Nodes in proportion to a power of what the uniform solution's errors cost; the power is the best of a few."""
    nodes, most = task.affordable(nbytes, "quadrature", bits), task.length
    first = uniform(task, nbytes, bits=bits)
    errors = [e for layer in range(task.n_layers) for e in _errors(task, layer, first.banks[layer])]
    sizes = {
        power: [int(x) for x in budget.allocate(errors, total=nodes, power=power, least=4, most=most)]
        for power in _POWERS
    }
    views = {
        power: _matched(task, size, f"nodes in proportion to nats^{power}", bits=bits) for power, size in sizes.items()
    }
    conversations = [c for c in task.studied[1] if c.answer][:_CHECKED]
    found = fidelity.compare(
        task.model, task.context.make_cache, {str(p): v.make_cache for p, v in views.items()}, conversations
    )
    return views[min(views, key=lambda power: float(found[str(power)].kl.mean()))]


def _errors(task: EvalContext, layer: int, bank: Bank) -> list[float]:
    K = task.geometry.n_kv_heads
    metric = task.metric[layer * K : layer * K + K]
    return [float(e) for e in np.array(regression.errors(bank, task.captured(layer), metric=metric))]


def _matched(task: EvalContext, sizes: Sequence[int], detail: str, *, bits: int | None) -> View:
    """Attention Matching with sizes[i] nodes in head i."""
    K, heads = task.geometry.n_kv_heads, list[HeadArrays]()
    for layer in range(task.n_layers):
        chosen = [
            attention_matching.most_important(task.importance[layer][k], min(sizes[layer * K + k], task.length))
            for k in range(K)
        ]
        keys, values = ([x[k][index] for k, index in enumerate(chosen)] for x in task.layer(layer))
        heads += attention_matching.match(task.captured(layer), keys, values, scale=task.geometry.scale)
    return task.stored("quadrature", heads, bits=bits, detail=detail)


BASELINES = (
    Baseline(name="Attention Matching", build=uniform),
    Baseline(name="Attention Matching + budgets", build=budgets),
    Baseline(name="Attention Matching in int8", build=partial(uniform, bits=8), extra=True),
    Baseline(name="Attention Matching + budgets in int8", build=partial(budgets, bits=8), extra=True),
)
