"""Routes the attention of a loaded mlx-lm model through our caches, and says which models can be routed.

mlx-lm's model files bind `scaled_dot_product_attention` by value, so the name is rebound in every module that holds it. A cache
with an `attend` method then computes its own attention; every other cache takes mlx-lm's path unchanged.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from .errors import NectarError

SUPPORTED = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_REASONS = {
    "gemma2": "it caps its attention scores with its own code, which cannot be routed",
    "deepseek_v2": "its latent attention passes part of the scores as a mask",
    "deepseek_v3": "its latent attention passes part of the scores as a mask",
    "gemma4_text": "its layers share keys and values without a cache",
    "mamba": "it has no attention",
    "qwen3_next": "its recurrent layers keep a state that is not attention",
}

_stock_attention = base.scaled_dot_product_attention


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    if hasattr(cache, "attend"):
        if sinks is not None:
            raise NectarError("attention sinks are not supported")
        return cache.attend(queries, keys, values, scale=scale, mask=mask)  # type: ignore[no-any-return]
    return _stock_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a fitted file must know of a model. `windows[i]` is layer i's sliding window in tokens, 0 for full attention."""

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    windows: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the bf16 KV cache of this many tokens."""
        per_token = 2 * 2 * self.n_kv_heads * self.head_dim
        return sum(per_token * (min(tokens, w) if w else tokens) for w in self.windows)


class _Probe(KVCache):  # type: ignore[misc]
    """Records what reaches the attention call."""

    seen: tuple[int, int, int, float] | None = None

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
    ) -> mx.array:
        self.seen = (queries.shape[1], keys.shape[1], queries.shape[3], float(scale))
        return _stock_attention(queries, keys, values, cache=None, scale=scale, mask=mask)


def route(model: nn.Module) -> Geometry:
    """Routes the model's attention through our caches and returns its geometry.

    NectarError names an architecture that is not supported: its context would be silently ignored.
    """
    name = getattr(model, "model_type", type(model).__module__)
    if name not in SUPPORTED:
        reason = _REASONS.get(name, "it has not been tested")
        raise NectarError(f"{name} models are not supported: {reason} (supported: {', '.join(SUPPORTED)})")
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("mlx_lm.models.") and module is not base:
            if getattr(module, "scaled_dot_product_attention", None) is _stock_attention:
                module.scaled_dot_product_attention = _attention  # type: ignore[attr-defined]
    return _probe(model, name)


def _probe(model: nn.Module, name: str) -> Geometry:
    """One token through the model: every layer must show up at the attention call."""
    stock = make_prompt_cache_of(model)
    windows = tuple(c.max_size if isinstance(c, RotatingKVCache) else 0 for c in stock)
    probes = [_Probe() for _ in stock]
    mx.eval(model(mx.zeros((1, 1), dtype=mx.int32), cache=probes))
    missing = [i for i, p in enumerate(probes) if p.seen is None]
    if missing:
        raise NectarError(f"{name}: the attention of layers {missing} cannot be routed; this mlx-lm is not supported")
    shapes = {p.seen for p in probes if p.seen is not None}
    if len(shapes) > 1:
        raise NectarError(f"{name}: layers of different shapes are not supported: {sorted(shapes)}")
    n_heads, n_kv_heads, head_dim, scale = shapes.pop()
    return Geometry(
        model_type=name,
        n_layers=len(probes),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scale=scale,
        windows=windows,
    )


def make_prompt_cache_of(model: nn.Module) -> list[Any]:
    """The model's own caches, also while a context is attached to it."""
    make_cache = vars(model).get("make_cache")
    if make_cache is None:
        return make_prompt_cache(model)  # type: ignore[no-any-return]
    del model.make_cache
    try:
        return make_prompt_cache(model)  # type: ignore[no-any-return]
    finally:
        model.make_cache = make_cache
