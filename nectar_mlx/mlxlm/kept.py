"""What a model's layers keep of a text beside heads: last windows and recurrent states; and the caches of all layers.

Each of these makes a layer's cache for one conversation, as if the layer had read the text itself. mlx-lm's models
replace the arrays of a state and never write into them, so conversations share them until then.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from ..core.types import LayerCache
from ..errors import NectarError
from ..heads import Bank, Exact
from ..kernels import DecodeKernel
from .cache import NectarCache
from .geometry import FULL, LATENT, SHARED, STATE, Geometry, Layer
from .shared import PassedOn, SharedCache


class Kept:
    """What one layer keeps. nbytes: as it is stored. beside: whether heads stand for the layer's keys all the same."""

    beside = False

    @property
    def nbytes(self) -> int:
        return 0

    def make_cache(self, context: int) -> Any:
        """The layer's cache for one conversation."""
        raise NotImplementedError

    def tensors(self) -> dict[str, mx.array]:
        """What is stored."""
        return {}

    def astype(self, types: Sequence[mx.Dtype]) -> "Kept":
        """In the types that the model computes in: of keys and values, and of each array of a state."""
        return self


class WindowCache(RotatingKVCache):
    """A sliding-window layer's own cache, filled as if it had read the context: exact, and shared until written."""

    keys: Any
    values: Any

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.keys.shape[0] < keys.shape[0]:
            self.keys = mx.repeat(self.keys, keys.shape[0], axis=0)
            self.values = mx.repeat(self.values, keys.shape[0], axis=0)
        return super().update_and_fetch(keys, values)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def to_quantized(self) -> Any:
        """Absent: a ring cannot be quantized, and mlx-lm's --kv-bits leaves what lacks the method alone."""
        raise AttributeError("to_quantized")

    def filter(self, rows: mx.array) -> None:
        """Keeps some sequences of a batch that advances in step."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass(frozen=True)
class Window(Kept):
    """The context's last keys and values in a sliding-window layer: [K, w, D] and [K, w, value_dim], w <= `size`, the
    layer's window."""

    keys: mx.array
    values: mx.array
    size: int

    def make_cache(self, context: int) -> WindowCache:
        cache = WindowCache(max_size=self.size)  # type: ignore[no-untyped-call]
        cache.state = (self.keys[None], self.values[None], context, 0, self.size, self.keys.shape[1])
        return cache

    def tensors(self) -> dict[str, mx.array]:
        return {"keys": self.keys, "values": self.values}

    def astype(self, types: Sequence[mx.Dtype]) -> "Window":
        return Window(self.keys.astype(types[0]), self.values.astype(types[0]), self.size)

    @property
    def nbytes(self) -> int:
        """In 16 bits."""
        return 2 * (self.keys.size + self.values.size)


@dataclass(frozen=True, kw_only=True)
class State(Kept):
    """A recurrent state behind the context: arrays [1, ...] as the model's cache has them; `stored` is what the file
    holds of them (`store.states`), empty before it is coded. window: of a layer that has one, too."""

    arrays: tuple[mx.array, ...]
    stored: dict[str, mx.array] = field(default_factory=dict)
    beside: bool = False
    window: Window | None = None

    def make_cache(self, context: int) -> Any:
        cache: Any = ArraysCache(len(self.arrays))
        cache.cache = list(self.arrays)
        return cache if self.window is None else CacheList(cache, self.window.make_cache(context))

    def tensors(self) -> dict[str, mx.array]:
        plain = {f"state.{i}": array[0] for i, array in enumerate(self.arrays)}
        return (self.stored or plain) | (self.window.tensors() if self.window else {})

    def astype(self, types: Sequence[mx.Dtype]) -> "State":
        arrays = tuple(array.astype(dtype) for array, dtype in zip(self.arrays, types[1:], strict=True))
        window = self.window and self.window.astype(types)
        return State(arrays=arrays, stored=self.stored, beside=self.beside, window=window)

    @property
    def nbytes(self) -> int:
        own = self.stored.values() if self.stored else self.arrays
        return sum(x.nbytes for x in own) + (self.window.nbytes if self.window else 0)


@dataclass(frozen=True)
class Shared(Kept):
    """A layer that reads the keys and values of layer `source`, and keeps none."""

    source: int

    def make_cache(self, context: int) -> Any:
        return PassedOn()


def plain_windows(geometry: Geometry, kept: Mapping[int, Kept], purpose: str) -> dict[int, Window]:
    """What is kept, where it is sliding windows alone. NectarError that names the purpose for a model with recurrent
    states, shared keys or latent attention."""
    windows = {layer: k for layer, k in kept.items() if isinstance(k, Window)}
    if len(windows) < len(kept) or any(layer.kind == LATENT for layer in geometry.layers):
        raise NectarError(
            f"files of {geometry.model_type} models cannot be {purpose}: their layers keep more than keys"
        )
    return windows


def shared_layers(geometry: Geometry) -> dict[int, Kept]:
    """What the layers that share others' keys keep, by layer."""
    return {i: Shared(layer.source) for i, layer in enumerate(geometry.layers) if layer.kind == SHARED}


