"""The regression of nodes: the loss of regression.py with its gradient written out, in few passes over the scores.

    scores s = k·q + b - L*   ->   p = softmax(s), L - L* = log Σ e^s   ->   u = Σ p v - l   ->   slopes (of o and L)
    ->   ∂/∂s = p (slopes · (v, 1))   ->   ∂/∂(k, b) = Σ ∂/∂s (q, 1),   ∂/∂v = Σ p slopes   ->   Adam

Five matrix products and as many passes over [M, B, m] in half precision on a GPU: every number is of the order of one.
Queries are taken about their mean and times the scale, keys, values and outputs in units of the head; biases and what
all scores of a sample get travel as further columns of the products, in two halves each. Relative to the exact L* the
scores that matter are near zero, where half precision is finest. On a Linux CPU everything is float32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...heads import HeadArrays, Quadrature
from ...kernels import training
from ...kernels.training import BETA1, BETA2, PLAIN, TAIL, Moments
from ..samples.sample_store import Samples
from . import cpu_steps, optimizers
from .cpu_steps import HeadBatch
from .initial import Init
from .regression import NONE_HELD, Held, Training, scales

_LARGEST = 256.0  # of a query's number, an output's or a log-normalizer, in units, that half precision is used for
UNIT_SAMPLES = 2048


class Units(NamedTuple):
    """The coordinates that nodes are trained in: query' = key · scale · (q - mean), key' = k / key, value' = v / value.

    A model's and a layer's queries and values differ by orders of magnitude from those of others. The units are what
    moves a score by a certain amount, and the rms of the output; both are 1 in the median head of SmolLM2-135M, on
    which the rate was chosen. mean [M, 1, D], key and value [M, 1, 1]; ratio [M]: the weight of (L - L*)² in the loss.
    """

    mean: mx.array
    key: mx.array
    value: mx.array
    ratio: mx.array

    @classmethod
    def of(cls, samples: Samples, *, scale: float) -> "Units":
        few, norm = samples.some(slice(UNIT_SAMPLES)), scales(samples)
        queries, output = few.queries.astype(mx.float32), few.output.astype(mx.float32)
        mean = queries.mean(1, keepdims=True)
        deviation = mx.sqrt(mx.square(queries - mean).sum(-1).mean(1)) + 1e-12
        value = 5.0 * (mx.sqrt(mx.square(output).mean((1, 2))) + 1e-12)
        ratio = PLAIN * output.shape[-1] * norm.output / (mx.square(value) * norm.log_normalizer)
        units = cls(mean, 1.2 / (scale * deviation)[:, None, None], value[:, None, None], ratio)
        mx.eval(units)
        return units


class Batch(NamedTuple):
    """Samples of a step: queries [M, B, D + TAIL] with what scores lack behind them, change o* - l and live l
    [M, B, D], gap L* - Lₗ [M, B]."""

    queries: mx.array
    change: mx.array
    live: mx.array
    gap: mx.array

    @classmethod
    def of(cls, samples: Samples, units: Units, *, scale: float, dtype: mx.Dtype) -> "Batch":
        queries = (samples.queries.astype(mx.float32) - units.mean) * (scale * units.key)
        high, low = training.split(samples.log_normalizer[..., None], dtype)
        ones = mx.ones((*high.shape[:2], 2), dtype)
        parts = [queries.astype(dtype), ones, high, low, mx.zeros((*high.shape[:2], TAIL - 4), dtype)]
        output, live = (x.astype(mx.float32) / units.value for x in (samples.output, samples.live_output))
        gap = mx.clip(samples.log_normalizer - samples.live_log_normalizer, -80.0, 80.0)
        return cls(mx.concatenate(parts, axis=-1), (output - live).astype(dtype), live.astype(dtype), gap)


class State(NamedTuple):
    """Keys with their biases behind them and values [M, m, D + TAIL] float32, and for Adam their moments."""

    keys: mx.array
    values: mx.array
    of_keys: Moments
    of_values: Moments


class NodeTraining(Training):
    """Samples of M heads, ready for training nodes of any number on them.

    parts: the samples, shuffled, some at a time; the last incomplete batch is left out. `samples` are the first part.
    """

    def __init__(self, parts: Iterable[Samples], *, scale: float, batch: int):
        self._parts = iter(parts)
        first = next(self._parts)
        super().__init__(first, batch=min(batch, first.queries.shape[1]))
        self._scale = scale

    @cached_property
    def units(self) -> Units:
        return Units.of(self.samples, scale=self._scale)

    @cached_property
    def batches(self) -> list[Batch]:
        """All samples in the types and units of the products."""
        made, part = list[Batch](), self.samples
        dtype = mx.float16 if device().half and not self._too_large() else mx.float32
        while True:
            count = part.queries.shape[1] // self.batch * self.batch
            for at in range(0, count, self.batch):
                samples = part.some(slice(at, at + self.batch))
                batch = Batch.of(samples, self.units, scale=self._scale, dtype=dtype)
                made.append(Batch(*(mx.contiguous(x) for x in batch)))
                mx.eval(made[-1])
            following = next(self._parts, None)
            if following is None:
                return made
            rest = part.some(slice(count, None))
            part = Samples(*(mx.concatenate(list(pair), axis=1) for pair in zip(rest, following, strict=True)))

    def _too_large(self) -> bool:
        """Whether numbers are too large for half precision to tell scores apart."""
        few = Batch.of(self.samples.some(slice(UNIT_SAMPLES)), self.units, scale=self._scale, dtype=mx.float32)
        largest = [mx.abs(x).max() for x in (few.queries, few.change, few.live)]
        return not mx.stack(largest).max().item() < _LARGEST  # type: ignore[operator]

    def train(self, init: Init, *, steps: int, rate: float, first: int = 0, held: Held = NONE_HELD) -> Quadrature:
        """The trained bank of a start. first: which batch to start with. held: what of the nodes is not trained."""
        bank = init.bank
        assert isinstance(bank, Quadrature)
        state = self._start(bank.parameters, held)
        keys, values = state[:2]
        if steps and device().linux_cpu and self.batches[0].queries.dtype == mx.float32:
            counts = [count for (count,) in bank.sizes]
            keys, values = self._run_by_head(state, held, counts, steps=steps, rate=rate, first=first)
        elif steps:
            keys, values = self._run(state, held, steps=steps, rate=rate, first=first)
        return self._bank(bank, keys, values, held)

    def _run_by_head(
        self, state: State, held: Held, counts: Sequence[int], *, steps: int, rate: float, first: int
    ) -> tuple[mx.array, mx.array]:
        """Keys and values after so many steps, on a Linux CPU. counts: of each head's nodes."""
        keys, values = np.array(state.keys), np.array(state.values)
        rates = [
            [np.broadcast_to(np.array(x), (len(counts), x.shape[1])) for x in pair] for pair in self._rates(state, held)
        ]
        D, ratio, table = values.shape[-1] - TAIL, np.array(self.units.ratio), _rows(steps, rate)
        for m, n in enumerate(counts):
            of_keys, of_values = (columns[m] * rows[m, :n, None] for columns, rows in rates)
            keys[m, :n, : D + 1], values[m, :n, :D] = cpu_steps.train(
                keys[m, :n, : D + 1],
                values[m, :n, :D],
                self._head_batches[m],
                table=table,
                ratio=float(ratio[m]),
                rates=cpu_steps.Rates(of_keys[:, : D + 1], of_values[:, :D]),
                first=first,
            )
        return mx.array(keys), mx.array(values)

    @cached_property
    def _head_batches(self) -> list[list[HeadBatch]]:
        """All samples in units, by head."""
        M, D = self.samples.queries.shape[0], self.samples.queries.shape[-1]
        return [
            [
                HeadBatch.of(b.queries[m, :, :D], b.queries[m, :, D + 2], b.change[m, :], b.live[m, :], b.gap[m, :])
                for b in self.batches
            ]
            for m in range(M)
        ]

    def _run(self, state: State, held: Held, *, steps: int, rate: float, first: int) -> tuple[mx.array, mx.array]:
        """Keys and values after so many steps."""
        dtype = self.batches[0].queries.dtype
        training.kernels_work()  # is found out before anything is compiled
        by_key, by_value = self._rates(state, held)
        table = _schedule(steps, rate)
        step = partial(_step, ratio=self.units.ratio)
        run: Callable[..., Any] = step if device().linux_cpu else mx.compile(step)  # there is nothing to fuse on CUDA
        wide_keys = training.widened(state.keys, dtype, keys=True)
        wide_values = training.widened(state.values, dtype, keys=False)
        arrays = [state.keys, state.values, *state.of_keys, *state.of_values, wide_keys, wide_values]
        for i in range(steps):
            batch = self.batches[(first + i) % len(self.batches)]
            following = run(*arrays, *batch, *by_key, *by_value, table[i])
            mx.async_eval(following)
            mx.eval(arrays)  # of the step before: one step runs while the next one is built
            arrays = following
        return arrays[0], arrays[1]

    def _start(self, parameters: HeadArrays, held: Held) -> State:
        """The nodes in units, a multiple of eight of them; those that are added have no weight. What holding a key
        does to the mean query's score, its bias makes up for."""
        bias = parameters["bias"].astype(mx.float32) + self._common(parameters["keys"].astype(mx.float32))
        parameters = held.over(parameters)
        keys, values = (parameters[n].astype(mx.float32) for n in ("keys", "values"))
        more = -keys.shape[1] % 8
        bias = mx.pad(bias, [(0, 0), (0, more)], constant_values=-1e30)[..., None]
        keys = mx.pad(keys / self.units.key, [(0, 0), (0, more), (0, 0)])
        values = mx.pad(values / self.units.value, [(0, 0), (0, more), (0, TAIL)])
        keys = mx.concatenate([keys, bias, mx.zeros((*bias.shape[:2], TAIL - 1))], axis=-1)
        zeros = mx.zeros(keys.shape)
        return State(keys, values, Moments(zeros, zeros), Moments(zeros, zeros))

    def _common(self, keys: mx.array) -> mx.array:
        """What the mean query contributes to every node's score, [M, m]."""
        scores: mx.array = self._scale * (keys @ self.units.mean.swapaxes(1, 2))
        return scores[..., 0]

    def _rates(self, state: State, held: Held) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
        """Of keys and of values, by column and by row: 0 for what is held and for columns that are no parameters."""
        M, m, columns = state.keys.shape
        D = columns - TAIL
        of_keys = mx.broadcast_to((mx.arange(columns) <= D).astype(mx.float32), (M, columns))
        of_values = mx.broadcast_to((mx.arange(columns) < D).astype(mx.float32), (M, columns))
        rows = mx.ones((M, m))
        value_rows = rows
        if held.where:
            free = 1.0 - held.where["keys"].astype(mx.float32)[:, 0]
            of_keys = of_keys * mx.pad(free, [(0, 0), (0, TAIL)], constant_values=1.0)
            free = 1.0 - held.where["values"].astype(mx.float32)[..., 0]
            value_rows = mx.pad(free, [(0, 0), (0, m - free.shape[1])], constant_values=1.0)
        rates = [mx.contiguous(x) for x in (of_keys, rows, of_values, value_rows)]
        mx.eval(rates)
        return (rates[0], rates[1]), (rates[2], rates[3])

    def _bank(self, bank: Quadrature, keys: mx.array, values: mx.array, held: Held) -> Quadrature:
        """Such a bank with what was trained in place of its nodes."""
        before = bank.parameters
        m, D = before["keys"].shape[1:]
        bias, values = keys[:, :m, D], values[:, :m, :D] * self.units.value
        keys = keys[:, :m, :D] * self.units.key
        parameters = held.over({"keys": keys, "values": values, "bias": bias})
        parameters["bias"] = mx.where(before["bias"] <= -1e29, before["bias"], bias - self._common(parameters["keys"]))
        mx.eval(parameters)
        return Quadrature(parameters=parameters, sizes=bank.sizes, scale=bank.scale, offset=bank.offset)


