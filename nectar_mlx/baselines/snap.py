"""SnapKV (arXiv 2404.14469), without the question: what the last tokens of the text attend to, pooled over neighbours.

The observation window is kept itself; the rest goes to the keys that its queries attend to most. The published method
observes from the question's tokens: that would be another cache for every question.
"""

from typing import Any

import mlx.core as mx

from ..core import attention
from ..errors import NectarError
from ..mlxlm.cache import NectarCache
from .base import Baseline, EvalContext, View

_WINDOW, _POOL = 32, 7


def snap(task: EvalContext, nbytes: int) -> View:
    count = task.affordable_each(nbytes, "exact")
    if task.context.chunks:
        raise NectarError("it reads the end of a text once more, and here there are several")
    window = max(1, min(_WINDOW, count // 2, task.length - 1))
    seen = _observed(task, window)
    early = task.length - window
    own = mx.broadcast_to(mx.arange(early, task.length), (task.geometry.n_kv_heads, window))

    def chosen(layer: int) -> mx.array:
        weights = mx.softmax(seen[layer] @ task.layer(layer)[0][:, :early].swapaxes(1, 2).astype(mx.float32), axis=-1)
        best = mx.argsort(-_pooled(weights.mean(1)), axis=1)[:, : count - window]
        return mx.concatenate([mx.sort(best, axis=1), own], axis=1)

    return task.keep(chosen, detail=f"{count} keys a head, the last {window} among them")


class _Observer(NectarCache):
    """Keeps the scaled queries that it sees, [K, rows, D]."""

    def attend(self, queries: mx.array, *args: Any, scale: float, **kwargs: Any) -> mx.array:
        self.seen = attention.group(queries, len(self.bank.sizes)).astype(mx.float32) * scale
        return super().attend(queries, *args, scale=scale, **kwargs)


def _observed(task: EvalContext, window: int) -> list[mx.array]:
    """Per layer, the scaled queries of the last tokens, read behind everything before them."""
    early = task.length - window
    caches = task.context.make_cache()
    for i, cache in enumerate(caches):
        if isinstance(cache, NectarCache):
            bank: Any = cache.bank
            caches[i] = _Observer(bank.part(slice(early)), early)
    mx.eval(task.model(mx.array([task.context.prefix[early:]]), cache=caches))
    return [cache.seen for cache in caches if isinstance(cache, _Observer)]


def _pooled(weights: mx.array) -> mx.array:
    """The largest of each key's neighbourhood, so that keys are kept in clusters; [K, n] -> [K, n]."""
    side = _POOL // 2
    padded = mx.pad(weights, [(0, 0), (side, side)])
    return mx.stack([padded[:, i : i + weights.shape[1]] for i in range(_POOL)]).max(0)


BASELINES = (Baseline(name="SnapKV", build=snap),)
