"""Moving keys to other positions: a rotary embedding by p and then by d is one by p + d (RoPE, arXiv 2104.09864)."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import NectarError

Rotary = Callable[..., mx.array]


def shifted(model: nn.Module, layer: int, keys: mx.array, by: int) -> mx.array:
    """A layer's keys [K, n, D], positions applied, as they would be `by` positions further on -> float32 [K, n, D].

    NectarError for a layer without one rotary embedding.
    """
    rotary, (K, n, D) = _rotary(model, layer), keys.shape
    # Some embeddings scale what they rotate (YaRN); the keys have been scaled already.
    gain = rotary(mx.ones((1, 1, 1, D)), offset=0)
    one_each = (keys.astype(mx.float32)[:, :, None] / gain[0]).reshape(K * n, 1, 1, D)
    return rotary(one_each, offset=by).reshape(K, n, D)


def _rotary(model: Any, layer: int) -> Rotary:
    found: list[Rotary] = [m.rope for m in model.layers[layer].modules() if callable(getattr(m, "rope", None))]
    if len(found) != 1:
        raise NectarError(f"layer {layer} of this model has {len(found)} rotary embeddings: its keys cannot be moved")
    return found[0]
