"""mlx-lm's cache protocol over a fitted context: a head function for the context, an ordinary KV cache for the live tokens.

`offset` counts the context too (it is the position of the next token); masks, sizes and bytes are those of the live tokens alone.
There is deliberately no `bits` and no `to_quantized`: mlx-lm would replace the object and drop the context with it.
"""

import copy
from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, _BaseCache

from . import attention
from .errors import NectarError
from .heads import Bank


class NectarCache(_BaseCache):
    """The cache of one layer. `bank` answers for `context` tokens, `live` holds the keys and values that came after them.

    live: mlx-lm's KVCache (default), QuantizedKVCache, or BatchKVCache inside `BatchNectarCache`.
    """

    def __init__(self, bank: Bank, context: int, live: Any = None):
        self.bank, self.context = bank, context
        self.live = KVCache() if live is None else live

    @property
    def offset(self) -> Any:
        return self.context + self.live.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self.live.update_and_fetch(keys, values)
        if isinstance(self.live, QuantizedKVCache):
            form = {"group_size": self.live.group_size, "bits": self.live.bits}
            keys, values = mx.dequantize(*keys, **form), mx.dequantize(*values, **form)
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        """Attention of queries [B, H, T, D] over the context and the live keys and values [B, K, S, D] -> [B, H, T, D]."""
        live = attention.causal(queries, keys, values, scale=scale, mask=mask)
        merged = attention.merge(self.over_context(queries), live)
        return merged.output.astype(queries.dtype)

    def over_context(self, queries: mx.array) -> attention.Partial:
        """The context's share, [B, H, T, D] -> Partial of [B, H, T, ...]."""
        B, _, T, _ = queries.shape
        part = self.bank(attention.group(queries, len(self.bank.sizes)))
        return attention.Partial(*(attention.ungroup(x, B, T) for x in part))

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self.live.make_mask(*args, **kwargs)

    @property
    def state(self) -> Any:
        return self.live.state

    @state.setter
    def state(self, v: Any) -> None:
        self.live.state = v

    @property
    def nbytes(self) -> int:
        return int(self.live.nbytes)

    def size(self) -> int:
        return int(self.live.size())

    def empty(self) -> bool:
        return bool(self.live.empty())

    def is_trimmable(self) -> bool:
        return bool(self.live.is_trimmable())

    def trim(self, n: int) -> int:
        return int(self.live.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.bank, self.context, copy.deepcopy(self.live, memo))

    @classmethod
    def merge(cls, caches: Sequence["NectarCache"]) -> "BatchNectarCache":
        """One batch cache from single sequences behind the same context; NectarError if the contexts differ."""
        first = caches[0]
        if any(c.bank is not first.bank for c in caches):
            raise NectarError("sequences with different contexts cannot share a batch: run them separately")
        return BatchNectarCache(first.bank, first.context, BatchKVCache.merge([c.live for c in caches]))


class BatchNectarCache(NectarCache):
    """Several sequences behind one context, left-padded as in mlx-lm's BatchKVCache; `offset` is an array [B]."""

    live: BatchKVCache

    def prepare(self, **kwargs: Any) -> None:
        self.live.prepare(**kwargs)

    def finalize(self) -> None:
        self.live.finalize()

    def filter(self, batch_indices: Any) -> None:
        self.live.filter(batch_indices)

    def extend(self, other: "BatchNectarCache") -> None:
        if other.bank is not self.bank:
            raise NectarError("sequences with different contexts cannot share a batch: run them separately")
        self.live.extend(other.live)

    def extract(self, idx: int) -> NectarCache:
        return NectarCache(self.bank, self.context, self.live.extract(idx))
