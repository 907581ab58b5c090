"""The hook in mlx-lm's attention.

mlx-lm's model files bind `scaled_dot_product_attention` by value, so the name is rebound in every module that holds
it. A cache with an `attend` method then computes its own attention; any other takes mlx-lm's path unchanged. Two kinds
of modules call no shared attention that a hook could see, and are called through functions of ours where the cache is
ours: latent attention (`latent`), and modules that call MLX's attention by its name (`direct`).
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base
from mlx_lm.utils import MODEL_REMAPPING

from . import activation, direct, latent

REASONS = {
    "gemma2": "it caps its attention scores in code of its own",
}
"""Why the attention of some models cannot be routed, by their type."""

stock_attention: Callable[..., mx.array] = base.scaled_dot_product_attention


def may_route(model_type: str) -> bool:
    """Whether mlx-lm reads models of this type and nothing speaks against them; the proof at load decides."""
    name = MODEL_REMAPPING.get(model_type, model_type)
    return model_type.isidentifier() and model_type not in REASONS and find_spec(f"mlx_lm.models.{name}") is not None


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


def rebind(model: nn.Module) -> None:
    """Routes the attention and the activations of every model that is loaded, and the latent attention of this one."""
    for name, module in list(sys.modules.items()):
        if module is base or not name.startswith("mlx_lm.models."):
            continue
        if getattr(module, "scaled_dot_product_attention", None) is stock_attention:
            setattr(module, "scaled_dot_product_attention", attention)  # noqa: B010
        if getattr(module, "swiglu", None) is activation.stock_swiglu and module is not activations:
            setattr(module, "swiglu", activation.swiglu)  # noqa: B010
    for kind in {type(module) for module in model.modules()}:
        if direct.is_direct(kind):
            direct.reroute(kind, attention)
        if latent.is_latent(kind) and not hasattr(kind.__call__, "stock"):
            kind.__call__ = latent.routed(kind.__call__)
