"""mlx-lm's cache protocol over a fitted context: head functions for the context, an ordinary KV cache for live tokens.

`offset` counts the context too (it is the position of the next token); masks, sizes and bytes are those of the live
tokens alone. There is deliberately no `bits` and no `to_quantized`: mlx-lm would replace it and lose the context.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, Self

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, _BaseCache

from ..core import attention
from ..core.types import LayerCache
from ..errors import NectarError
from ..heads import Bank
from ..kernels import DecodeKernel
from .rows import Row, RunKernels, together


class _Whole:
    """A cache that hands out its whole buffers: the kernel needs no slices, and they take as long to make as its
    call."""

    def keys_and_values(self: Any) -> tuple[mx.array, mx.array]:
        return self.keys, self.values


class WholeCache(_Whole, KVCache):
    pass


class WholeBatch(_Whole, BatchKVCache):
    pass


class LiveCache(LayerCache, Protocol):
    """What a `NectarCache` uses of mlx-lm's KVCache, QuantizedKVCache and BatchKVCache."""

    step: int  # positions that are allocated at a time

    @property
    def offset(self) -> Any: ...

    @property
    def nbytes(self) -> int: ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any: ...

    def make_mask(self, *args: Any, **kwargs: Any) -> Any: ...

    def empty(self) -> bool: ...


class NectarCache(_BaseCache):
    """The cache of one layer. `bank` answers for `context` tokens, `live` holds the keys and values that follow.

    live: mlx-lm's KVCache (default), QuantizedKVCache, or BatchKVCache inside `BatchNectarCache`. kernel: the
    bank's decode kernel, where there is one; keys and values then come in whole buffers.
    """

    context: Any  # one number; an array [B] where sequences of a batch have contexts of their own
    kernel: DecodeKernel | RunKernels | None

    def __init__(
        self, bank: Bank, context: int, live: LiveCache | None = None, kernel: DecodeKernel | RunKernels | None = None
    ):
        self.bank, self.context, self.kernel = bank, context, kernel
        fresh = KVCache if kernel is None else WholeCache
        self.live: LiveCache = fresh() if live is None else live  # type: ignore[no-untyped-call]

    @property
    def offset(self) -> Any:
        return self.context + self.live.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not isinstance(self.live, QuantizedKVCache):
            return self.live.update_and_fetch(keys, values)  # type: ignore[no-any-return]
        # What all keys have in common would take the few bits that tell them apart. (Of latent vectors `keys` are but
        # the first part of the keys.)
        offset = mx.array(0.0) if self.bank.offset is None else self.bank.offset[:, None, : keys.shape[-1]]
        if keys.shape[-1] % self.live.group_size or values.shape[-1] % self.live.group_size:
            widths = f"keys of {keys.shape[-1]} and values of {values.shape[-1]} numbers"
            raise NectarError(f"{widths} cannot be quantized: leave out kv_bits")
        relative = (keys - offset).astype(keys.dtype)
        stored_keys, stored_values = self.live.update_and_fetch(relative, values)
        absolute = (_dequantized(self.live, stored_keys) + offset).astype(keys.dtype)
        self._fetched = absolute, _dequantized(self.live, stored_values)
        return self._fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What `update_and_fetch` returned, for another layer that reads the same."""
        if isinstance(self.live, QuantizedKVCache):
            return self._fetched
        live: Any = self.live
        return live.keys_and_values()  # type: ignore[no-any-return]

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
        """Attention of queries [B, H, T, D] over the context and the live keys [B, K, S, D] and values [B, K, S, V] ->
        [B, H, T, V]. Where V < D, the context's values are as wide as its keys, filled up with zeros.

        sinks [H]: per head, the score of one more token whose value is zero (gpt-oss).
        """
        n = self.size() if isinstance(self.live, _Whole) else keys.shape[2]
        if self.kernel is not None and sinks is None:
            out = self.kernel.attend(queries, keys, values, live=n, left_padding=self.left_padding)
            if out is not None:
                return out
        if n < keys.shape[2]:
            keys, values = keys[..., :n, :], values[..., :n, :]
        live = self.over_live(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        merged = attention.merge(self.over_context(queries), live)
        self.observe(merged.log_normalizer)
        return merged.output[..., : values.shape[-1]].astype(queries.dtype)

    @property
    def left_padding(self) -> mx.array | None:
        """Of a batch [B]: each sequence's first live position with a token; beside it every mask is causal."""
        return None

    def over_live(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> attention.Partial:
        """The live tokens' share, relative to the bank's offset and as wide as the context's is; arguments as for
        `attend`."""
        offset = self.bank.offset
        live = attention.causal(queries, keys, values, scale=scale, mask=mask, offset=self.live_offset)
        if missing := queries.shape[-1] - values.shape[-1]:
            live = live._replace(output=mx.pad(live.output, [(0, 0)] * 3 + [(0, missing)]))
        if sinks is None:
            return live
        return with_sinks(live, sinks, 0.0 if offset is None else attention.common_score(queries, offset, scale=scale))

    @property
    def live_offset(self) -> mx.array | None:
        """What is subtracted from the live keys: the bank's offset, where they are not kept relative to it."""
        return self.bank.offset

    def over_context(self, queries: mx.array) -> attention.Partial:
        """The context's share, [B, H, T, D] -> Partial of [B, H, T, ...]."""
        return self.bank.over(queries)

    def observe(self, log_normalizer: mx.array) -> None:
        """Called after every call of `attend` with the whole attention's log-normalizer [B, H, T]."""

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self.live.make_mask(*args, **kwargs)

    @property
    def state(self) -> object:
        return self.live.state

    @state.setter
    def state(self, v: object) -> None:
        self.live.state = v

    @property
    def nbytes(self) -> int:
        return 0 if self.live.empty() else int(self.live.nbytes)

    def size(self) -> int:
        return int(self.live.offset)

    def empty(self) -> bool:
        return bool(self.live.empty())

    def is_trimmable(self) -> bool:
        return bool(self.live.is_trimmable())

    def trim(self, n: int) -> int:
        """Drops the last n live tokens, at most all of them: never a token of the context."""
        return int(self.live.trim(n))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)(self.bank, self.context, copy.deepcopy(self.live, memo), self.kernel)

    @classmethod
    def merge(cls, caches: Sequence["NectarCache"]) -> "BatchNectarCache":
        """One batch cache from single sequences, behind one context or several; NectarError if they cannot share it."""
        if any(isinstance(cache.live, QuantizedKVCache) for cache in caches):
            raise NectarError("sequences with a quantized cache cannot share a batch: run them one at a time")
        whole = isinstance(caches[0].live, _Whole)
        live = (WholeBatch if whole else BatchKVCache).merge([cache.live for cache in caches])
        return BatchNectarCache([cache.row for cache in caches], live)

    @property
    def row(self) -> Row:
        """What stands before its sequence."""
        return Row(self.bank, self.context, self.kernel)


