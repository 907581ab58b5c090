"""What `bench` measures: a model's decode step with a context kept in different ways, all weights and keys random."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..heads import Bank, Corrected, Quadrature, Size, TargetScore
from ..kernels import DecodeKernel, checking, pack
from ..mlxlm import attention_patch
from ..mlxlm.cache import NectarCache

DTYPE = mx.bfloat16
ROOM = 256  # live positions that mlx-lm's caches allocate at a time


@dataclass(frozen=True)
class Shape:
    """What of a model matters to the speed of a decode step."""

    name: str
    layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    batch: int = 1

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def cache_bytes(self, tokens: int) -> int:
        """Of 16-bit keys and values, all layers and sequences."""
        return self.batch * self.layers * self.n_kv_heads * tokens * self.head_dim * 4

    def model(self) -> nn.Module:
        arguments = qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.n_heads,
            rms_norm_eps=1e-6,
            vocab_size=self.vocabulary,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=1 << 20,
            rope_theta=1e6,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
        )
        model = qwen3.Model(arguments)
        model.set_dtype(DTYPE)
        mx.eval(model.parameters())
        return model


SHAPES = {
    s.name: s
    for s in (
        Shape("toy", 2, 4, 2, 64, 128, 256, 512),
        Shape("qwen3-1.7b", 28, 16, 8, 128, 2048, 6144, 151936),
        Shape("qwen3-4b", 36, 32, 8, 128, 2560, 9728, 151936),
        Shape("qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936),
    )
}


def random_bank(shape: Shape, nodes: int, units: int = 0, *, seed: int = 0) -> Bank:
    """Heads of `nodes` nodes on average (in turn 2/5 and 8/5 of it), and of `units` gated hidden units each."""
    sizes = [(nodes * (2 if k % 2 else 8) // 5, *[units] * (units > 0)) for k in range(shape.n_kv_heads)]
    return _random(Corrected if units else Quadrature, sizes, shape, seed)


def random_networks(shape: Shape, units: int, layers: int, *, seed: int = 0) -> Bank:
    """Target networks of `units` hidden units a layer (in turn 2/5 and 8/5 of it), score networks of a third."""
    each = [units * (2 if k % 2 else 8) // 5 for k in range(shape.n_kv_heads)]
    return _random(TargetScore, [(n, layers, -(-n // 3), layers) for n in each], shape, seed)


def _random(kind: type[Bank], sizes: Sequence[Size], shape: Shape, seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    heads = []
    for size in sizes:
        shapes = kind.shapes(size, shape.head_dim)
        spread = {n: 1.0 if n in ("keys", "values", "bias") else 0.1 for n in shapes}
        heads.append({n: mx.array((rng.standard_normal(s) * spread[n]).astype(np.float32)) for n, s in shapes.items()})
    return kind.stack(heads, scale=shape.scale)


class CacheVariant:
    """One way to keep a context. A layer's cache, as mlx-lm calls it, is what `caches` returns, `live` tokens old."""

    def __init__(self, shape: Shape, context: int, live: int):
        self.shape, self.live = shape, live
        self.caches: list[Any] = [self.cache(context) for _ in range(shape.layers)]
        mx.eval([c.state for c in self.caches])

    def cache(self, context: int) -> Any:
        raise NotImplementedError

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        """Attention of queries [B, H, 1, D] of one layer over everything that its cache holds."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Read by the attention of one decode step, all layers."""
        raise NotImplementedError

    def attention_step(self, queries: mx.array) -> mx.array:
        for cache in self.caches:
            queries = self.attend(cache, queries)
        return queries

    def model_step(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The likeliest next tokens [B, 1]. Every step is the same step: what it adds, the next one overwrites."""
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

    def cache(self, context: int) -> Any:
        cache: Any = QuantizedKVCache(group_size=64, bits=self.bits)
        tokens = -(-(context + self.live + 1) // ROOM) * ROOM
        cache.keys, cache.values = (mx.quantize(self.random(tokens), group_size=64, bits=self.bits) for _ in range(2))
        cache.offset = context + self.live
        return cache

    def attend(self, cache: Any, queries: mx.array) -> mx.array:
        keys, values = (tuple(x[..., : cache.offset, :] for x in part) for part in (cache.keys, cache.values))
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
        cache.state = self.random(ROOM), self.random(ROOM), self.live
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
    """The best that stock operations make of a quadrature: attention over [nodes, live] with an additive mask."""

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
    """Nodes and live tokens side by side, made once: what a cache that keeps them so would hand to stock attention."""

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

    def attend(self, queries: mx.array, keys: Any, values: Any, *, scale: float, mask: Any = None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, *self.both[:2], scale=scale, mask=self.mask)


def compose_nodes(bank: Bank, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Keys and values [B, K, m + S, D] of a quadrature's nodes and the live tokens together, and the additive mask
    [1, K, 1, m + S].

    With them `mx.fast.scaled_dot_product_attention` is a quadrature and exact attention merged: the fastest stock form
    for one query token, as exact as biases rounded to `DTYPE` allow.
    """
    nodes = {name: x.astype(DTYPE) for name, x in bank.parameters.items()}
    batched = [mx.repeat(nodes[name][None], keys.shape[0], axis=0) for name in ("keys", "values")]
    mask = mx.pad(nodes["bias"], [(0, 0), (0, keys.shape[2])])[None, :, None]
    return mx.concatenate([batched[0], keys], axis=2), mx.concatenate([batched[1], values], axis=2), mask


KEEPERS: dict[str, type[CacheVariant]] = {
    "full": Full,
    "4-bit cache": Quantised4,
    "stock": Composed,
    "fused": Fused,
    "fused int8": Fused8,
}


def timed(work: Callable[[], mx.array | list[mx.array]], *, repeats: int = 20, warm: int = 3) -> float:
    """Median seconds of building and evaluating what `work` returns."""
    for _ in range(warm):
        mx.eval(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def queued(step: Callable[[mx.array], mx.array], given: mx.array, *, repeats: int = 20, warm: int = 3) -> float:
    """Median seconds a step when the next one is queued before this one is waited for, as mlx-lm's loop does.

    A step takes what the one before it returns, the first one `given`.
    """
    now = step(given)
    mx.async_eval(now)
    seconds = []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        following = step(now)
        mx.async_eval(following)
        mx.eval(now)
        now = following
        seconds.append(time.perf_counter() - start)
    mx.eval(now)
    return statistics.median(seconds[warm:])


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    on_cpu = mx.default_device() == mx.cpu
    x = mx.random.normal((1 << (22 if on_cpu else 27),))
    mx.eval(x)
    return 2 * x.nbytes / timed(lambda: x + 1.0, repeats=5)


def memory() -> int:
    """Bytes that the device has, or a large number where it does not say."""
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or 1 << 50)


def routed(shape: Shape) -> nn.Module:
    """The shape's model, its attention routed to caches that have their own."""
    model = shape.model()
    attention_patch.route(model)
    return model


def nbytes_of(model: nn.Module) -> int:
    """Of its weights."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return sum(x.nbytes for _, x in weights)
