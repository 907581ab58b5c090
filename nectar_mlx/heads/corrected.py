"""Corrected quadrature: nodes, and one gated hidden layer that adds a correction to both o and L.

h = silu(W_gate q + b_gate) ⊙ (W_up q + b_up),    o = o_nodes + W_outᵀ h + b_out,    L = L_nodes + w_score·h + b_score
"""

from typing import ClassVar

import mlx.core as mx

from ..core.attention import Partial, weighted
from .base import Bank, HeadArrays, Size
from .mlp import silu
from .quadrature import NODES, Quadrature
from .work import DecodeWork, WorkItem, WorkKind

_GATED = WorkItem(WorkKind.GATED, matrices=("w_gate", "w_up", "w_out"), scalars=("b_gate", "b_up", "w_score"))


class Corrected(Bank):
    """A head's nodes as in `Quadrature`, and h hidden units, the rows of w_gate, w_up, w_out [h, D]; size = (m, h)."""

    kind = "corrected"
    padding: ClassVar = Quadrature.padding

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        p = parameters
        nodes = weighted(queries, p["keys"], p["values"], bias=p["bias"], scale=self.scale)
        queries = queries.astype(mx.float32)
        gate = silu(queries @ p["w_gate"].swapaxes(1, 2) + p["b_gate"][:, None])
        hidden = gate * (queries @ p["w_up"].swapaxes(1, 2) + p["b_up"][:, None])
        output = nodes.output + hidden @ p["w_out"] + p["b_out"][:, None]
        return Partial(output, nodes.log_normalizer + (hidden @ p["w_score"][..., None])[..., 0] + p["b_score"])

    def decode_work(self) -> DecodeWork:
        return DecodeWork((NODES, _GATED), constants=("b_out", "b_score"))

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        nodes, units = size
        hidden = {"w_gate": (units, head_dim), "b_gate": (units,), "w_up": (units, head_dim), "b_up": (units,)}
        out = {"w_out": (units, head_dim), "w_score": (units,), "b_out": (head_dim,), "b_score": (1,)}
        return Quadrature.shapes((nodes,), head_dim) | hidden | out

    @classmethod
    def size_for(cls, units: int) -> Size:
        return (units, max(4, units // 6))

    @classmethod
    def size_with(cls, *, nodes: int, units: int, layers: int) -> Size:
        return (nodes, units)

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        return (head["bias"].shape[0], head["b_gate"].shape[0])

    @property
    def head_dim(self) -> int:
        return self.parameters["keys"].shape[-1]
