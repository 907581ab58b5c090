"""What each head gets: its size, from the errors of short fits, and for all of them the budget, where none is given."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..core.device import device
from ..core.gather import take
from ..core.types import JsonObject
from ..heads import HeadArrays, Size
from ..store import MEAN_BITS, Layout
from . import auto_budget, finite, fisher
from .budget import MOST_BITS, OVERHEAD_BITS, equal_size, head_sizes, node_bits
from .check import check
from .checkpoint import Plan
from .distributed import World
from .kinds import KindFit
from .samples.conversation import answered_checks
from .train import groups, regress, rounded

_ABOVE_ALL = 1e9  # times the largest error: of heads that get as many bytes as they can have

Affordable = Callable[[float], float]


def plan_sizes(kind: KindFit, affordable: Affordable, share: float | None) -> Plan:
    """Every head's size, from the errors of a short uniform fit.

    affordable: a share of the KV cache -> the bytes that it leaves for heads. share: None to choose the smallest that
    is expected to do (`auto_budget`); kinds whose short fits do not tell it get the first candidate.
    """
    result = kind.run.kept_plan()
    if result is None:
        result = _plan(kind, affordable, share)
        kind.run.checkpoint.save_plan(result)
    return result


def _plan(kind: KindFit, affordable: Affordable, share: float | None) -> Plan:
    layout = kind.run.layout
    if not layout.bank.trainable:
        return Plan([layout.bank.size_for(0)] * kind.n_heads, share or auto_budget.FIRST)
    metric = sensitivity(kind)
    errors, exponent = trial_errors(kind, affordable(share or auto_budget.FIRST), metric), None

    def sizes_and_bits(share: float) -> tuple[list[Size], float]:
        nbytes = affordable(share)
        sizes = head_sizes(errors, nbytes, share=share, layout=layout, config=kind.run.config, n=kind.length)
        return sizes, mean_bits(layout, sizes, nbytes, n=kind.length)

    if share is None:
        share = auto_budget.FIRST
        if layout.bits is None:
            choice = auto_budget.choose(lambda share: short_fit(kind, *sizes_and_bits(share)))
            share, exponent = choice.share, choice.exponent
    sizes, bits = sizes_and_bits(share)
    if starved := heads_that_need_every_key(kind, sizes, metric, nats=float(errors.sum())):
        errors[starved] = _ABOVE_ALL * errors.max()
        sizes, bits = sizes_and_bits(share)
    return Plan(sizes, share, exponent, bits)


def sensitivity(kind: KindFit) -> mx.array:
    """What errors of each head cost the answers (`fisher.metric`)."""
    run = kind.run
    probes = [c for c in kind.data.conversations if c.answer and c.split == "train"][: device().fisher_probes]
    with run.progress("measuring sensitivity", len(probes)) as done:
        metric = fisher.metric(
            run.model, kind.data.context, probes, geometry=run.geometry, progress=done, world=run.world
        )
        finite.check_heads("measuring sensitivity", finite.not_finite([metric]), run.geometry)
    return metric


def trial_errors(kind: KindFit, nbytes: float, metric: mx.array) -> np.ndarray:
    """Every head's error [n_heads], in nats, after a short fit in which all heads have the same size. nbytes: of all
    heads together. metric: their `sensitivity`."""
    run = kind.run
    size = equal_size(run.layout, nbytes, heads=kind.n_heads, most=kind.length)
    errors = np.zeros(kind.n_heads)
    trials = kind.groups([size] * kind.n_heads)
    world = run.world
    with run.progress("deciding sizes", len(trials)) as done:
        for number, group in enumerate(trials):
            training = kind.training(group, device().trial_samples)
            init = kind.initialize(group, [size] * len(group), training.samples)
            bank = regress(kind, init, training, steps=run.config.trial_steps)
            errors[group] = kind.judge(bank, training.samples, take(metric, mx.array(group)))
            done(number + 1)
    return _of_all_ranks(errors, world)


def heads_that_need_every_key(kind: KindFit, sizes: Sequence[Size], metric: mx.array, *, nats: float) -> list[int]:
    """Of the large heads that are not trained those that lose more by each key that they have no room for than a node
    of all heads stands for. Such a head looks for single tokens, and its size does not tell it
    (docs/log/budgets.md). nats: errors of all heads, as `trial_errors` finds them."""
    K, errors = kind.run.geometry.n_kv_heads, np.zeros(kind.n_heads)
    for i, (size, trained) in enumerate(zip(sizes, kind.trained(sizes), strict=True)):
        if trained or kind.keeps_every_key(size) or i // K not in kind.layers:
            continue
        samples = kind.held_out_samples([i])
        start = kind.initialize([i], [size], samples).bank
        errors[i] = kind.judge(start, samples, take(metric, mx.array([i])))[0]
    missing = np.array([max(1, kind.length - size[0]) for size in sizes])
    lost = _of_all_ranks(errors, kind.run.world) / missing
    return np.flatnonzero(lost > nats / sum(size[0] for size in sizes)).tolist()


def _of_all_ranks(errors: np.ndarray, world: World) -> np.ndarray:
    """A head is of one rank's groups: the others have zeros."""
    total: np.ndarray = np.array(world.values(errors.tolist())).sum(axis=0)
    return total


def short_fit(kind: KindFit, sizes: Sequence[Size], bits: float) -> JsonObject:
    """The check's figures for heads of these sizes, trained for a short time and not rounded.

    Heads that are not trained are rounded, to so many bits a number, as they will be.
    """
    run, heads = kind.run, dict[int, HeadArrays]()
    K, steps = run.geometry.n_kv_heads, device().trial_steps
    with run.progress("choosing a budget", kind.n_heads) as done:
        for group, train in groups(kind, sizes):
            training = kind.training(group, device().trial_samples)
            init = kind.initialize(group, [sizes[i] for i in group], training.samples)
            if train:
                bank = regress(kind, init, training, steps=steps)
            else:
                bank = rounded(kind, init.bank, training, bits=bits, steps=0)
            heads |= dict(zip(group, bank.unstack(), strict=True))
            done(len(heads))
    heads = run.world.heads(heads)
    banks = [
        run.layout.bank.stack([heads[layer * K + k] for k in range(K)], scale=run.geometry.scale, offset=offset)
        for layer, offset in enumerate(kind.data.context.offsets)
    ]
    asked = answered_checks(kind.data.conversations)[: device().trial_checks]
    return check(run, kind.data, banks, asked=asked, stage="checking a budget")


def mean_bits(layout: Layout, sizes: Sequence[Size], nbytes: float, *, n: int) -> float:
    """How many bits a number of a node gets: more, where every head keeps the keys of all n tokens and bytes are
    left."""
    if layout.bits is not None or any(size != layout.bank.size_for(n) for size in sizes):
        return node_bits(layout, nbytes / len(sizes))
    numbers = 2 * layout.head_dim * n * len(sizes)
    return max(MEAN_BITS, min(MOST_BITS, 8 * nbytes / numbers - OVERHEAD_BITS))
