"""Distillation: heads trained through the whole model, after the regression.

The regression makes each head answer as exact attention does; what the errors of all heads do to an answer together it
does not see. Here the next-token distributions behind the heads are brought to those behind the full cache (Cartridges,
arXiv 2506.06266), on the conversations of the fit: the loss is KL(full cache ‖ heads) over the tokens of the answers.
It does most where files are smallest (docs/log/distillation.md).

Nodes are trained in the units of the regression, about the mean query: a bias is b' = b + scale · mean·k. They stay on
the grids that they were rounded to: the forward pass takes the rounded numbers, and the gradient passes as if they were
not (straight-through estimator, arXiv 1308.3432). What the full cache's last layer gives is computed once. Gradients
are had layer by layer (`backward`).
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.device import device
from ..core.gather import take
from ..heads import Bank, HeadArrays, Size
from ..mlxlm.cache import NectarCache
from ..store.grids import GridMatrix
from .backward import Call, backward, forward
from .distributed import batches
from .fidelity import log_probabilities
from .joint_attention import JointCache
from .kinds import KindFit
from .layers import LayerRunner, layer_runner
from .samples.conversation import Conversation
from .solve import optimizers
from .solve.node_training import UNIT_SAMPLES, Units

_RATE = 8e-3  # of Adam, in units, where a step takes _TOGETHER conversations
_TOGETHER = 96
_JUDGED = 64  # conversations that are held out, by which it is decided whether the result is kept, at most
_MATRICES = ("keys", "values")
_NAMES = (*_MATRICES, "bias")  # of a layer's arrays, in the order of the vector


def distilled(kind: KindFit, sizes: Sequence[Size], heads: list[HeadArrays]) -> list[HeadArrays]:
    """Heads trained on; as they were where that is no better on conversations that are held out, and for models whose
    layers are not called one by one. sizes: of the heads. One rank does it."""
    run, context = kind.run, kind.data.context
    runner = layer_runner(run.model, run.geometry)
    own = [isinstance(cache, NectarCache) for cache in context.make_cache()]
    if runner is None or sum(own) != len(context.banks):
        return heads
    trained, units = dict[int, HeadArrays](), _units(kind)
    if run.world.first:
        trained = dict(enumerate(_Distillation(kind, sizes, heads, runner, units).run()))
    return [head for _, head in sorted(run.world.heads(trained).items())]


class _Batch:
    """Conversations side by side: tokens [B, T], and where in [B · T] the answers are drawn, [R]."""

    def __init__(self, conversations: Sequence[Conversation]):
        sequences = [(c.prompt + c.answer)[:-1] for c in conversations]
        longest, at = max(map(len, sequences)), list[int]()
        # Right padding is harmless: attention is causal, and padded places count for nothing.
        self.tokens = mx.array([s + [0] * (longest - len(s)) for s in sequences])
        self.ahead = [c.ahead for c in conversations]
        for row, c in enumerate(conversations):
            at += range(row * longest + len(c.prompt) - 1, row * longest + c.fed_tokens)
        self.drawn = mx.array(at)
        places = np.full(self.tokens.size, len(at), np.int32)  # of a place in `drawn`, or of zeros behind it
        places[at] = np.arange(len(at))
        self._places = mx.array(places)

    def rows(self, hidden: mx.array) -> mx.array:
        """Of hidden states [B, T, E] those by which answers are drawn, [R, E]."""
        return take(hidden.reshape(-1, hidden.shape[-1]), self.drawn)

    def spread(self, rows: mx.array) -> mx.array:
        """The inverse, zeros elsewhere."""
        padded = mx.concatenate([rows, mx.zeros_like(rows[:1])])
        return take(padded, self._places).reshape(*self.tokens.shape, -1)


class _Distillation:
    """The heads of all layers in one vector [P], layer by layer keys, values and biases b', and what it is moved by.

    steps: of the grid that each number lies on, 0 where it is not rounded. rates: of each number; 0 for those of heads
    that are not trained. means: scale · mean query of each layer's heads, [K, D, 1]. units: of each layer's heads.
    """

    def __init__(
        self,
        kind: KindFit,
        sizes: Sequence[Size],
        heads: list[HeadArrays],
        runner: LayerRunner,
        units: Sequence[Units],
    ):
        self.kind, self.heads, self.runner, self.context = kind, heads, runner, kind.data.context
        self.banks, self.means = list[Bank](), list[mx.array]()
        trained, K = kind.trained(sizes), kind.run.geometry.n_kv_heads
        steps, rates, vector = list[mx.array](), list[mx.array](), list[mx.array]()
        for layer, (exact, unit) in enumerate(zip(self.context.banks, units, strict=True)):
            own = slice(layer * K, layer * K + K)
            bank = kind.run.layout.bank.stack(heads[own], scale=exact.scale, offset=exact.offset)
            p = {name: bank.parameters[name].astype(mx.float32) for name in _NAMES}
            self.banks.append(bank)
            self.means.append(exact.scale * unit.mean.swapaxes(1, 2))
            p["bias"] = p["bias"] + (p["keys"] @ self.means[-1])[..., 0]
            grids = bank.stack([_grids(head) for head in heads[own]], scale=exact.scale).parameters
            moved = mx.array(trained[own]).astype(mx.float32)[:, None, None]
            rate = {"keys": moved * unit.key, "values": moved * unit.value, "bias": moved[..., 0]}
            vector += [p[name].reshape(-1) for name in _NAMES]
            steps += [mx.maximum(grids[name], 0.0).reshape(-1) for name in _NAMES]
            rates += [mx.broadcast_to(rate[name], p[name].shape).reshape(-1) for name in _NAMES]
        self.vector, self.steps, self.rates = (mx.concatenate(parts) for parts in (vector, steps, rates))
        conversations = [c for c in kind.data.conversations if c.answer]
        self.training = [c for c in conversations if c.split == "train"]
        self.held_out = [c for c in conversations if c.split == "held_out"][:_JUDGED]
        self.finals = dict[int, mx.array]()  # by the conversation's id

    def run(self) -> list[HeadArrays]:
        """The heads after all steps, or as they were."""
        run = self.kind.run
        steps = run.config.distillation_steps or 0
        if not self.training or not self.held_out:
            return self.heads
        before = self.divergence(self.vector)
        state = optimizers.start({"": self.vector})
        first, kept = 0, run.checkpoint.load_distillation()
        if kept is not None:
            first, self.vector = kept[0], kept[1]["vector"]
            state = optimizers.State(mx.array(float(first)), {"": kept[1]["first"]}, {"": kept[1]["second"]})
        following = _batches(self.training, most=self.side_by_side, seed=run.config.seed)
        # Smaller steps where fewer conversations make a gradient noisier.
        largest = self.rates * (_RATE * math.sqrt(min(1.0, self.side_by_side / _TOGETHER)))
        with run.progress("distilling", steps) as done:
            for step in range(steps):
                conversations = next(following)
                if step < first:
                    continue
                vector, state = optimizers.update(
                    {"": self.vector},
                    {"": self.gradient(_Batch(conversations), conversations)},
                    state,
                    rate=largest * optimizers.schedule(step, steps),
                    muon_rate=mx.array(0.0),
                    muon=frozenset(),
                )
                self.vector = vector[""]
                mx.eval(self.vector, state)
                moments = {"first": state.first[""], "second": state.second[""]}
                run.checkpoint.save_distillation(step + 1, {"vector": self.vector} | moments)
                done(step + 1)
        if not self.divergence(self.vector) < before:
            return self.heads
        return [head for bank in self.banks_of(self.rounded(self.vector)) for head in bank.unstack()]

    def rounded(self, vector: mx.array) -> mx.array:
        """As it is stored."""
        steps = mx.where(self.steps > 0, self.steps, 1.0)
        return mx.where(self.steps > 0, mx.round(vector / steps) * steps, vector)

    def banks_of(self, vector: mx.array) -> list[Bank]:
        """The heads of all layers by other numbers."""
        banks, at = list[Bank](), 0
        for bank, mean in zip(self.banks, self.means, strict=True):
            other, p = copy(bank), HeadArrays()
            for name in _NAMES:
                x = bank.parameters[name]
                p[name] = vector[at : at + x.size].reshape(x.shape)
                at += x.size
            other.parameters = p | {"bias": p["bias"] - (p["keys"] @ mean)[..., 0]}
            banks.append(other)
        return banks

    def caches(self, banks: Sequence[Bank], batch: _Batch) -> list[Any]:
        """One a layer, behind these heads."""
        remaining = iter(banks)
        return [
            JointCache(next(remaining), cache.context) if isinstance(cache, NectarCache) else cache
            for cache in self.full(batch)
        ]

    def full(self, batch: _Batch) -> list[Any]:
        """One a layer, behind all keys."""
        return self.context.make_cache(ahead=batch.ahead)

    def finals_of(self, batch: _Batch, conversations: Sequence[Conversation]) -> mx.array:
        """What the last layer gives behind the full cache where answers are drawn, [R, E]."""
        if any(id(c) not in self.finals for c in conversations):
            _, last = forward(self.runner, batch.tokens, self.full(batch))
            ends = np.cumsum([len(c.answer) for c in conversations])[:-1].tolist()
            rows = mx.split(batch.rows(last), ends)
            mx.eval(rows)
            self.finals |= {id(c): x for c, x in zip(conversations, rows, strict=True)}
        return mx.concatenate([self.finals[id(c)] for c in conversations])

    def gradient(self, batch: _Batch, conversations: Sequence[Conversation]) -> mx.array:
        """Of the mean divergence of a batch by the vector, [P]."""
        banks = self.banks_of(self.rounded(self.vector))
        truth = self.finals_of(batch, conversations)
        before, last = forward(self.runner, batch.tokens, self.caches(banks, batch))
        change = batch.spread(self.by_rows(truth, batch.rows(last)) / len(truth)).astype(last.dtype)
        caches, gradients = self.caches(banks, batch), list[mx.array]()

        def differentiated(layer: int) -> tuple[Call, list[mx.array]]:
            cache = caches.pop()
            heads = isinstance(cache, NectarCache)
            return partial(_through, self.runner, layer, cache), [cache.bank.parameters[n] for n in _NAMES if heads]

        means = iter(reversed(self.means))
        for _, of_layer in backward(self.runner, before, change, differentiated):
            if of_layer:
                keys, values, bias = of_layer
                keys = keys - bias[..., None] * next(means).swapaxes(1, 2)
                gradients = [*(g.reshape(-1) for g in (keys, values, bias)), *gradients]
        return mx.concatenate(gradients)

    def by_rows(self, truth: mx.array, rows: mx.array) -> mx.array:
        """The gradient of the sum of divergences by what the last layer gives, [R, E]."""
        parts, step = list[mx.array](), self.rows_at_once
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            parts.append(mx.grad(self.divergences)(rows[part], truth[part]))
            mx.eval(parts)
        return mx.concatenate(parts)

    def divergences(self, rows: mx.array, truth: mx.array) -> mx.array:
        """The sum of KL(truth ‖ rows) over rows [R, E] of what the last layer gives."""
        ours, full = (log_probabilities(self.runner.logits(x[None])) for x in (rows, truth))
        return (mx.exp(full) * (full - ours)).sum()

    @cached_property
    def side_by_side(self) -> int:
        """Conversations of a step: as many as the machine's memory holds the scores of, in one layer."""
        longest = max(c.fed_tokens for c in (*self.training, *self.held_out))
        nodes = max(bank.parameters["bias"].shape[1] for bank in self.banks)
        scores = self.kind.run.geometry.n_heads * longest * (nodes + longest)
        return max(1, min(device().distillation_batch, device().distillation_scores // scores))

    @cached_property
    def rows_at_once(self) -> int:
        """Rows whose logits are held at a time."""
        logits = self.runner.logits(mx.zeros((1, 1, self.runner.width)))  # never evaluated
        return max(1, device().max_scores // logits.shape[-1])

    def divergence(self, vector: mx.array) -> float:
        """The mean divergence over conversations that are held out."""
        total, banks = 0.0, self.banks_of(self.rounded(vector))
        for part in _together(self.held_out, most=self.side_by_side):
            batch = _Batch(part)
            _, last = forward(self.runner, batch.tokens, self.caches(banks, batch))
            rows, truth, step = batch.rows(last), self.finals_of(batch, part), self.rows_at_once
            for start in range(0, len(rows), step):
                part_sum = self.divergences(rows[start : start + step], truth[start : start + step])
                total += float(part_sum.item())  # type: ignore[arg-type]
        return total / sum(len(c.answer) for c in self.held_out)


def _through(runner: LayerRunner, layer: int, cache: Any, hidden: mx.array, *parameters: mx.array) -> mx.array:
    if parameters:
        cache.bank.parameters = dict(zip(_NAMES, parameters, strict=True))
    return runner.layer(layer, hidden, cache)


def _units(kind: KindFit) -> list[Units]:
    """Those that the heads of each layer are trained in; each rank tells those of its layers."""
    K, scale, own = kind.run.geometry.n_kv_heads, kind.run.geometry.scale, dict[int, HeadArrays]()
    for layer in kind.layers:
        samples = kind.data.train.heads(range(layer * K, layer * K + K), kind.order[:UNIT_SAMPLES])
        own[layer] = Units.of(samples, scale=scale)._asdict()
    return [Units(**units) for _, units in sorted(kind.run.world.heads(own).items())]


def _grids(head: HeadArrays) -> HeadArrays:
    """The step of each number of a head, 0 where it is not rounded."""
    grids = {name: mx.zeros(x.shape) for name, x in head.items()}
    found = GridMatrix.of_all([np.array(head[name].astype(mx.float32)) for name in _MATRICES])
    for name, matrix in zip(_MATRICES, found, strict=True):
        steps = mx.array(np.exp2(matrix.exponents / 2).astype(np.float32))[:, None]
        grids[name] = mx.broadcast_to(steps, head[name].shape)
    return grids


def _together(conversations: Sequence[Conversation], *, most: int) -> list[list[Conversation]]:
    """Conversations of about one length, at most so many side by side."""
    ordered = sorted(conversations, key=lambda c: c.fed_tokens)
    groups = batches(len(ordered), most=most, shares=1)
    return [[ordered[number] for number in group] for group in groups]


def _batches(conversations: Sequence[Conversation], *, most: int, seed: int) -> Iterator[list[Conversation]]:
    """Without end, each conversation once in a round."""
    random, groups = np.random.default_rng(seed), _together(conversations, most=most)
    while True:
        for i in random.permutation(len(groups)):
            yield groups[i]
