"""The steps of `node_training` on a Linux CPU: head by head, at its own number of nodes, through numpy's loops.

What a step of one head reads and writes stays in the processor's cache, and no memory is new; MLX takes twice as long.
The products are MLX's, whose BLAS has the threads that `core.blas` chose; numpy works on the same memory. The loss is
that of `kernels.training.plain_slopes`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...core.types import FloatArray
from ...kernels.training import BETA1, BETA2, EPSILON, PLAIN

_FAR = 30.0  # from L*: sums of weights relative to it are numbers like others up to there
_LEAST = -60.0  # of a score: what is less makes numbers so small that a processor slows down


class HeadBatch(NamedTuple):
    """Samples of one head and step: queries [B, D + 2] with 1 and -L* behind them, change o* - l, its share g* (o* - l)
    of the merged output and live l [B, D], gap L* - Lₗ [B]."""

    queries: mx.array
    change: FloatArray
    merged: FloatArray
    live: FloatArray
    gap: FloatArray

    @classmethod
    def of(cls, queries: mx.array, log: mx.array, change: mx.array, live: mx.array, gap: mx.array) -> "HeadBatch":
        """queries, change, live [B, D], log, gap [B]: L* and L* - Lₗ."""
        wide = mx.concatenate([queries, mx.ones((*log.shape, 1)), -log[:, None]], axis=-1)
        mx.eval(wide)
        changes, lives, gaps = (np.array(x) for x in (change, live, gap))
        return cls(wide, changes, _sigmoid(gaps)[:, None] * changes, lives, gaps)


class Rates(NamedTuple):
    """What the rate is multiplied by: of keys with their biases [m, D + 1], and of values [m, D]."""

    keys: FloatArray
    values: FloatArray


def train(
    keys: FloatArray,
    values: FloatArray,
    batches: Sequence[HeadBatch],
    *,
    table: Sequence[tuple[float, float, float]],
    ratio: float,
    rates: Rates,
    first: int,
) -> tuple[FloatArray, FloatArray]:
    """Keys with their biases behind them [m, D + 1] and values [m, D] of one head after some steps of Adam.

    table: for each step the rate, and what corrects the moments. ratio: the weight of (L - L*)². first: which batch to
    start with.
    """
    m, D = values.shape
    ones = np.ones((m, 1), np.float32)
    moving_keys = _Moving(np.concatenate([keys, ones], axis=1), D + 1, rates.keys)
    moving_values = _Moving(np.concatenate([values, ones], axis=1), D, rates.values)
    slopes = _Shared(np.zeros((batches[0].change.shape[0], D + 1), np.float32))
    with np.errstate(over="ignore", under="ignore"):
        for i, now in enumerate(table):
            batch = batches[(first + i) % len(batches)]
            by_key, by_value = _gradients(moving_keys.shared, moving_values.shared, batch, slopes, ratio)
            moving_keys.adam(by_key, now)
            moving_values.adam(by_value, now)
    return moving_keys.shared.numbers[:, : D + 1].copy(), moving_values.shared.numbers[:, :D].copy()


class _Shared:
    """An array that MLX multiplies and numpy changes."""

    def __init__(self, numbers: FloatArray):
        self.array = mx.array(numbers)
        mx.eval(self.array)
        self.numbers = _seen(self.array)


def _seen(x: mx.array) -> FloatArray:
    mx.eval(x)
    return np.array(x, copy=False)


def _gradients(
    keys: _Shared, values: _Shared, batch: HeadBatch, slopes: _Shared, ratio: float
) -> tuple[FloatArray, FloatArray]:
    """By keys [m, D + 2] and by values [m, D + 1]; the last column of each means nothing. slopes [B, D + 1] is
    overwritten."""
    D = batch.live.shape[1]
    scores = batch.queries @ keys.array.T
    weights = _seen(scores)
    top = weights.max(1)
    if far := np.abs(top).max() > _FAR:
        weights -= top[:, None]
    np.exp(np.maximum(weights, _LEAST, out=weights), out=weights)
    total = np.einsum("ij->i", weights)
    gain, inverse = np.log(total) + (top if far else 0.0), 1 / total
    output = _seen(scores @ values.array)[:, :D]
    output *= inverse[:, None]
    by_output = slopes.numbers[:, :D]
    u = output - batch.live
    gate = _sigmoid(gain + batch.gap)
    merged = gate[:, None] * u
    merged -= batch.merged
    by_log = gate * (1 - gate) * np.einsum("ij,ij->i", merged, u) + ratio * gain
    merged *= gate[:, None]
    u -= batch.change
    u *= PLAIN
    np.add(merged, u, out=by_output)
    slopes.numbers[:, D] = by_log - np.einsum("ij,ij->i", by_output, output)
    slopes.numbers[:] *= inverse[:, None]
    by_score = slopes.array @ values.array.T
    seen = _seen(by_score)
    seen *= weights
    return _seen(by_score.T @ batch.queries), _seen(scores.T @ slopes.array)


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -80, 80))))


class _Moving:
    """Parameters in the first columns of an array, and what Adam keeps of them."""

    def __init__(self, numbers: FloatArray, columns: int, rates: FloatArray):
        self.shared, self._columns, self._rates = _Shared(numbers), columns, rates
        self._first, self._second, self._spare = (np.zeros((len(numbers), columns), np.float32) for _ in range(3))

    def adam(self, gradient: FloatArray, now: tuple[float, float, float]) -> None:
        rate, correct_first, correct_second = now
        g, spare = gradient[:, : self._columns], self._spare
        self._first *= BETA1
        self._first += np.multiply(g, 1 - BETA1, out=spare)
        self._second *= BETA2
        np.multiply(g, g, out=spare)
        self._second += np.multiply(spare, 1 - BETA2, out=spare)
        np.sqrt(np.multiply(self._second, correct_second, out=spare), out=spare)
        spare += EPSILON
        np.divide(self._first, spare, out=spare)
        spare *= self._rates
        self.shared.numbers[:, : self._columns] -= np.multiply(spare, rate * correct_first, out=spare)
