"""How a long context is read: the attention of a prefill, dense or sparse, in pieces that no GPU watchdog minds.

A sparse prefill reads a context whose dense one would take too long: every token sees its own block and the one
before it, some columns of all earlier blocks (patterns.Fixed), and the first tokens of the text, which models put the
attention on that they need nowhere else (attention sinks, arXiv 2309.17453). Its cost grows as n·√n. The hidden states,
and so the keys and values that are kept, are then not quite those of the model: `nectar evaluate` says what it costs.
"""

from functools import partial
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..core import attention
from ..core.device import device
from ..mlxlm.cache import with_sinks
from ..sparse import Fixed, sparse_attention

Prefill = Literal["dense", "fixed"]

_SUMMARY = 32  # columns of every earlier block that a head sees
FIRST = 16  # tokens at the start of the text that everything sees
_FUSED_SCORES = 1 << 24  # of one fused call: well under a second a layer on the slowest Mac


class ReadingCache(KVCache):
    """A plain KV cache that holds the `length` tokens of a text without ever growing; prefill: how it attends."""

    def __init__(self, length: int, *, prefill: Prefill = "dense"):
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = length  # what mlx-lm allocates at a time
        self._pattern = pattern_for(length) if prefill == "fixed" else None

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """queries [B, H, T, D], the last T of the S positions of keys and values [B, K, S, D] -> [B, H, T, D]."""
        if self._pattern is not None:
            part = sparse(queries, keys, values, pattern=self._pattern, scale=scale)
        elif device().linux_cpu:  # three times faster than MLX's own attention there
            part = attention.causal(queries, keys, values, scale=scale, mask=mask)
        else:
            return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return (part if sinks is None else with_sinks(part, sinks)).output.astype(queries.dtype)


def pattern_for(length: int) -> Fixed:
    return Fixed.balanced(length, summary=_SUMMARY, overlap=True)


def sparse(queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Fixed, scale: float) -> attention.Partial:
    """Attention under the pattern, and to the first tokens of the text for everything after them; shapes as above."""
    T, S = queries.shape[2], keys.shape[2]
    part = sparse_attention(queries, keys, values, pattern=pattern, scale=scale)
    first = min(FIRST, S)
    position = mx.arange(S - T, S)[:, None]
    hidden = pattern.mask(T, S, heads=queries.shape[1], first=first) | (mx.arange(first) > position)
    ahead = attention.causal(queries, keys[:, :, :first], values[:, :, :first], scale=scale, mask=~hidden[None])
    return attention.merge(part, ahead)


def fused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
    max_scores: int = _FUSED_SCORES,
) -> mx.array:
    """MLX's attention; of a causal one with more than `max_scores` scores a head, some of the queries at a time."""
    attend = partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask, sinks=sinks)
    T, S = queries.shape[2], keys.shape[2]
    if max_scores >= T * S or not isinstance(mask, str):
        return attend(queries, keys, values)
    outputs = []
    step = max(32, max_scores // S)
    for start in range(0, T, step):
        stop = min(T, start + step)
        visible = S - T + stop  # causal: aligned with the end of the keys that are given
        outputs.append(attend(queries[:, :, start:stop], keys[:, :, :visible], values[:, :, :visible]))
        mx.eval(outputs[-1])
    return mx.concatenate(outputs, axis=2)
