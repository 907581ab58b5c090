"""What each head gets: its size, from the errors of short fits, and for all of them the budget, where none is given."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .._exp import SLOW_EXP
from ..heads import HeadArrays, Quadrature, Size
from ..store import MEAN_BITS
from . import auto_budget, sensitivity, starts
from .checkpoint import Plan
from .config import allocate

if TYPE_CHECKING:
    from .fitter import Fitter

N_PROBE = 8  # conversations by which the Fisher information is told
_SAMPLES = 1 << 15  # of a short fit, at most
_CHECKS = 8 if SLOW_EXP else 48  # questions by which a budget is chosen
_MOST_BITS, _OVERHEAD_BITS = 11.0, 0.5  # of a number; the second for biases, exponents and what training adds

Affordable = Callable[[float], float]


def plan(fitter: "Fitter", affordable: Affordable, share: float | None) -> Plan:
    """Every head's size, from the errors of a short uniform fit.

    affordable: a share of the KV cache -> the bytes that it leaves for heads. share: None to choose the smallest that
    is expected to do (`auto_budget`); kinds whose short fits do not tell it get the first candidate.
    """
    errors, exponent = trial_errors(fitter, affordable(share or auto_budget.FIRST)), None

    def sizes_at(share: float) -> list[Size]:
        return allocate(
            errors, affordable(share), share=share, layout=fitter.layout, config=fitter.config, n=fitter.length
        )

    if share is None:
        share = auto_budget.FIRST
        if fitter.layout.kind == "quadrature":
            choice = auto_budget.choose(lambda share: short_fit(fitter, sizes_at(share)))
            share, exponent = choice.share, choice.exponent
    sizes = sizes_at(share)
    return Plan(sizes, share, exponent, mean_bits(fitter, sizes, affordable(share)))


def trial_errors(fitter: "Fitter", nbytes: float) -> np.ndarray:
    """Every head's error [n_heads], in nats, after a short fit in which all heads have the same size."""
    same = starts.size_for(fitter.layout, nbytes / fitter.n_heads, most=fitter.length)
    errors = np.zeros(fitter.n_heads)
    groups = fitter.groups([same] * fitter.n_heads)
    probes = [c for c in fitter.conversations if c.answer and c.split == "train"][:N_PROBE]
    with fitter.progress("measuring sensitivity", len(probes)) as done:
        information = sensitivity.fisher(fitter.model, fitter.context, probes, geometry=fitter.geometry, progress=done)
        metric = sensitivity.metric(information)
    with fitter.progress("deciding sizes", len(groups)) as done:
        for number, group in enumerate(groups):
            samples = fitter.training_rows(group, _SAMPLES)
            start = fitter.start(group, [same] * len(group), samples)
            bank = fitter.train(start, samples, fitter.config.scout_steps)
            errors[group] = fitter.judged(bank, samples, metric[mx.array(group)])
            done(number + 1)
    return errors


def short_fit(fitter: "Fitter", sizes: Sequence[Size]) -> dict[str, Any]:
    """The check's figures for heads of these sizes, trained for a short time and not rounded."""
    heads, K = dict[int, HeadArrays](), fitter.geometry.n_kv_heads
    with fitter.progress("choosing a budget", fitter.n_heads) as done:
        for group, whole in fitter.members(sizes):
            samples = fitter.training_rows(group, _SAMPLES)
            start = fitter.kept(group) if whole else fitter.start(group, [sizes[i] for i in group], samples)
            bank = start.bank if whole else fitter.train(start, samples, auto_budget.STEPS)
            heads |= dict(zip(group, bank.unstack(), strict=True))
            done(len(heads))
    banks = [
        Quadrature.stack([heads[layer * K + k] for k in range(K)], scale=fitter.layout.scale, offset=offset)
        for layer, offset in enumerate(fitter.context.offsets)
    ]
    return fitter.fidelity(banks, checks=_CHECKS)


def mean_bits(fitter: "Fitter", sizes: Sequence[Size], nbytes: float) -> float:
    """How many bits a number of a node gets: more, where every head keeps all keys and bytes are left."""
    if fitter.layout.bits is not None or any(count < fitter.length for (count, *_) in sizes):
        return MEAN_BITS
    numbers = 2 * fitter.geometry.head_dim * fitter.length * fitter.n_heads
    return max(MEAN_BITS, min(_MOST_BITS, 8 * nbytes / numbers - _OVERHEAD_BITS))