class BatchNectarCache(NectarCache):
    """Several sequences, left-padded as in mlx-lm's BatchKVCache; `offset` is an array [B]. rows: what stands before
    each of them."""

    live: BatchKVCache

    def __init__(self, rows: Sequence[Row], live: BatchKVCache):
        super().__init__(rows[0].bank, rows[0].context, live)
        self._take(rows)

    def _take(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.bank, self.context, self.kernel = together(self.rows)

    @property
    def left_padding(self) -> mx.array:
        return self.live.left_padding

    def size(self) -> int:
        return int(self.live.size())

    def prepare(self, **kwargs: object) -> None:
        self.live.prepare(**kwargs)

    def finalize(self) -> None:
        self.live.finalize()

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keeps these sequences, in this order."""
        self.live.filter(batch_indices)
        kept: Any = batch_indices.tolist() if isinstance(batch_indices, mx.array) else batch_indices
        self._take([self.rows[i] for i in kept])

    def extend(self, other: "BatchNectarCache") -> None:
        self.live.extend(other.live)
        self._take([*self.rows, *other.rows])

    def extract(self, idx: int) -> NectarCache:
        bank, context, kernel = self.rows[idx]
        return NectarCache(bank, context, self.live.extract(idx), kernel)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return type(self)(self.rows, copy.deepcopy(self.live, memo))


def with_sinks(part: attention.Partial, sinks: mx.array, common: mx.array | float = 0.0) -> attention.Partial:
    """Attention [B, H, T, ...] with one more token a head, of score sinks [H] and value zero, in the denominator.
    common: what the part's scores lack (`attention.common_score`)."""
    scores = mx.broadcast_to(sinks.astype(mx.float32)[:, None] - common, part.log_normalizer.shape)
    return attention.merge(part, attention.Partial(mx.zeros_like(part.output), scores))


def _dequantized(live: QuantizedKVCache, x: Sequence[mx.array]) -> mx.array:
    data, scales, biases = x
    return mx.dequantize(data, scales, biases, group_size=live.group_size, bits=live.bits)
