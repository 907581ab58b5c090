"""The cache behind which conversations are sampled and replayed: exact attention, in half precision on a GPU.

Products of half-precision numbers are summed in float32, and so are softmax's sums and logarithms; a score is rounded
to eleven bits. That suffices where scores are small: relative to the offset, and by a bound that is checked.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core import attention
from ...core.attention import Partial, group, ungroup
from ...core.device import device
from ...core.gather import take
from ...heads import Exact
from ...heads.exact import HalfKeys
from ...kernels import training
from ...mlxlm.cache import NectarCache, WholeCache, with_sinks
from ...mlxlm.kept import attention_caches
from ...store import HALF_MAX
from ..prefill import Context

_LARGEST = 4096.0  # scale · |q| |k|, of any query and key, up to which half precision is used
_PROBED = 64  # tokens whose queries tell how large those to come are
_HIDDEN = -60_000.0  # the score of a hidden key
_QUEUED = 1 << 29  # scores that are queued at a time: with the weights they become, 2 GB


class _Queue:
    """Scores of calls that the device has been told of and may not have computed: they take memory meanwhile."""

    def __init__(self) -> None:
        self._scores = 0

    def add(self, scores: int, result: mx.array) -> None:
        """What a call returns, which takes so many scores: it is waited for where they are many together."""
        self._scores += scores
        if self._scores > _QUEUED:
            mx.eval(result)
            self._scores = 0


_queue = _Queue()


class StudyCache(NectarCache):
    """Attends exactly over context and live tokens, and shows both parts to `see`."""

    _scaled: mx.array  # the queries of the call in half precision, times the scale

    def __init__(self, bank: Any, context: int, live: Any = None, *rest: Any):
        super().__init__(bank, context, live, *rest)
        own = isinstance(bank, Exact) and live is None  # other layers share keys as they are
        self.half = bank.half if own else None
        self._subtracted = bank.offset.astype(mx.float32) if own and bank.offset is not None else None
        if self.half is not None:
            self.live = WholeCache()  # type: ignore[no-untyped-call]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._subtracted is not None and self._subtracted.shape[-1] != keys.shape[-1]:
            self._subtracted = None  # latent attention keeps keys in two parts
        if self._subtracted is not None:  # once, not in every step for all of them
            keys = keys.astype(mx.float32) - self._subtracted[:, None]
        if self.half is None:
            return super().update_and_fetch(keys, values)
        return self.live.update_and_fetch(keys.astype(mx.float16), values.astype(mx.float16))  # type: ignore[no-any-return]

    @property
    def live_offset(self) -> mx.array | None:
        return super().live_offset if self._subtracted is None else None

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
        if self.half is not None:
            self._scaled = scale * queries.astype(mx.float16)
        live = self.over_live(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        context = self.over_context(queries)
        self.see(queries, context, live)
        if self.half is None:
            merged = attention.merge(context, live)
            return merged.output[..., : values.shape[-1]].astype(queries.dtype)
        gate = mx.sigmoid(context.log_normalizer - live.log_normalizer)[..., None].astype(mx.float16)
        output = (live.output + gate * (context.output - live.output)).astype(queries.dtype)
        _queue.add(queries.size // queries.shape[-1] * self.half.keys.shape[1], output)
        return output

    def see(self, queries: mx.array, context: Partial, live: Partial) -> None:
        """Called with what `attend` merges."""

    def over_context(self, queries: mx.array) -> Partial:
        if self.half is None:
            return super().over_context(queries)
        B, _, T, _ = queries.shape
        part = half_attention(group(self._scaled, self.half.keys.shape[0]), self.half)
        return Partial(*(ungroup(x, B, T) for x in part))

    def over_live(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> Partial:
        if self.half is None:
            return super().over_live(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        (B, H, T, D), (K, S), n = queries.shape, keys.shape[1:3], self.size()
        scores = self._scaled.reshape(B, K, H // K * T, D) @ keys.swapaxes(2, 3)
        if mask is not None:
            if isinstance(mask, str):
                mask = mx.arange(n - T, n)[:, None] >= mx.arange(n)
            scores = _masked(scores.reshape(B, H, T, S), mask).reshape(scores.shape)
        weights, log_normalizer = training.softmax(scores, _count(n))
        part = Partial((weights @ values).reshape(B, H, T, D), log_normalizer.reshape(B, H, T))
        if sinks is None:
            return part
        offset = self.bank.offset
        common = 0.0 if offset is None else attention.common_score(queries, offset, scale=scale)
        part = with_sinks(part, sinks, common)
        return part._replace(output=part.output.astype(mx.float16))


class StepCache(StudyCache):
    """Of several sequences that advance in step; some may end before the others."""

    def filter(self, kept: mx.array) -> None:
        live: Any = self.live
        live.keys, live.values = take(live.keys, kept), take(live.values, kept)
        if isinstance(self.context, mx.array):
            self.context = take(self.context, kept)


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    """scores [B, H, T, S] of half precision with a mask of the first columns, bool or additive."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, _HIDDEN)
    mask = mx.clip(mask, _HIDDEN, None).astype(scores.dtype)
    return scores + mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, scores.shape[-1] - mask.shape[-1])])


_counts: dict[int, mx.array] = {}


def _count(n: int) -> mx.array:
    """[n], in the device's memory."""
    if n not in _counts:
        _counts[n] = mx.array([n], mx.int32) + 0
    return _counts[n]


def half_attention(queries: mx.array, keys: HalfKeys) -> Partial:
    """Attention of half-precision queries [K, N, D], times the scale, over the keys; the output is half precision,
    too."""
    K, n = keys.keys.shape[:2]
    step = max(1, device().max_scores // (K * n))
    parts = []
    for start in range(0, queries.shape[1], step):
        scores = queries[:, start : start + step] @ keys.keys.swapaxes(1, 2)
        weights, log_normalizer = training.softmax(scores, keys.known)
        parts.append(Partial(weights @ keys.values, log_normalizer))
        if step < queries.shape[1]:
            mx.eval(parts[-1])  # or the scores of all parts would be there at once
    return parts[0] if len(parts) == 1 else attention.join(parts, axis=1)


class _ProbingCache(NectarCache):
    """Keeps the largest norm of its queries, and whether values are as wide as keys."""

    largest: mx.array
    alike = False

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        self.largest = mx.linalg.norm(queries.astype(mx.float32), axis=-1).max()
        self.alike = keys.shape[-1] == values.shape[-1]
        return super().attend(queries, keys, values, **options)


def allow_half(model: nn.Module, context: Context) -> None:
    """Lets conversations be sampled and replayed in half precision in those layers whose scores are small enough."""
    if not device().half:
        return
    caches = context.make_cache(_ProbingCache)
    hidden = model(mx.array([context.prefix[-_PROBED:]]), cache=caches)
    probing = [c for _, c in attention_caches(caches) if isinstance(c, _ProbingCache)]
    mx.eval(hidden, [c.largest for c in probing])
    for bank, cache in zip(context.banks, probing, strict=True):
        query = float(np.array(cache.largest))
        key = float(np.array(mx.linalg.norm(bank.parameters["keys"].astype(mx.float32), axis=-1).max()))
        small = 2 * bank.scale * query * key < _LARGEST and 2 * query < _LARGEST and bank.largest_value < _LARGEST
        bank.forget_half()
        if small and 2 * key < HALF_MAX and cache.alike:
            bank.halve()
