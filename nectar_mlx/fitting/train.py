"""Training heads: groups of them side by side, rounded as they will be stored."""

from collections.abc import Iterator, Sequence
from copy import copy

import mlx.core as mx
import numpy as np

from ..heads import Bank, HeadArrays, Size
from ..store import MEAN_BITS
from . import finite
from .kinds import KindFit
from .solve import quantization, regression
from .solve.initial import Init
from .solve.regression import Training

_PROBE = 1024  # samples that tell how much the outputs of a whole text vary


def train_heads(kind: KindFit, sizes: Sequence[Size], *, bits: float = MEAN_BITS) -> list[HeadArrays]:
    """All heads, trained at their own sizes. bits: of a number of a node, on average, where nodes are rounded row by
    row."""
    heads, n_heads = kind.run.checkpoint.load_heads() | kind.settled, kind.n_heads
    if not kind.run.layout.bank.trainable:
        for part in kind.run.world.mine(kind.data.parts):
            init = kind.initialize(part, [sizes[i] for i in part], kind.data.held_out.heads(part))
            heads |= dict(zip(part, init.bank.unstack(), strict=True))
        heads = kind.run.world.heads(heads)
        return [heads[i] for i in range(n_heads)]
    with kind.run.progress("fitting heads", n_heads) as done:
        for group, train in groups(kind, sizes):
            left = [i for i in group if i not in heads]
            if left:
                fitted = _train_group(kind, left, [sizes[i] for i in left], train=train, bits=bits)
                kind.run.checkpoint.save_heads(fitted)
                heads |= fitted
            done(len(heads))
    heads = kind.run.world.heads(heads)
    return [kind.finish(i, heads[i]) for i in range(n_heads)]


def groups(kind: KindFit, sizes: Sequence[Size]) -> Iterator[tuple[list[int], bool]]:
    """Heads of this rank that are fitted together, and whether they are trained. Those with room for every key start
    otherwise than others that are not trained."""
    trained = kind.trained(sizes)
    for group in kind.groups(sizes):
        alike = dict[tuple[bool, bool], list[int]]()
        for i in sorted(group):
            alike.setdefault((kind.keeps_every_key(sizes[i]), trained[i]), []).append(i)
        for (_, train), members in sorted(alike.items(), reverse=True):
            yield members, train


def regress(kind: KindFit, init: Init, training: Training, *, steps: int) -> Bank:
    """A bank trained from its start for so many steps."""
    return training.train(init, steps=steps, rate=kind.rate(init.bank.sizes))


def rounded(kind: KindFit, bank: Bank, training: Training, *, bits: float, steps: int) -> Bank:
    """The bank rounded as it will be stored, where that is done in the course of training. steps: of the regression,
    to which those of rounding are proportional."""
    if kind.run.layout.bits is not None:
        return bank
    return quantization.round_nodes(bank, training, bits=bits, steps=steps, rate=kind.rate(bank.sizes))


def merged_errors(kind: KindFit, banks: Sequence[Bank], *, whole: Sequence[Bank] = ()) -> list[float]:
    """Merged error of every head on the held-out samples; banks: one a layer. whole: of each layer what gives the
    outputs whose variance errors are shares of (default: what the heads are fitted to)."""
    K, errors = kind.run.geometry.n_kv_heads, np.zeros(kind.n_heads)
    for layer in kind.layers:
        heads = range(layer * K, layer * K + K)
        samples, metric = kind.data.held_out.heads(heads), None
        if whole:
            some = samples.some(slice(_PROBE))
            scale = regression.scales(some._replace(output=whole[layer](some.queries).output))
            metric = regression.relative(scale, banks[layer].head_dim)
        errors[heads] = np.array(regression.errors(banks[layer], samples, metric=metric))
    # A layer is one rank's: the others have zeros.
    return [float(f"{sum(of_ranks):.3g}") for of_ranks in zip(*kind.run.world.values(errors.tolist()), strict=True)]


def _train_group(
    kind: KindFit, group: Sequence[int], sizes: Sequence[Size], *, train: bool, bits: float
) -> dict[int, HeadArrays]:
    """Some heads, trained and rounded; those whose error on held-out samples grew in that are as they started."""
    geometry, training = kind.run.geometry, kind.training(group)
    init = kind.initialize(group, sizes, training.samples)
    first = copy(init.bank)
    first.parameters = init.to_bank(init.parameters)
    finite.check_heads("initialization", [group[m] for m in finite.not_finite(first.parameters.values())], geometry)
    steps = kind.steps(sizes) if train else 0
    trained = regress(kind, init, training, steps=steps) if steps else first
    bank = rounded(kind, trained, training, bits=bits, steps=steps)
    heads = bank.unstack()
    if steps and kind.data.held_out.count:
        heads = _better(kind, group, first, bank, bits=bits)
    fine = mx.stack([mx.stack([mx.isfinite(x).all() for x in head.values()]).all() for head in heads])
    broken = [i for i, whole in zip(group, np.array(fine).tolist(), strict=True) if not whole]
    finite.check_heads("training", broken, geometry)
    return dict(zip(group, heads, strict=True))


def _better(kind: KindFit, group: Sequence[int], first: Bank, trained: Bank, *, bits: float) -> list[HeadArrays]:
    """Of each head the trained one, or the first, rounded, where that errs less on held-out samples."""
    held_out = kind.held_out_samples(group)
    before, after = (np.array(regression.errors(bank, held_out)) for bank in (first, trained))
    worse, heads = ~(after <= before), trained.unstack()
    if not worse.any():
        return heads
    few, every = np.flatnonzero(worse).tolist(), first.unstack()
    starts, errors = [every[m] for m in few], before[few]
    if kind.run.layout.bits is None:  # then what is stored is rounded here, and errs otherwise
        start = type(first).stack(starts, scale=first.scale)
        plain = rounded(kind, start, kind.training([group[m] for m in few]), bits=bits, steps=0)
        starts, errors = plain.unstack(), np.array(regression.errors(plain, held_out.of_heads(few)))
    for m, head, error in zip(few, starts, errors, strict=True):
        if not error >= after[m]:
            heads[m] = head
    return heads
