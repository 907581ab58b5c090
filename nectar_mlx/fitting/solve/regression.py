"""The regression: head functions trained on what attention saw.

Loss of a head, with g = σ(L - L_live) the share of the context in the merged output:

    |merged(o, L) - merged(exact)|² / Var o  +  0.1 · (|o - o_exact|² / Var o + (L - L_exact)² / Var L)

The merged term is what the model notices; the plain terms keep o and L apart from each other well scaled.
"""

from copy import copy
from typing import NamedTuple

import mlx.core as mx

from ...core.attention import Partial
from ...core.device import device
from ...core.exp import sigmoid
from ...heads import Bank, HeadArrays
from ..samples.sample_store import Samples
from . import optimizers
from .initial import Init

_PLAIN = 0.1


class Scales(NamedTuple):
    """Per head [M]: variance of the output's entries and of the log-normalizer over the captured samples."""

    output: mx.array
    log_normalizer: mx.array


class Held(NamedTuple):
    """Entries of some parameters that stay as they are: `where` (bool, broadcastable) they have these `values`."""

    where: HeadArrays
    values: HeadArrays

    def over(self, parameters: HeadArrays) -> HeadArrays:
        return parameters | {n: mx.where(w, self.values[n], parameters[n]) for n, w in self.where.items()}


def scales(samples: Samples) -> Scales:
    spread = []
    for m in range(samples.output.shape[0]):  # one by one: in float32 they would take twice the memory
        spread.append(samples.output[m, :].astype(mx.float32).var(0).mean())
        mx.eval(spread[-1])
    return Scales(mx.stack(spread) + 1e-8, samples.log_normalizer.var(1) + 1e-6)


NONE_HELD = Held({}, {})


def merged_error(part: Partial, samples: Samples, metric: mx.array) -> mx.array:
    """Mean of Δᵀ · metric · Δ over the samples, Δ the error of the merged output [M, N, D], metric [M, D, D] -> [M]."""
    gate = sigmoid(part.log_normalizer - samples.live_log_normalizer)[..., None]
    exact = sigmoid(samples.log_normalizer - samples.live_log_normalizer)[..., None]
    live = samples.live_output.astype(mx.float32)
    error = gate * (part.output - live) - exact * (samples.output.astype(mx.float32) - live)
    return (error @ metric * error).sum(-1).mean(1)


def relative(scale: Scales, head_dim: int) -> mx.array:
    """The metric in which the error of an output is its share of the output's variance, [M, D, D]."""
    identity = (mx.arange(head_dim)[:, None] == mx.arange(head_dim)).astype(mx.float32)
    return identity / (head_dim * scale.output)[:, None, None]


def plain_error(part: Partial, samples: Samples, scale: Scales) -> mx.array:
    output = mx.square(part.output - samples.output.astype(mx.float32)).mean((1, 2)) / scale.output
    return output + mx.square(part.log_normalizer - samples.log_normalizer).mean(1) / scale.log_normalizer


class Training:
    """Samples of some heads, ready for training heads of any kind on them."""

    def __init__(self, samples: Samples, *, batch: int):
        self.samples, self.batch = samples, batch

    def train(self, init: Init, *, steps: int, rate: float, first: int = 0, held: Held = NONE_HELD) -> Bank:
        """The trained bank of a start. first: which batch to start with. held: what is not trained."""
        return train(init, self.samples, steps=steps, batch=self.batch, rate=rate, first=first, held=held)


def train(
    init: Init,
    samples: Samples,
    *,
    steps: int,
    batch: int,
    rate: float,
    muon_rate: float = 0.02,
    first: int = 0,
    held: Held = NONE_HELD,
) -> Bank:
    """The trained bank. samples: of its M heads, shuffled; batches are consecutive slices. first, held: as for
    `Training.train`.
    """
    bank, norm = init.bank, scales(samples)
    metric = relative(norm, bank.head_dim)
    count = samples.queries.shape[1]
    batch = min(batch, count)

    def loss(parameters: HeadArrays, part: Samples) -> mx.array:
        estimate = bank.apply(init.to_bank(parameters), part.queries)
        return (merged_error(estimate, part, metric) + _PLAIN * plain_error(estimate, part, norm)).sum()

    def step(
        parameters: HeadArrays, state: optimizers.State, part: Samples, factor: mx.array
    ) -> tuple[HeadArrays, optimizers.State]:
        gradients = mx.grad(loss)(parameters, part)
        following, state = optimizers.update(
            parameters,
            gradients,
            state,
            rate=rate * factor,
            muon_rate=muon_rate * factor,
            muon=init.muon,
        )
        return held.over(following), state

    run = mx.compile(step) if device().compile_steps else step
    parameters, state = held.over(init.parameters), optimizers.start(init.parameters)
    starts = range(0, count - batch + 1, batch)
    for i in range(steps):
        at = starts[(first + i) % len(starts)]
        part = Samples(*(mx.contiguous(x[:, at : at + batch]) for x in samples))
        following, state = run(parameters, state, part, mx.array(optimizers.schedule(i, steps)))
        mx.async_eval(following, state)
        mx.eval(parameters)  # of the step before: one step runs while the next one is built
        parameters = following
    trained = copy(bank)  # with what a kind keeps besides
    trained.parameters = init.to_bank(parameters)
    return trained


def errors(bank: Bank, samples: Samples, *, metric: mx.array | None = None) -> mx.array:
    """The merged error of each head over all samples, [M]; metric: as for `merged_error`, default `relative`."""
    count = int(samples.queries.shape[1])
    measure = relative(scales(samples), bank.head_dim) if metric is None else metric
    widest = max(bank.head_dim, *(size[0] for size in bank.sizes))
    chunk = min(4096, max(1, device().max_batch_scores // (len(bank.sizes) * widest)))
    total = mx.zeros(len(bank.sizes))
    for start in range(0, count, chunk):
        part = samples.some(slice(start, start + chunk))
        total = total + merged_error(bank(part.queries), part, measure) * part.queries.shape[1]
        mx.eval(total)
    return total / count
