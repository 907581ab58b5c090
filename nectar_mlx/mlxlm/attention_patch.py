"""Routes the attention of a loaded mlx-lm model through our caches, and lists the models for which this works.

mlx-lm's model files bind `scaled_dot_product_attention` by value, so the name is rebound in every module that holds
it. A cache with an `attend` method then computes its own attention; any other takes mlx-lm's path unchanged.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..core.types import JsonObject, LayerCache
from ..errors import NectarError

SUPPORTED = (
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
_LATENT = "its latent attention passes part of the scores as a mask"
_RECURRENT = "its recurrent layers keep a state that is not attention"
_SHARED = "its layers share keys and values without a cache of their own"
_REASONS = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "falcon_h1": _RECURRENT,
    "gemma2": "it caps its attention scores in its own code, which cannot be routed",
    "gemma3n": _SHARED,
    "gemma4_text": _SHARED,
    "glm4_moe_lite": _LATENT,
    "jamba": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "lfm2": _RECURRENT,
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "minicpm3": _LATENT,
    "nemotron_h": _RECURRENT,
    "plamo2": _RECURRENT,
    "qwen3_5": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "rwkv7": "it has no attention",
}

stock_attention: Callable[..., mx.array] = base.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    attend = getattr(cache, "attend", None)
    if attend is None:
        return stock_attention(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    extra = {} if sinks is None else {"sinks": sinks}
    return attend(queries, keys, values, scale=scale, mask=mask, **extra)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of a model's attention. `windows[i]` is layer i's sliding window, 0 for full attention."""

    model_type: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    windows: tuple[int, ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From `to_dict`, also after JSON."""
        names = ("model_type", "n_heads", "n_kv_heads", "head_dim", "scale")
        return cls(**{name: fields[name] for name in names}, windows=tuple(fields["windows"]))

    def to_dict(self) -> JsonObject:
        fields = asdict(self)
        return {"model_type": fields.pop("model_type"), "n_layers": self.n_layers} | fields

    @property
    def n_layers(self) -> int:
        return len(self.windows)

    @property
    def fitted(self) -> tuple[int, ...]:
        """The layers with full attention, which get heads; the others keep their exact last window."""
        return tuple(layer for layer, window in enumerate(self.windows) if not window)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the bf16 KV cache of this many tokens."""
        per_token = 2 * 2 * self.n_kv_heads * self.head_dim
        return sum(per_token * (min(tokens, w) if w else tokens) for w in self.windows)


class _Probe(KVCache):
    """Records the shapes at the attention call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: tuple[int, int, int, float] | None = None

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **others: Any) -> mx.array:
        self.shapes = (queries.shape[1], keys.shape[1], queries.shape[3], float(scale))
        return stock_attention(queries, keys, values, cache=None, scale=scale, **others)


def route(model: nn.Module) -> Geometry:
    """Routes the model's attention through our caches and returns its geometry.

    Raises NectarError with the name of an architecture that is not supported: it would ignore the context silently.
    """
    name = str(getattr(model, "model_type", type(model).__module__))
    if name not in SUPPORTED:
        reason = _REASONS.get(name, "it has not been tested")
        raise NectarError(f"{name} models are not supported: {reason} (supported: {', '.join(SUPPORTED)})")
    for module_name, module in list(sys.modules.items()):
        if module is base or not module_name.startswith("mlx_lm.models."):
            continue
        if getattr(module, "scaled_dot_product_attention", None) is stock_attention:
            setattr(module, "scaled_dot_product_attention", attention)  # noqa: B010
    return _probe(model, name)


def _probe(model: nn.Module, name: str) -> Geometry:
    """Runs one token through the model: every layer must reach the attention call."""
    stock = make_prompt_cache_of(model)
    windows = tuple(c.max_size if isinstance(c, RotatingKVCache) else 0 for c in stock)
    probes = [_Probe() for _ in stock]
    mx.eval(model(mx.zeros((1, 1), dtype=mx.int32), cache=probes))
    missing = [i for i, p in enumerate(probes) if p.shapes is None]
    if missing:
        raise NectarError(f"{name}: the attention of layers {missing} cannot be routed; this mlx-lm is not supported")
    shapes = {p.shapes for p in probes if p.shapes is not None}
    if len(shapes) > 1:
        raise NectarError(f"{name}: layers of different shapes are not supported: {sorted(shapes)}")
    n_heads, n_kv_heads, head_dim, scale = shapes.pop()
    return Geometry(
        model_type=name,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        scale=scale,
        windows=windows,
    )


def compute_type(model: nn.Module) -> mx.Dtype:
    """The type of the model's activations, hence of its keys and values."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return next(p.dtype for _, p in parameters if mx.issubdtype(p.dtype, mx.floating))


def make_prompt_cache_of(model: nn.Module) -> list[LayerCache]:
    """The model's own caches, even while a context is attached to it."""
    attached = vars(model).get("make_cache")
    if attached is None:
        return make_prompt_cache(model)
    del model.make_cache
    try:
        return make_prompt_cache(model)
    finally:
        model.make_cache = attached
