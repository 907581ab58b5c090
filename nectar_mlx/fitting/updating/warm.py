"""Heads that start from those of a file: nodes where their keys are now, and more for the tokens that are new."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ...core import attention
from ...core.gather import take
from ...heads import Bank, HeadArrays, Quadrature, Size
from ...mlxlm.positions import shifted
from ..kinds.quadrature import QuadratureFit
from ..prefill import Context
from ..run import FitRun
from ..samples.capture import Collected
from ..samples.sample_store import Samples
from ..solve import attention_matching, regression
from .base import FileContents
from .revision import Run

_SAME = 1.1  # times the error that a head had: it is left as it is
_PROBE = 1024  # samples by which the use of nodes and tokens is told


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What an update takes of a fit.

    kept: samples of conversations that were kept. new: samples of new conversations, for the share of the text that is
    new. steps, rate: of the regression. few: steps of heads that are smaller than the mean, which err the most and take
    the least time; their rate is a fit's.
    """

    kept: float
    new: float
    steps: float
    rate: float
    few: float


class WarmFit(QuadratureFit):
    """Every head starts from the nodes of a file, of which the least used make room where there is none, and from
    Attention Matching of the new tokens' keys; or, where that errs less on held-out samples, from Attention Matching of
    the whole text.

    nodes: of every head, their keys relative to the context's offsets. places: of the new tokens. sizes, rooms: of
    every head how many nodes it gets, and how many of them are for the new tokens. effort: how long heads are trained.
    """

    def __init__(
        self,
        run: FitRun,
        data: Collected,
        *,
        nodes: Sequence[HeadArrays],
        places: Sequence[int],
        sizes: Sequence[Size],
        rooms: Sequence[int],
        effort: Effort,
    ):
        super().__init__(run, data)
        self.nodes, self.places, self.rooms = nodes, mx.array(np.array(places, np.int32)), rooms
        self.effort, self._mean = effort, sum(m for (m,) in sizes) / len(sizes)
        self._trains = self.trained(sizes)

    def steps(self, sizes: Sequence[Size]) -> int:
        return math.ceil((self.effort.few if self._few(sizes) else self.effort.steps) * super().steps(sizes))

    def rate(self, sizes: Sequence[Size]) -> float:
        return (1.0 if self._few(sizes) else self.effort.rate) * super().rate(sizes)

    def _few(self, sizes: Sequence[Size]) -> bool:
        """Whether all of them are smaller than the mean."""
        return max(m for (m,) in sizes) < self._mean

    def match(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        if not any(
            self._trains[i] for i in heads
        ):  # as in a fit: what is not trained on is not better than a new start
            return super().match(heads, counts)
        warm, fresh = self._warm(heads, counts), super().match(heads, counts)
        held_out, scale = self.held_out_samples(heads), self.run.geometry.scale
        errors = [np.array(regression.errors(Quadrature.stack(x, scale=scale), held_out)) for x in (warm, fresh)]
        return [w if kept else f for w, f, kept in zip(warm, fresh, errors[0] <= errors[1], strict=True)]

    def ranked(self, index: int) -> mx.array:
        layer, k = divmod(index, self.run.geometry.n_kv_heads)  # not of all heads: few may start so
        keys = self.banks[layer].parameters["keys"][k : k + 1]
        samples = self.ranking_samples([index])
        return attention_matching.importance(samples, keys, scale=self.run.geometry.scale)[0]

    def _warm(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        rooms = [max(self.rooms[i], count - self.nodes[i]["bias"].size) for i, count in zip(heads, counts, strict=True)]
        kept = [self._most_used(i, count - room) for i, count, room in zip(heads, counts, rooms, strict=True)]
        if not self.places.size:
            return kept
        new = self._new(heads, rooms)
        return [{name: mx.concatenate([a[name], b[name]]) for name in a} for a, b in zip(kept, new, strict=True)]

    def _most_used(self, index: int, count: int) -> HeadArrays:
        """So many of a head's nodes, those that take the most attention."""
        nodes = self.nodes[index]
        if count >= nodes["bias"].size:
            return nodes
        queries = self.training_samples([index], _PROBE).queries[0].astype(mx.float32)
        scores = self.run.geometry.scale * queries @ nodes["keys"].T + nodes["bias"]
        kept = attention_matching.most_important(mx.softmax(scores, axis=-1).mean(0), count)
        return {name: x[kept] for name, x in nodes.items()}

    def _new(self, heads: Sequence[int], rooms: Sequence[int]) -> list[HeadArrays]:
        """Attention Matching for the new tokens alone, so many nodes for each head."""
        scale, samples = self.run.geometry.scale, self.matching_samples(heads)
        keys, values, outputs, logs = [], [], [], []
        for at, (index, room) in enumerate(zip(heads, rooms, strict=True)):
            layer, k = divmod(index, self.run.geometry.n_kv_heads)
            own = self.banks[layer].parameters
            own_keys, own_values = (take(own[name][k], self.places).astype(mx.float32) for name in ("keys", "values"))
            part = attention.exact(samples.queries[at : at + 1], own_keys[None], own_values[None], scale=scale)
            one = Samples(*(x[at : at + 1] for x in samples))._replace(
                output=part.output, log_normalizer=part.log_normalizer
            )
            weights = attention_matching.importance(one, own_keys[None], scale=scale)[0]
            chosen = attention_matching.most_important(weights, room)
            keys.append(own_keys[chosen])
            values.append(own_values[chosen])
            outputs.append(part.output)
            logs.append(part.log_normalizer)
        samples = samples._replace(output=mx.concatenate(outputs), log_normalizer=mx.concatenate(logs))
        matched = attention_matching.match(samples, keys, values, scale=scale)
        everything = [room == self.places.size for room in rooms]
        exact = [{"keys": k, "values": v, "bias": mx.zeros(k.shape[0])} for k, v in zip(keys, values, strict=True)]
        return [e if whole else m for e, m, whole in zip(exact, matched, everything, strict=True)]

    def settle(self, file: FileContents) -> None:
        """Leaves heads as they are that answer the new text as well as they did the old one."""
        K = self.run.geometry.n_kv_heads
        for layer, bank in enumerate(file.banks if file.errors else ()):
            heads = range(layer * K, layer * K + K)
            errors = np.array(regression.errors(bank, self.held_out_samples(heads)))
            for index, head, error in zip(heads, bank.unstack(), errors, strict=True):
                if error <= _SAME * file.errors[index]:
                    self.settled[index] = head


def moved_nodes(run: FitRun, banks: Sequence[Bank], context: Context, kept: Sequence[Run]) -> list[HeadArrays]:
    """A file's nodes where the keys that they stand for are now, relative to the context's offsets: of all the moves
    that tokens made, each node makes the one that brings it nearest to a key that made it."""
    places: dict[int, list[int]] = {}
    for start, end, by in kept:
        places.setdefault(by, []).extend(range(start, end))
    if list(places) == [0]:
        return [head for bank in banks for head in bank.unstack()]
    heads: list[HeadArrays] = []
    for layer, bank, exact in zip(run.geometry.fitted, banks, context.banks, strict=True):
        moves = [_at(run, layer, bank, by) for by in places]
        own = [take(exact.parameters["keys"], mx.array(at), axis=1) for at in places.values()]
        distances = [_nearest(keys, others) for keys, others in zip(moves, own, strict=True)]
        best = mx.argmin(mx.stack(distances), axis=0)[..., None]
        keys = moves[0]
        for number, moved in enumerate(moves):
            keys = mx.where(best == number, moved, keys)
        heads += replace(bank, parameters=bank.parameters | {"keys": keys}).unstack()
        mx.eval([head["keys"] for head in heads])
    return heads


def _at(run: FitRun, layer: int, bank: Bank, by: int) -> mx.array:
    """A bank's keys so many positions further on."""
    keys = bank.parameters["keys"].astype(mx.float32)
    if by == 0:
        return keys
    offset = mx.array(0.0) if bank.offset is None else bank.offset.astype(mx.float32)[:, None]
    return shifted(run.model, layer, keys + offset, by) - offset


def _nearest(keys: mx.array, others: mx.array) -> mx.array:
    """The squared distance of keys [K, m, D] from the nearest of others [K, n, D] -> [K, m]."""
    others = others.astype(mx.float32)
    products = keys @ others.swapaxes(1, 2)
    return mx.square(keys).sum(-1) + (mx.square(others).sum(-1)[:, None] - 2 * products).min(-1)
