"""Several texts in one conversation: where each lies, and their heads as nodes at these places."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..heads import Bank, HeadArrays, Quadrature
from ..heads.nodes import plain_nodes
from .positions import shifted


class FittedText(Protocol):
    """What is known of a text that was fitted (`Nectar`): its token ids, the position of the token that follows, and
    its heads, a bank a layer."""

    @property
    def prefix(self) -> Sequence[int]: ...

    @property
    def start(self) -> int: ...

    @property
    def banks(self) -> Sequence[Bank]: ...


def common_tokens(prefixes: Sequence[Sequence[int]]) -> int:
    """How many tokens all prefixes begin with."""
    alike = 0
    for tokens in zip(*prefixes, strict=False):
        if len(set(tokens)) > 1:
            break
        alike += 1
    return alike


def end_to_end(lengths: Sequence[int]) -> list[int]:
    """By how many positions each of several texts moves on, so that it lies behind the one before it."""
    return [sum(lengths[:i]) for i in range(len(lengths))]


def nodes(model: nn.Module, layer: int, banks: Sequence[Bank], shifts: Sequence[int]) -> HeadArrays:
    """One layer's heads of several texts, each moved on by so many positions: keys (absolute) and values [K, m, D] and
    bias [K, m] of all, float32. NectarError for networks, and where the layer's keys cannot be moved."""
    parts = [plain_nodes(bank) for bank in banks]
    for part, by in zip(parts, shifts, strict=True):
        part["keys"] = shifted(model, layer, part["keys"], by) if by else part["keys"]
    return {name: mx.concatenate([part[name] for part in parts], axis=1) for name in ("keys", "values", "bias")}


def bank(nodes: HeadArrays, *, scale: float, offset: mx.array | None) -> Quadrature:
    """Nodes whose keys are absolute as one bank; offset: [K, D], relative to which it keeps them."""
    keys = nodes["keys"] if offset is None else nodes["keys"] - offset.astype(mx.float32)[:, None]
    K, m = nodes["bias"].shape
    return Quadrature(parameters=nodes | {"keys": keys}, sizes=((m,),) * K, scale=scale, offset=offset)
