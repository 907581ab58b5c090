"""Quantization-aware rounding: nodes come onto the grids that they will be stored on, an eighth at a time, while the
others are trained to make up.

How finely a node must be kept follows from what its errors cost: those of a value count by the square of the node's
weight, those of a key also by how far the value lies from the answer. Each row of a head gets the step that makes all
rows cost the same (reverse water-filling), so that most nodes take three to five bits a number, some one and a few more
than eight; the head as a whole takes the bits it was given.

Rounding all at once would still cost much: an eighth of the columns of all keys (a node's other columns make up for
them) and of the nodes' values (other nodes do) is rounded, the rest trained for a while, then the next eighth: what
queries and answers notice most comes first, as in incremental network quantization (arXiv 1702.03044).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...core import rans
from ...core.device import device
from ...core.types import FloatArray, IntArray
from ...heads import Bank, HeadArrays
from ...store import MEAN_BITS
from ...store.grids import column_scales, log2_scales
from ..samples.sample_store import Samples
from . import attention_matching, regression
from .initial import Init
from .regression import Training

PARTS = 8
_SHARE = 0.4  # of a regression's steps that rounding takes on top of them
_FLOOR = 1e-1  # of the mean cost: a node that these samples hardly notice is what another question asks for
_LARGEST = 1024  # integer in a row, to begin with: `store` finds rows with four times as much
_COARSEST = 12  # half octaves by which a step exceeds a number that it leaves zero
_MATRICES = ("keys", "values")


def round_nodes(bank: Bank, training: Training, *, steps: int, rate: float, bits: float = MEAN_BITS) -> Bank:
    """A bank of nodes that `store` keeps as they are, in about so many bits a number.

    steps, rate: of the regression before. With no steps nothing is trained.
    """
    plan, part_steps = RoundingPlan.of(bank, training.samples, bits=bits), math.ceil(_SHARE * steps / PARTS)
    for part in range(PARTS) if steps else [PARTS - 1]:
        held = plan.held(bank.parameters, part)
        bank = training.train(Init.of(bank), steps=part_steps, rate=rate, first=part * part_steps, held=held)
    return bank


@dataclass(frozen=True, kw_only=True)
class RoundingPlan:
    """steps: of the rows' grids, keys and values [M, m, 1]. part: in which part each entry is rounded, 0 … PARTS - 1,
    keys [M, 1, D] and values [M, m, 1].
    """

    steps: HeadArrays
    part: HeadArrays

    @classmethod
    def of(cls, bank: Bank, samples: Samples, *, bits: float) -> "RoundingPlan":
        probe = samples.some(slice(device().rounding_samples))
        counts = [count for (count,) in bank.sizes]
        effects = attention_matching.mean_squares(probe.queries)
        costs = attention_matching.costs(probe, bank)
        return cls(
            steps=row_steps(bank, costs, bits=bits),
            part={
                "keys": _parts(effects, [bank.head_dim] * len(counts))[:, None],
                "values": _parts(costs["values"], counts)[..., None],
            },
        )

    def held(self, parameters: HeadArrays, part: int) -> regression.Held:
        """What is rounded up to this part, at its nearest values."""
        nearest = {n: mx.round(parameters[n] / step) * step for n, step in self.steps.items()}
        held = regression.Held(where={n: at <= part for n, at in self.part.items()}, values=nearest)
        mx.eval(held)
        return held


def _parts(effect: mx.array, counts: Sequence[int]) -> mx.array:
    """[M, n] -> which of PARTS equal parts each of a head's first entries belongs to, those of the largest effect
    first; counts: how many they are, the rest is padding.
    """
    rank = mx.argsort(mx.argsort(-effect, axis=1), axis=1)
    return mx.minimum(rank * PARTS // mx.array(list(counts))[:, None], PARTS - 1)


def row_steps(bank: Bank, costs: HeadArrays, *, bits: float) -> HeadArrays:
    """The step of every row; costs [M, m]: of an error of 1 in one number of it, squared."""
    most = max(count for (count,) in bank.sizes)
    steps = {n: np.ones((len(bank.sizes), most, 1), np.float32) for n in _MATRICES}
    rows = {n: np.array(bank.parameters[n].astype(mx.float32)) for n in _MATRICES}
    row_costs = {n: np.array(costs[n]) for n in _MATRICES}
    for m, (count,) in enumerate(bank.sizes):
        values = [rows[n][m, :count] for n in _MATRICES]
        head_costs = [row_costs[n][m, :count] for n in _MATRICES]
        floored = [np.maximum(x, _FLOOR * x.mean() + 1e-30) for x in head_costs]
        for name, exponents in zip(_MATRICES, _exponents(values, floored, bits=bits), strict=True):
            steps[name][m, : len(exponents), 0] = np.exp2(exponents / 2)
    return {n: mx.array(x) for n, x in steps.items()}


def _exponents(values: Sequence[FloatArray], costs: Sequence[FloatArray], *, bits: float) -> list[IntArray]:
    """Of matrices [rows, D] with the costs of their rows: the rows' steps, twice their binary logarithms, for which the
    numbers take so many bits on average."""
    offsets = [np.log2(cost) for cost in costs]
    finest = [np.ceil(2 * np.log2(np.abs(x).max(1) / _LARGEST + 1e-12)).astype(int) for x in values]
    columns = [column_scales(x) for x in values]
    first, last = min(int(x.min()) for x in finest), max(int(x.max()) for x in columns) + _COARSEST
    # What a row takes by its exponent, from the first to the last, behind which all numbers are zero.
    tables = [rans.cost(log2_scales(x, np.arange(first, last + 1, dtype=np.int32))).sum(1) for x in columns]
    wanted, low, high = bits * sum(x.size for x in values), -120.0, 120.0
    for _ in range(24):  # bisection: coarser grids take fewer bits
        level, taken = (low + high) / 2, 0.0
        exponents = [
            np.maximum(np.rint(level - offset), least).astype(int)
            for offset, least in zip(offsets, finest, strict=True)
        ]
        for table, exponent in zip(tables, exponents, strict=True):
            taken += table[np.minimum(exponent, last) - first].sum()
        low, high = (level, high) if taken > wanted else (low, level)
    return exponents
