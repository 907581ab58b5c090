"""No NaN and no infinity goes further than the stage that made it."""

from collections.abc import Collection, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import NectarError
from ..heads import Bank
from ..mlxlm.attention_patch import Geometry


def check_weights(model: nn.Module) -> None:
    """NectarError that names the first weight of the model that is not finite."""
    weights: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    for name, weight in weights:
        if mx.issubdtype(weight.dtype, mx.floating) and not mx.isfinite(weight).all().item():
            raise NectarError(
                f"the model's weight {name} holds a NaN or an infinity: the file is damaged or was converted wrongly; "
                "fetch or convert the model again"
            )


def check_logits(logits: mx.array) -> None:
    """NectarError unless what the model itself predicts is finite."""
    if not mx.isfinite(logits).all().item():
        raise NectarError(
            "the model's own logits are not finite, so nothing is written. Its numbers may exceed its type: use its "
            "bfloat16 or float32 weights"
        )


def check_heads(stage: str, heads: Collection[int], geometry: Geometry) -> None:
    """NectarError that names the stage, layer and KV head of the first of some heads with a number that is not finite.

    Heads are numbered layer by layer, the sliding-window layers left out.
    """
    if heads:
        layer, k = divmod(min(heads), geometry.n_kv_heads)
        raise NectarError(
            f"{stage}: layer {geometry.fitted[layer]}, KV head {k} is not finite, so nothing is written. The model's "
            "numbers may exceed its type: use its bfloat16 or float32 weights"
        )


def check_banks(stage: str, banks: Sequence[Bank], geometry: Geometry) -> None:
    """The same for the heads of all layers, one bank a layer."""
    heads = [
        layer * geometry.n_kv_heads + m
        for layer, bank in enumerate(banks)
        for m in not_finite(x for x in bank.parameters.values() if x.size)
    ]
    check_heads(stage, heads, geometry)


def not_finite(arrays: Iterable[mx.array]) -> list[int]:
    """Which of M heads hold a NaN or an infinity in one of some arrays [M, ...]."""
    return [m for m, fine in enumerate(np.array(finite(arrays))) if not fine]


def finite(arrays: Iterable[mx.array]) -> mx.array:
    """Whether all that M heads hold in arrays [M, ...] is finite, [M]."""
    return mx.stack([mx.isfinite(x.reshape(x.shape[0], -1)).all(1) for x in arrays]).all(0)
