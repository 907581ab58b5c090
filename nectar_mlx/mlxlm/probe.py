"""What a model's layers are, and the proof that its attention goes through our caches.

Both are found by running the model on a few tokens, not by its name: one token through caches that record what reaches
them; then some tokens behind others, once with mlx-lm's own caches and once with exact heads in ours.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from ..errors import NectarError
from ..heads import Exact
from . import hook
from .geometry import FULL, LATENT, SHARED, STATE, WINDOW, Geometry, Layer
from .kept import make_caches, shared_layers, what_is_kept
from .shared import PassedOn

_CONTEXT, _LIVE = 16, (4, 1)  # tokens of the proof: read, and behind them in a prompt's way and in an answer's
_CLOSE, _ROUNDING = 0.1, 0.02  # of what the context changes; of the size of logits

MakeStock = Callable[[], list[Any]]


class Described(NamedTuple):
    """types: by layer, of its keys and values and of each array of its state."""

    geometry: Geometry
    types: list[list[mx.Dtype]]


class _Probe(KVCache):
    """Records what reaches the attention call. shapes: heads, KV heads, width of keys and of values, scale."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: tuple[int, int, int, int, float] | None = None
        self.fetched: Any = None
        self.masked_window: int | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.fetched = super().update_and_fetch(keys, values)  # type: ignore[no-untyped-call]
        return self.fetched

    def make_mask(self, *args: Any, **options: Any) -> Any:
        self.masked_window = options.get("window_size")
        return super().make_mask(*args, **options)  # type: ignore[no-untyped-call]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **others: Any) -> mx.array:
        widths = queries.shape[3], values.shape[3]
        self.shapes = (queries.shape[1], keys.shape[1], *widths, float(scale))
        return hook.stock_attention(queries, keys, values, cache=None, scale=scale, **others)


class _SharedProbe(PassedOn):
    """Of a layer that may be given another one's keys."""

    def __init__(self) -> None:
        self.fetched: Any = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.fetched = keys
        return keys, values


def describe(model: nn.Module, name: str, make_stock: MakeStock) -> Described:
    """Runs one token through the model: what each layer keeps. NectarError where that cannot be told."""
    stock = make_stock()
    probes = [_probe_for(cache, name, number) for number, cache in enumerate(stock)]
    extra = [_SharedProbe() for _ in range(len(getattr(model, "layers", stock)) - len(stock))]
    mx.eval(model(mx.zeros((1, 1), dtype=mx.int32), cache=[*probes, *extra]))
    found = [
        _layer(cache, probe, number, name) for number, (cache, probe) in enumerate(zip(stock, probes, strict=True))
    ]
    layers, types = [layer for layer, _ in found], [kinds for _, kinds in found]
    given = {id(p.fetched[0]): number for number, p in enumerate(map(_attention, probes)) if p and p.fetched}
    for probe in extra:
        if probe.fetched is not None:  # others are layers that keep nothing, and have no cache
            layers.append(Layer(kind=SHARED, source=given[id(probe.fetched)]))
            types.append([])
    shapes = {layer.heads for layer in layers if layer.fitted}
    if not shapes:
        raise NectarError(
            f"{name} models are not supported: none of their layers attends to the whole text, so there is nothing to "
            "fit; mlx-lm's own prompt cache is as small"
        )
    if len(shapes) > 1:
        raise NectarError(f"{name} models are not supported: their layers with full attention differ: {sorted(shapes)}")
    return Described(Geometry(model_type=name, layers=tuple(layers)), types)


def _probe_for(cache: Any, name: str, number: int) -> Any:
    kind = type(cache)
    if kind in (KVCache, RotatingKVCache) and not getattr(cache, "keep", 0):
        return _Probe()
    if kind is ArraysCache:
        return cache
    if kind is CacheList and [type(part) for part in cache.caches[:-1]] == [ArraysCache] and len(cache.caches) == 2:
        return CacheList(cache[0], _probe_for(cache[1], name, number))
    parts = f" of {', '.join(type(part).__name__ for part in cache.caches)}" if kind is CacheList else ""
    raise NectarError(
        f"{name} models are not supported: layer {number} keeps its keys in a {kind.__name__}{parts}, "
        "which heads cannot stand for"
    )


def _attention(probe: Any) -> _Probe | None:
    inner = probe[1] if isinstance(probe, CacheList) else probe
    return inner if isinstance(inner, _Probe) else None