def _step(
    keys: mx.array,
    values: mx.array,
    key_first: mx.array,
    key_second: mx.array,
    value_first: mx.array,
    value_second: mx.array,
    wide_keys: mx.array,
    wide_values: mx.array,
    queries: mx.array,
    change: mx.array,
    live: mx.array,
    gap: mx.array,
    key_columns: mx.array,
    key_rows: mx.array,
    value_columns: mx.array,
    value_rows: mx.array,
    now: mx.array,
    *,
    ratio: mx.array,
) -> Sequence[mx.array]:
    """One step: its first eight arrays as they follow."""
    D = change.shape[-1]
    p, gain = training.softmax(queries @ wide_keys.swapaxes(1, 2))
    errors = mx.addmm(live, p, wide_values[..., :D], beta=-1.0)
    slopes = training.slopes(errors, change, live, gain, gap, ratio)
    by_score = p * (slopes @ wide_values.swapaxes(1, 2))
    by_key, by_value = by_score.swapaxes(1, 2) @ queries, p.swapaxes(1, 2) @ slopes
    keys, of_keys, wide_keys = training.adam(
        keys, Moments(key_first, key_second), by_key, key_columns, key_rows, now, keys=True
    )
    values, of_values, wide_values = training.adam(
        values, Moments(value_first, value_second), by_value, value_columns, value_rows, now, keys=False
    )
    return [keys, values, *of_keys, *of_values, wide_keys, wide_values]


def _schedule(steps: int, rate: float) -> list[mx.array]:
    """For each step the rate, and what corrects the moments."""
    table = mx.array(_rows(steps, rate)) + 0.0  # in the device's memory
    mx.eval(table)
    return [table[i, :] for i in range(steps)]


def _rows(steps: int, rate: float) -> list[tuple[float, float, float]]:
    return [
        (rate * optimizers.schedule(i, steps), 1 / (1 - BETA1 ** (i + 1)), 1 / (1 - BETA2 ** (i + 1)))
        for i in range(steps)
    ]
