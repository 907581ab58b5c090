"""Nodes on the grids that they will be stored on, a part at a time, while what is still free is trained to make up.

How finely a node must be kept follows from what its errors cost: those of a value count by the square of the node's
weight, those of a key also by how far the value lies from the answer. Each row of a head gets the step that makes all
rows cost the same (reverse water-filling), so that most nodes take three to five bits a number, some one and a few more
than eight; the head as a whole takes the bits it was given.

Rounding all at once would still cost much: an eighth of the columns of all keys (a node's other columns make up for
them) and of the nodes' values (other nodes do) is rounded, the rest trained for a while, then the next eighth: what
queries and answers notice most comes first, as in incremental network quantisation (arXiv 1702.03044).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .. import coding
from ..heads import Bank, HeadArrays
from ..store import MEAN_BITS
from ..store.rows import column_sizes, spreads
from . import matching, regression
from .starts import Start
from .study import Captured

PARTS = 8
_SHARE = 0.4  # of a regression's steps that settling takes on top of them
_JUDGES = 1 << 16  # rows by which costs are judged, at most
_FLOOR = 1e-2  # of the mean cost: a node that these rows hardly notice is what another question asks for
_LARGEST = 1024  # number in a row, to begin with: `store` finds rows with four times as much
_MATRICES = ("keys", "values")


def settled(bank: Bank, rows: Captured, *, steps: int, batch: int, rate: float, bits: float = MEAN_BITS) -> Bank:
    """A bank of nodes that `store` keeps as they are, in about so many bits a number.

    rows: as for `regression.train`; steps, batch, rate: of the regression before. With no steps nothing is trained.
    """
    plan, each = _Plan.of(bank, rows, bits=bits), math.ceil(_SHARE * steps / PARTS)
    for part in range(1, PARTS + 1):
        held = plan.held(bank.parameters, part)
        first = (part - 1) * each
        bank = regression.train(Start.of(bank, rows), rows, steps=each, batch=batch, rate=rate, first=first, held=held)
    return bank


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """steps: of the grids of keys and values [M, m, 1]. turns: in which part each entry is rounded, 0 … PARTS - 1, keys
    [M, 1, D] and values [M, m, 1].
    """

    steps: HeadArrays
    turns: HeadArrays

    @classmethod
    def of(cls, bank: Bank, rows: Captured, *, bits: float) -> "_Plan":
        some = Captured(*(x[:, :_JUDGES] for x in rows))
        queries, counts = some.queries.astype(mx.float32), [count for (count,) in bank.sizes]
        costs = matching.costs(some, bank)
        return cls(
            steps=_steps(bank, costs, bits=bits),
            turns={
                "keys": _turns(mx.square(queries).mean(1), [bank.head_dim] * len(counts))[:, None],
                "values": _turns(costs["values"], counts)[..., None],
            },
        )

    def held(self, parameters: HeadArrays, part: int) -> regression.Held:
        """What is rounded in the first `part` parts, at its nearest values."""
        nearest = {n: mx.round(parameters[n] / step) * step for n, step in self.steps.items()}
        held = regression.Held(where={n: turn < part for n, turn in self.turns.items()}, values=nearest)
        mx.eval(held)
        return held


def _turns(notice: mx.array, counts: Sequence[int]) -> mx.array:
    """[M, n] -> which of PARTS equal parts each of a head's first entries belongs to, the largest first; counts: how
    many they are, the rest is padding.
    """
    rank = mx.argsort(mx.argsort(-notice, axis=1), axis=1)
    return mx.minimum(rank * PARTS // mx.array(list(counts))[:, None], PARTS - 1)


def _steps(bank: Bank, costs: HeadArrays, *, bits: float) -> HeadArrays:
    """The step of every row; costs [M, m]: of an error of 1 in one number of it, squared."""
    most = max(count for (count,) in bank.sizes)
    found: dict[str, Any] = {n: np.ones((len(bank.sizes), most, 1), np.float32) for n in _MATRICES}
    told = {n: np.array(costs[n]) for n in _MATRICES}
    for m, head in enumerate(bank.unstack()):
        values = [np.array(head[n].astype(mx.float32)) for n in _MATRICES]
        dear = [np.maximum(x, _FLOOR * x.mean() + 1e-30) for x in (told[n][m, : len(values[0])] for n in _MATRICES)]
        for name, exponents in zip(_MATRICES, _exponents(values, dear, bits=bits), strict=True):
            found[name][m, : len(exponents), 0] = np.exp2(exponents / 2)
    return {n: mx.array(x) for n, x in found.items()}


def _exponents(values: Sequence[Any], costs: Sequence[Any], *, bits: float) -> list[Any]:
    """Of matrices [rows, D] with the costs of their rows: the rows' steps, twice their binary logarithms, for which the
    numbers take so many bits on average."""
    sizes = [column_sizes(x) for x in values]
    finest = [np.ceil(2 * np.log2(np.abs(x).max(1) / _LARGEST + 1e-12)) for x in values]
    wanted, low, high = bits * sum(x.size for x in values), -120.0, 120.0
    for _ in range(40):  # bisection: coarser grids take fewer bits
        level = (low + high) / 2
        exponents = [
            np.maximum(np.rint(level - np.log2(cost)), least).astype(int)
            for cost, least in zip(costs, finest, strict=True)
        ]
        taken = 0.0
        for size, exponent in zip(sizes, exponents, strict=True):
            known, row = np.unique(exponent, return_inverse=True)
            taken += coding.cost(spreads(size, known)).sum(1)[row].sum()
        low, high = (level, high) if taken > wanted else (low, level)
    return exponents