def _layer(cache: Any, probe: Any, number: int, name: str) -> tuple[Layer, list[mx.Dtype]]:
    """What one layer keeps, and the types of it."""
    inner = _attention(probe)
    arrays: list[Any] = probe.cache if inner is None else probe[0].cache if isinstance(probe, CacheList) else []
    if any(array is None for array in arrays):
        raise NectarError(f"{name} models are not supported: layer {number} leaves a part of its state empty")
    states, types = tuple(tuple(array.shape[1:]) for array in arrays), [array.dtype for array in arrays]
    if inner is None:
        return Layer(kind=STATE, states=states), [mx.float32, *types]
    if inner.shapes is None:
        reason = hook.REASONS.get(name, "mlx-lm computes it in code of its own, past the shared attention call")
        raise NectarError(
            f"{name} models are not supported: the attention of layer {number} cannot be routed: {reason}"
        )
    stock = cache[1] if isinstance(cache, CacheList) else cache
    window = stock.max_size if isinstance(stock, RotatingKVCache) else 0
    if inner.masked_window and not window:
        raise NectarError(
            f"{name} models are not supported: layer {number} has a sliding window of {inner.masked_window}, but keeps "
            "all keys of the text"
        )
    n_heads, n_kv_heads, head_dim, value_dim, scale = inner.shapes
    keys, values = inner.fetched
    if keys.shape[1] != n_kv_heads:
        raise NectarError(
            f"{name} models are not supported: layer {number} keeps {keys.shape[1]} heads of keys, but attends to "
            f"{n_kv_heads}"
        )
    kind = WINDOW if window else LATENT if keys.shape[-1] != head_dim else FULL
    if value_dim > head_dim or (kind == LATENT and keys.shape[-1] + values.shape[-1] != head_dim):
        raise NectarError(f"{name} models are not supported: values of layer {number} are wider than its keys")
    layer = Layer(
        kind=kind,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=scale,
        window=window,
        states=states,
    )
    return layer, [keys.dtype, *types]


def prove(model: nn.Module, described: Described, make_stock: MakeStock) -> None:
    """NectarError unless the model behind exact heads in our caches is the model behind the text itself.

    Where it seems not to be, in a type of half precision, it is looked at once more in float32: scores of thousands are
    rounded by mlx-lm's attention, not by ours.
    """
    off = _off(model, described.geometry, make_stock)
    parameters = model.parameters()
    weights: list[tuple[str, mx.array]] = tree_flatten(parameters)  # type: ignore[assignment]
    if off is not None and any(x.dtype in (mx.float16, mx.bfloat16) for _, x in weights):
        try:
            model.set_dtype(mx.float32)
            off = _off(model, described.geometry, make_stock)
        finally:
            model.update(parameters)
    if off is not None:
        raise NectarError(
            f"{described.geometry.model_type} models are not supported: with exact heads the model's output is not its "
            f"own (off by {off:.0%}), so something in it does not go through the attention call"
        )


def _off(model: nn.Module, geometry: Geometry, make_stock: MakeStock) -> float | None:
    """By how much the output is off, relative to its size; None where it is right, or its own is not finite, which is
    no matter of ours."""
    stock = make_stock()
    ids = mx.array([[(7919 * i + 31) % 96 for i in range(_CONTEXT + sum(_LIVE))]])
    mx.eval(model(ids[:, :_CONTEXT], cache=stock))
    found = _continued(model, ids, _exact_caches(copy.deepcopy(stock), geometry))
    expected = _continued(model, ids, stock)
    if not np.isfinite(expected).all():
        return None
    error = np.linalg.norm(found - expected, axis=-1)
    size = np.linalg.norm(expected - expected.mean(-1, keepdims=True), axis=-1)
    # Rounding may send a token to other experts: the median of the tokens tells.
    if np.isfinite(found).all() and np.median(error - _ROUNDING * size) <= 0:
        return None
    context = np.linalg.norm(_continued(model, ids, make_stock()) - expected, axis=-1)
    if np.isfinite(found).all() and np.median(error - _CLOSE * context) <= 0:
        return None
    return float(np.median(error / size))


def _exact_caches(stock: Sequence[Any], geometry: Geometry) -> list[Any]:
    """Ours, with exact heads, behind what mlx-lm's own caches hold. These are emptied."""
    banks, kept = list[Exact](), shared_layers(geometry)
    for number, (layer, cache) in enumerate(zip(geometry.layers, stock, strict=False)):
        bank, beside = what_is_kept(cache, layer)
        banks += [bank] if bank else []
        kept |= {number: beside} if beside else {}
    return make_caches(banks, kept, _CONTEXT)


def _continued(model: nn.Module, ids: mx.array, caches: Sequence[Any]) -> np.ndarray:
    """The logits of the last tokens, [T, V] float32, given in pieces."""
    logits, start = [], _CONTEXT
    for length in _LIVE:
        logits.append(model(ids[:, start : start + length], cache=caches).squeeze(0).astype(mx.float32))
        mx.eval(logits[-1])
        start += length
    return np.array(mx.concatenate(logits))
