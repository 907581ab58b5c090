"""Models too large for one machine: mlx-lm's tensor sharding, every rank with some heads of each layer.

mlx-lm divides attention heads and networks among the ranks of a group and adds up what they give, so that all ranks see
the same hidden states. For us a rank's model is one with fewer heads.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..errors import NectarError


@dataclass(frozen=True)
class Shard:
    """Which part of a model this is. fingerprint: of the whole one."""

    rank: int
    size: int
    fingerprint: str


def divide(model: nn.Module, group: mx.distributed.Group, *, fingerprint: str, name: str) -> None:
    """Leaves this rank's part of a model whose weights need not be there yet. NectarError where mlx-lm cannot."""
    if not hasattr(model, "shard"):
        raise NectarError(f"{name}: mlx-lm cannot divide {model.model_type} models among several machines")
    arguments = getattr(model, "args", None)
    heads = getattr(arguments, "num_attention_heads", 0), getattr(arguments, "num_key_value_heads", None) or 0
    if any(count % group.size() for count in heads):
        raise NectarError(f"{name}: its {heads[0]} heads, {heads[1]} of keys, cannot be divided by {group.size()}")
    model.shard(group)
    vars(model)["_nectar_shard"] = Shard(group.rank(), group.size(), fingerprint)


def shard_of(model: nn.Module) -> Shard | None:
    """Which part of a model this is; None for a whole one."""
    return vars(model).get("_nectar_shard")
