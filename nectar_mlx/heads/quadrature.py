"""Quadrature: m weighted nodes (k_j, v_j, b_j), free to move (Nectar, arXiv 2605.09778, the quadrature variant).

o(q) = Σ softmax(scale · q·k_j + b_j) v_j,    L(q) = log Σ exp(scale · q·k_j + b_j)
"""

from typing import ClassVar

import mlx.core as mx

from ..core.attention import EMPTY, Partial, weighted
from .base import Bank, HeadArrays, Size
from .work import DecodeWork, WorkItem, WorkKind

NODES = WorkItem(WorkKind.NODES, matrices=("keys", "values"), scalars=("bias",))


class Quadrature(Bank):
    """keys, values [m, D] and bias [m] a head; size = (m,). Padding nodes have weight zero."""

    kind = "quadrature"
    default_bits = None
    learning_rate = 3e-2
    joinable = True
    padding: ClassVar = {"bias": EMPTY}

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        p = parameters
        return weighted(queries, p["keys"], p["values"], bias=p["bias"], scale=self.scale)

    def decode_work(self) -> DecodeWork:
        return DecodeWork((NODES,))

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        (nodes,) = size
        return {"keys": (nodes, head_dim), "values": (nodes, head_dim), "bias": (nodes,)}

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["bias"].shape[0],)

    @classmethod
    def size_with(cls, *, nodes: int, units: int, layers: int) -> Size:
        return (nodes,)

    @property
    def head_dim(self) -> int:
        return self.parameters["keys"].shape[-1]