def what_is_kept(cache: Any, layer: Layer, *, offset: mx.array | None = None) -> tuple[Exact | None, Kept | None]:
    """What a cache holds that has read a whole text: exact keys and values of a layer with full attention, and what
    else a layer keeps. The cache is emptied.

    offset: [K, D], relative to which keys are kept; their mean where there is none.
    """
    arrays, attention = None, cache
    if layer.states:
        arrays, attention = (cache, None) if layer.kind == STATE else (cache[0], cache[1])
        if any(array is None for array in arrays.cache):
            raise NectarError("a recurrent state is empty behind the text: this mlx-lm is not supported")
        mx.eval(arrays.cache)
    bank, window = None, None
    if layer.kind in (FULL, LATENT):
        bank = _exact(attention, layer, offset)
    elif layer.window:
        window = _window(attention)
    if arrays is None:
        return bank, window
    return bank, State(arrays=tuple(arrays.cache), beside=bank is not None, window=window)


def _window(ring: Any) -> Window:
    # Read some tokens at a time, a ring outgrows its window.
    keys, values = (mx.contiguous(ring._temporal_order(x)[0, :, -ring.max_size :]) for x in ring.state[:2])
    ring.keys = ring.values = None
    mx.eval(keys, values)
    return Window(keys, values, ring.max_size)


def _exact(cache: Any, layer: Layer, offset: mx.array | None) -> Exact:
    # Squeezed, for under CUDA a plain index is a gather of its own, built for seconds.
    keys, values = (mx.contiguous(x[:1].squeeze(0)) for x in cache.keys_and_values())
    cache.keys = cache.values = None
    if layer.kind == LATENT:  # kept as a latent vector, which is the value, and the part of the key with the position
        keys, values = mx.concatenate([keys, values], axis=-1), keys
    mx.eval(keys, values)
    if missing := layer.head_dim - values.shape[-1]:
        values = mx.pad(values, [(0, 0), (0, 0), (0, missing)])
    if offset is None:
        offset = keys.astype(mx.float32).mean(1).astype(mx.bfloat16)  # as a file keeps it
    # 16 bits hold the difference of two such numbers of about one size exactly.
    keys = (keys.astype(mx.float32) - offset.astype(mx.float32)[:, None]).astype(keys.dtype)
    mx.eval(keys, values, offset)
    sizes = ((keys.shape[1],),) * keys.shape[0]
    return Exact(parameters={"keys": keys, "values": values}, sizes=sizes, scale=layer.scale, offset=offset)


def make_caches(
    banks: Sequence[Bank],
    windows: Mapping[int, Kept],
    context: int,
    *,
    kv_bits: int | None = None,
    kernels: Sequence[DecodeKernel] | None = None,
    make: Callable[..., NectarCache] = NectarCache,
    ahead: Sequence[int] = (),
) -> list[Any]:
    """Fresh caches, one a layer, that start behind a context of so many tokens.

    windows: what the layers without heads keep, by layer, and the states of those that have both. banks: the heads of
    the others, in order. kv_bits: 4 or 8 quantizes the keys and values of live tokens in the layers that have a bank.
    kernels: the banks' decode kernels. make: makes a layer's cache from the arguments of `NectarCache`. ahead: of each
    sequence, how many positions further on it begins in the layers that have a bank.
    """
    starts: Any = context + mx.array(list(ahead), mx.int32) if any(ahead) else context
    of_banks: Sequence[DecodeKernel | None] = kernels or [None] * len(banks)
    remaining = zip(banks, of_banks, strict=True)
    sources = {kept.source for kept in windows.values() if isinstance(kept, Shared)}
    caches: list[Any] = []
    for layer in range(len(banks) + sum(not kept.beside for kept in windows.values())):
        kept = windows.get(layer)
        if isinstance(kept, Shared) and isinstance(owner := caches[kept.source], NectarCache):
            caches.append(SharedCache(owner))
        elif kept is not None and not kept.beside:
            caches.append(kept.make_cache(context))
        else:
            bank, kernel = next(remaining)
            live: Any = None
            if kv_bits is not None:
                live = QuantizedKVCache(_quantization_group(bank), kv_bits)
            elif layer in sources:  # whoever shares its keys gets those that are written, not whole buffers
                live = KVCache()
            cache = make(bank, starts, live, kernel)
            caches.append(cache if kept is None else CacheList(kept.make_cache(context), cache))
    return caches


def attention_caches(caches: Sequence[Any]) -> Iterator[tuple[int, NectarCache]]:
    """The layers that have heads, and their caches."""
    for layer, cache in enumerate(caches):
        inner = cache[1] if isinstance(cache, CacheList) else cache
        if isinstance(inner, NectarCache):
            yield layer, inner


def widened(caches: Sequence[LayerCache], sequences: int) -> Sequence[LayerCache]:
    """The same fresh caches, for so many sequences that advance in step: states are repeated. Keys and values are when
    they are first written."""
    for cache in caches:
        state: Any = cache[0] if isinstance(cache, CacheList) else cache
        if isinstance(state, ArraysCache):
            arrays: Any = state.cache
            repeated: Any = [mx.repeat(x, sequences, axis=0) if x.shape[0] == 1 else x for x in arrays]
            state.cache = repeated
    return caches


def _quantization_group(bank: Bank) -> int:
    for group in (64, 32):
        if bank.head_dim % group == 0:
            return group
    raise NectarError(f"heads of {bank.head_dim} numbers cannot be quantized: leave out kv_bits")
