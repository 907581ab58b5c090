"""Fitting corrected quadratures: nodes from Attention Matching, and a gated layer that corrects nothing yet."""

from collections.abc import Sequence

import mlx.core as mx

from ...heads import Corrected, HeadArrays, Size
from ..samples.sample_store import Samples
from ..solve.initial import Init, Standardization, ToBank
from .base import KindFit

_MATRICES = frozenset({"w_gate", "w_up", "w_out"})


class CorrectedFit(KindFit):
    """Of `heads.Corrected`."""

    def prepare(self) -> None:
        _ = self.importance

    def initialize(self, heads: Sequence[int], sizes: Sequence[Size], samples: Samples) -> Init:
        nodes = self.match(heads, [size[0] for size in sizes])
        return corrected_nodes(nodes, sizes, samples, scale=self.run.geometry.scale, seed=self.run.config.seed)


def corrected_nodes(
    nodes: Sequence[HeadArrays], sizes: Sequence[Size], samples: Samples, *, scale: float, seed: int
) -> Init:
    """Nodes with corrections to train on samples, by which inputs and outputs are standardised."""
    keys, D = mx.random.split(mx.random.key(seed), len(sizes)), samples.queries.shape[-1]
    heads = [node | _correction(size, D, key) for node, size, key in zip(nodes, sizes, keys, strict=True)]
    bank = Corrected.stack(heads, scale=scale)
    to_bank = _to_bank(Standardization.of(samples))
    return Init(bank=bank, parameters=dict(bank.parameters), to_bank=to_bank, muon=_MATRICES)


def _correction(size: Size, D: int, key: mx.array) -> HeadArrays:
    """A gated layer that corrects nothing yet: its way out is zero."""
    _, units = size
    gate_key, up_key = mx.random.split(key)
    gate = mx.random.normal((units, D), key=gate_key) * D**-0.5
    up = mx.random.normal((units, D), key=up_key) * D**-0.5
    hidden = {"w_gate": gate, "b_gate": mx.zeros(units), "w_up": up, "b_up": mx.zeros(units)}
    out = {"w_out": mx.zeros((units, D)), "w_score": mx.zeros(units), "b_out": mx.zeros(D), "b_score": mx.zeros(1)}
    return hidden | out


def _to_bank(units: Standardization) -> ToBank:
    def to_bank(p: HeadArrays) -> HeadArrays:
        return p | {
            "w_gate": units.into(p["w_gate"]),
            "b_gate": p["b_gate"] - units.shift(p["w_gate"]),
            "w_up": units.into(p["w_up"]),
            "b_up": p["b_up"] - units.shift(p["w_up"]),
            "w_out": p["w_out"] * units.output_std[..., None],
            "b_out": p["b_out"] * units.output_std,
            "w_score": p["w_score"] * units.log_std,
            "b_score": p["b_score"] * units.log_std,
        }

    return to_bank
