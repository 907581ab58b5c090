"""Nodes rounded as they will be stored, a part at a time, while what is not yet rounded is trained to make up for it.

Rounding all at once is what most of a file's error came from: keys of 5 bits double it. Here an eighth of the columns
of all keys (a node's other columns make up for them) and of the nodes' values (other nodes do) is rounded, the rest
trained for a while, then the next eighth: what queries and answers notice most comes first, as in incremental network
quantisation (arXiv 1702.03044).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..heads import Bank, HeadArrays
from ..quantize import grid, to_grid
from . import matching, regression
from .starts import Start
from .study import Captured

PARTS = 8
_SHARE = 0.4  # of a regression's steps that settling takes on top of them


def settled(bank: Bank, rows: Captured, *, bits: int, steps: int, batch: int, rate: float) -> Bank:
    """A bank of nodes with keys and values that `quantize` in so many bits gives back unchanged.

    rows: as for `regression.train`; steps, batch, rate: of the regression before.
    """
    plan, each = _Plan.of(bank, rows, bits=bits, batch=batch), max(1, round(_SHARE * steps / PARTS))
    for part in range(1, PARTS + 1):
        held = plan.held(bank.parameters, part)
        start = Start(bank=bank, parameters=dict(bank.parameters), fold=lambda parameters: parameters)
        bank = regression.train(start, rows, steps=each, batch=batch, rate=rate, first=(part - 1) * each, held=held)
    return bank


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """steps: the grids of keys and values [M, m, D]. turns: in which part each entry is rounded, 0 … PARTS - 1, keys
    [M, 1, D] and values [M, m, 1].
    """

    steps: HeadArrays
    turns: HeadArrays
    bits: int

    @classmethod
    def of(cls, bank: Bank, rows: Captured, *, bits: int, batch: int) -> "_Plan":
        p = bank.parameters
        some = Captured(*(x[:, :batch] for x in rows))
        power = mx.square(some.queries.astype(mx.float32)).mean(1)
        weight = matching.importance(some, p["keys"], scale=bank.scale, bias=p["bias"])
        return cls(
            steps={name: grid(p[name], bits=bits) for name in ("keys", "values")},
            turns={
                "keys": _turns(power, [bank.head_dim] * len(bank.sizes))[:, None],
                "values": _turns(weight, [count for (count,) in bank.sizes])[..., None],
            },
            bits=bits,
        )

    def held(self, parameters: HeadArrays, part: int) -> regression.Held:
        """What is rounded in the first `part` parts, at its nearest values."""
        nearest = {n: to_grid(parameters[n], steps, bits=self.bits) for n, steps in self.steps.items()}
        held = regression.Held(where={n: turn < part for n, turn in self.turns.items()}, values=nearest)
        mx.eval(held)
        return held


def _turns(notice: mx.array, counts: Sequence[int]) -> mx.array:
    """[M, n] -> which of PARTS equal parts each of a head's first entries belongs to, the largest first; counts: how
    many they are, the rest is padding.
    """
    rank = mx.argsort(mx.argsort(-notice, axis=1), axis=1)
    return mx.minimum(rank * PARTS // mx.array(list(counts))[:, None], PARTS - 1)
