"""KVzip (arXiv 2505.23416): the keys that the model attends to most while it repeats the text.

The text is fed once more behind a request to repeat it, a chunk at a time. A key's score is the largest attention that
any query of this pass gives to it; those of the highest scores stay, of all heads together, and the chat template's own
tokens in any case. The published method takes attention among the keys of the chunk, here it is that of the whole text:
the same for a text of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..core import attention
from ..core.device import device
from ..core.exp import exp
from ..core.types import FloatArray
from ..errors import NectarError
from ..heads import HeadArrays
from ..mlxlm import prompts
from ..mlxlm.cache import NectarCache
from .base import Baseline, EvalContext, View

_CHUNK, _CUE = 2000, 8  # tokens: repeated at a time; of the chunk before, as where to start
_WHOLE = "Repeat the previous context exactly."
_PART = "Repeat the part of the previous context exactly, starting with "
_BITS = 8


def kvzip(ctx: EvalContext, nbytes: int) -> View:
    count = min(ctx.affordable(nbytes, "quadrature", _BITS), ctx.n_heads * ctx.length)
    least = max(1, len(ctx.head))
    if count < ctx.n_heads * least:
        raise NectarError(f"{nbytes:,} bytes do not hold the {least} first keys of every head")
    scores = repetition_scores(ctx)
    scores[:, :least] = np.inf
    kept = np.zeros(scores.size, bool)
    kept[np.argpartition(-scores.ravel(), count - 1)[:count]] = True
    heads = list[HeadArrays]()
    for index, places in enumerate(kept.reshape(scores.shape)):
        layer, k = divmod(index, ctx.geometry.n_kv_heads)
        keys, values = ctx.layer(layer)
        chosen = mx.array(np.flatnonzero(places).astype(np.int32))
        heads.append({"keys": keys[k][chosen], "values": values[k][chosen], "bias": ctx.bias(layer)[k][chosen]})
    return ctx.stored("quadrature", heads, bits=_BITS, detail=f"{count // ctx.n_heads} keys a head on average")


def repetition_scores(ctx: EvalContext) -> FloatArray:
    """The largest attention that each key of the text gets while the model repeats it, [heads, n]."""
    scores = mx.zeros((ctx.n_heads, ctx.length))
    for tokens in _requests(ctx):
        caches = ctx.context.make_cache(_Scorer)
        scorers = [cache for cache in caches if isinstance(cache, _Scorer)]
        ctx.model(mx.array([tokens]), cache=caches)
        scores = mx.maximum(scores, mx.concatenate([scorer.scores for scorer in scorers]))
        mx.eval(scores)
    return np.array(scores)


def _requests(ctx: EvalContext) -> Iterator[list[int]]:
    """For each chunk of the text, the request to repeat it and the chunk."""
    text = ctx.context.prefix[len(ctx.head) :]
    for start in range(0, len(text), _CHUNK):
        cue = str(ctx.tokenizer.decode(text[max(0, start - _CUE) : start], skip_special_tokens=True))
        yield prompts.prompt(ctx.tokenizer, _PART + cue if start else _WHOLE) + text[start : start + _CHUNK]


class _Scorer(NectarCache):
    """Keeps the largest attention that each key of the context gets, [K, n]."""

    def attend(self, queries: mx.array, *args: Any, scale: float, **options: Any) -> mx.array:
        self._queries = attention.group(queries, len(self.bank.sizes)).astype(mx.float32) * scale
        return super().attend(queries, *args, scale=scale, **options)

    def observe(self, log_normalizer: mx.array) -> None:
        keys = self.bank.parameters["keys"].astype(mx.float32)
        bias = self.bank.parameters.get("bias", mx.zeros(keys.shape[:2]))
        logs = attention.group(log_normalizer[..., None], keys.shape[0])
        self.scores = mx.zeros(keys.shape[:2])
        step = max(1, device().max_scores // bias.size)
        for start in range(0, logs.shape[1], step):
            rows = slice(start, start + step)
            scores = self._queries[:, rows] @ keys.swapaxes(1, 2) + bias[:, None]
            self.scores = mx.maximum(self.scores, exp(mx.minimum(scores - logs[:, rows], 0.0)).max(1))
            mx.eval(self.scores)


BASELINES = (Baseline(name="KVzip", build=kvzip),)
