"""SnapKV (arXiv 2404.14469) without the question: the keys that the text's last tokens attend to, max-pooled.

It keeps the observation window itself and the keys that the window's queries attend to most. The published method
observes from the question's tokens, which needs another cache for every question.
"""

from typing import Any, cast

import mlx.core as mx

from ..core import attention
from ..errors import NectarError
from ..heads import Exact
from ..mlxlm.cache import NectarCache
from .base import Baseline, EvalContext, View

_WINDOW, _POOL = 32, 7


def snap(ctx: EvalContext, nbytes: int) -> View:
    count = ctx.affordable_each(nbytes, "exact")
    if ctx.context.chunks:
        raise NectarError("it reads the end of the text again, but a text that was read in chunks has several ends")
    window = max(1, min(_WINDOW, count // 2, ctx.length - 1))
    queries = _observed(ctx, window)
    early = ctx.length - window
    own = mx.broadcast_to(mx.arange(early, ctx.length), (ctx.geometry.n_kv_heads, window))

    def chosen(layer: int) -> mx.array:
        weights = mx.softmax(queries[layer] @ ctx.layer(layer)[0][:, :early].swapaxes(1, 2).astype(mx.float32), axis=-1)
        best = mx.argsort(-pooled(weights.mean(1)), axis=1)[:, : count - window]
        return mx.concatenate([mx.sort(best, axis=1), own], axis=1)

    return ctx.keep(chosen, detail=f"{count} keys a head, the last {window} among them")


class _Observer(NectarCache):
    """Records the scaled queries of its last call, [K, rows, D]."""

    def attend(self, queries: mx.array, *args: Any, scale: float, **kwargs: Any) -> mx.array:
        self.queries = attention.group(queries, len(self.bank.sizes)).astype(mx.float32) * scale
        return super().attend(queries, *args, scale=scale, **kwargs)


def _observed(ctx: EvalContext, window: int) -> list[mx.array]:
    """Per layer, the scaled queries of the last tokens, read behind everything before them."""
    early = ctx.length - window
    caches = ctx.context.make_cache()
    for i, cache in enumerate(caches):
        if isinstance(cache, NectarCache):
            bank = cast("Exact", cache.bank)
            caches[i] = _Observer(bank.part(slice(early)), early)
    mx.eval(ctx.model(mx.array([ctx.context.prefix[early:]]), cache=caches))
    return [cache.queries for cache in caches if isinstance(cache, _Observer)]


def pooled(weights: mx.array) -> mx.array:
    """The maximum over each key's neighbourhood, so that keys are kept in clusters; [K, n] -> [K, n]."""
    side = _POOL // 2
    padded = mx.pad(weights, [(0, 0), (side, side)])
    return mx.stack([padded[:, i : i + weights.shape[1]] for i in range(_POOL)]).max(0)


BASELINES = (Baseline(name="SnapKV", build=snap),)
