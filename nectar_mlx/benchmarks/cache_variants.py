"""The variants that `bench decode` times: ways to keep the context of a decode step, with random keys and values."""

import functools
from abc import ABC, abstractmethod
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..core.types import LayerCache
from ..heads import Bank
from ..kernels import DecodeKernel, checking, pack
from ..mlxlm.cache import NectarCache
from .measure import CACHE_STEP, DTYPE, Shape, random_bank


class CacheVariant(ABC):
    """One way to keep a context. `caches`: one mlx-lm cache a layer, with the context and `live` tokens."""

    def __init__(self, shape: Shape, context: int, live: int):
        self.shape, self.live = shape, live
        self.caches: list[Any] = [self.cache(context) for _ in range(shape.layers)]
        mx.eval([c.state for c in self.caches])

    @abstractmethod
    def cache(self, context: int) -> LayerCache:
        """A layer's cache."""

    @abstractmethod
    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        """Attention of queries [B, H, 1, D] of one layer over its whole cache."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the attention of one decode step reads, all layers."""

    def attention_step(self, queries: mx.array) -> mx.array:
        for cache in self.caches:
            queries = self.attend(cache, queries)
        return queries

    def model_step(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The likeliest next tokens [B, 1]. Every step does the same work: the caches drop the token that it adds."""
        logits: mx.array = model(tokens, cache=self.caches)
        for cache in self.caches:
            cache.trim(1)
        return logits[:, -1].argmax(-1, keepdims=True).astype(mx.int32)

    def random(self, tokens: int) -> mx.array:
        shape = (self.shape.batch, self.shape.n_kv_heads, tokens, self.shape.head_dim)
        return mx.random.normal(shape).astype(DTYPE)


class Full(CacheVariant):
    """Every key and value of the context, stock attention."""

    def cache(self, context: int) -> KVCache:
        cache = KVCache()
        cache.keys, cache.values = self.random(context + self.live + 1), self.random(context + self.live + 1)
        cache.offset = context + self.live
        return cache

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        keys, values = cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.shape.scale)

    def nbytes(self) -> int:
        return self.shape.cache_bytes(self.caches[0].offset)


class Quantised4(CacheVariant):
    """mlx-lm's quantised KV cache: 4 bits, groups of 64."""

    bits = 4

    def cache(self, context: int) -> LayerCache:
        cache: Any = QuantizedKVCache(group_size=64, bits=self.bits)
        tokens = -(-(context + self.live + 1) // CACHE_STEP) * CACHE_STEP
        cache.keys = mx.quantize(self.random(tokens), group_size=64, bits=self.bits)
        cache.values = mx.quantize(self.random(tokens), group_size=64, bits=self.bits)
        cache.offset = context + self.live
        return cast("LayerCache", cache)

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        keys = tuple(x[..., : cache.offset, :] for x in cache.keys)
        values = tuple(x[..., : cache.offset, :] for x in cache.values)
        return quantized_scaled_dot_product_attention(
            queries, keys, values, scale=self.shape.scale, mask=None, group_size=64, bits=self.bits
        )

    def nbytes(self) -> int:
        return int(self.shape.cache_bytes(self.caches[0].offset) * (self.bits + 32 / 64) / 16)  # scale and bias a group


class Fused(CacheVariant):
    """The method: `nodes` nodes a head, live keys and values, one kernel."""

    nodes, bits = 655, 16

    def __init__(self, shape: Shape, context: int, live: int):
        self.bank, self.kernel = _fused(shape, self.nodes, self.bits)
        super().__init__(shape, context, live)

    def cache(self, context: int) -> NectarCache:
        cache = NectarCache(self.bank, context, kernel=self.kernel.copy())  # every layer reads memory of its own
        cache.state = self.random(CACHE_STEP), self.random(CACHE_STEP), self.live
        return cache

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        out: mx.array = cache.attend(queries, *cache.live.keys_and_values(), scale=self.shape.scale, mask=None)
        return out

    def nbytes(self) -> int:
        return int(sum(c.kernel.nbytes for c in self.caches)) + self.shape.cache_bytes(self.live)


@functools.lru_cache(maxsize=2)
def _fused(shape: Shape, nodes: int, bits: int) -> tuple[Bank, DecodeKernel]:
    bank, heads = checking.stored(random_bank(shape, nodes), DTYPE, bits)
    return bank, DecodeKernel(pack(bank, dtype=DTYPE, bits=bits, heads=heads))


class Fused8(Fused):
    """The same with 8-bit parameters."""

    bits = 8


class Composed(CacheVariant):
    """The fastest form of a quadrature with stock operations: attention over [nodes, live] with an additive mask."""

    nodes = Fused.nodes

    def __init__(self, shape: Shape, context: int, live: int):
        self.bank = random_bank(shape, self.nodes)
        super().__init__(shape, context, live)

    def cache(self, context: int) -> "ComposedCache":
        return ComposedCache(self.bank, self.random(self.live), self.random(self.live), self.shape.n_heads)

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        out: mx.array = cache.attend(queries, None, None, scale=self.shape.scale)
        return out

    def nbytes(self) -> int:
        return self.shape.cache_bytes(self.caches[0].keys.shape[2])


class ComposedCache(KVCache):
    """Nodes and live tokens in one array, made once: what a cache in this form would pass to stock attention."""

    def __init__(self, bank: Bank, keys: mx.array, values: mx.array, n_heads: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.both = compose_nodes(bank, keys, values)
        self.keys, self.values, mask = self.both
        self.mask = mx.contiguous(mx.repeat(mask, n_heads // mask.shape[1], axis=1))
        mx.eval(self.mask)
        self.offset = self.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.offset += keys.shape[2]
        return self.both[:2]

    def attend(self, queries: mx.array, keys: object, values: object, *, scale: float, mask: object = None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, *self.both[:2], scale=scale, mask=self.mask)


def compose_nodes(bank: Bank, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Keys and values [B, K, m + S, D] of a quadrature's nodes and the live tokens together, and the additive mask
    [1, K, 1, m + S].

    With them `mx.fast.scaled_dot_product_attention` is a quadrature and exact attention merged: the fastest stock form
    for one query token, as exact as biases rounded to `DTYPE` allow.
    """
    nodes = {name: x.astype(DTYPE) for name, x in bank.parameters.items()}
    node_keys = mx.repeat(nodes["keys"][None], keys.shape[0], axis=0)
    node_values = mx.repeat(nodes["values"][None], keys.shape[0], axis=0)
    mask = mx.pad(nodes["bias"], [(0, 0), (0, keys.shape[2])])[None, :, None]
    return mx.concatenate([node_keys, keys], axis=2), mx.concatenate([node_values, values], axis=2), mask


VARIANTS: dict[str, type[CacheVariant]] = {
    "full": Full,
    "4-bit cache": Quantised4,
    "stock": Composed,
    "fused": Fused,
    "fused int8": Fused8,
}
