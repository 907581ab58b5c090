"""A text that was changed here and there: the file's heads are trained on from where they are, on the conversations
that were kept, whose questions are still good, and on a few about what is new."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ... import store
from ...core.clock import Clock
from ...heads import Bank, HeadArrays, Quadrature
from ...mlxlm.positions import shifted
from ...store import load
from ..kinds.quadrature import QuadratureFit
from ..prefill import Context
from ..run import FitRun
from ..samples.capture import Collected, capture
from ..samples.conversation import Conversation
from ..solve import attention_matching, regression
from ..train import merged_errors, train_heads
from .base import FileContents, Updated, converse, read, some
from .revision import Revision

STEPS = 0.5  # of a fit's
_SAMPLES = 0.5  # of a fit's
_NODES = 1.5  # for what is new, in proportion
_PROBE = 1024  # samples by which the least used nodes are found
_SAME = 1.1  # times the error that a head had: it is left as it is


class EditFit(QuadratureFit):
    """Every head starts from the nodes of a file, of which the least used make room for keys of what is new, or from
    Attention Matching where that errs less on held-out samples: a change can move all that follows it.

    nodes: of every head, their keys relative to the context's offsets. places: of the new tokens.
    """

    def __init__(self, run: FitRun, data: Collected, *, nodes: Sequence[HeadArrays], places: Sequence[int]):
        super().__init__(run, data)
        self.nodes, self.places = nodes, mx.array(np.array(places, np.int32))

    def match(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        warm, fresh = self._kept(heads, counts), super().match(heads, counts)
        held_out, scale = self.held_out_samples(heads), self.run.geometry.scale
        errors = [np.array(regression.errors(Quadrature.stack(x, scale=scale), held_out)) for x in (warm, fresh)]
        return [w if kept else f for w, f, kept in zip(warm, fresh, errors[0] <= errors[1], strict=True)]

    def _kept(self, heads: Sequence[int], counts: Sequence[int]) -> list[HeadArrays]:
        K, started = self.run.geometry.n_kv_heads, list[HeadArrays]()
        samples = self.matching_samples(heads)
        for at, (index, count) in enumerate(zip(heads, counts, strict=True)):
            nodes, (layer, k) = self.nodes[index], divmod(index, K)
            room = min(self.places.size, math.ceil(_NODES * count * self.places.size / self.length), count // 2)
            if room:
                used = _use(samples.queries[at, :_PROBE], nodes, scale=self.run.geometry.scale)
                best = attention_matching.most_important(self.importance[index][self.places], room)
                chosen, kept = self.places[best], attention_matching.most_important(used, count - room)
                own = self.banks[layer].parameters
                fresh = {"keys": own["keys"][k][chosen], "values": own["values"][k][chosen], "bias": mx.zeros(room)}
                nodes = {name: mx.concatenate([nodes[name][kept], fresh[name].astype(mx.float32)]) for name in nodes}
            started.append(nodes)
        return started


def edit(
    run: FitRun, file: FileContents, revision: Revision, study: Sequence[Conversation], *, clock: Clock
) -> Updated:
    """The file's heads, trained on."""
    context = read(run, file, revision.new)
    clock.lap("read")
    share = _SAMPLES + revision.share
    samples = int(min(1.0, share) * run.n_samples(run.n_heads))
    run = replace(run, config=replace(run.config, queries=samples, steps=math.ceil(STEPS * run.config.steps)))
    conversations = some(study, run, samples=samples)
    conversations += converse(run, context, revision, study, wanted=int(2 * revision.share * samples))
    data = capture(run, context, conversations)
    clock.lap("study")
    places = [place for start, end in revision.changed for place in range(start, end)]
    kind = EditFit(run, data, nodes=_moved(run, file, context, revision.moved), places=places)
    kind.prepare()
    if not revision.moved:
        kind.settled = _untouched(kind, file)
    heads = train_heads(kind, file.sizes, bits=file.bits)
    clock.lap("regression")
    banks = load.banks(run.layout, store.pack(run.layout, heads, offsets=context.offsets))
    report = {"samples": samples, "touched": kind.n_heads - len(kind.settled)}
    return Updated(heads=heads, errors=merged_errors(kind, banks), context=context, data=data, report=report)


def _moved(run: FitRun, file: FileContents, context: Context, by: int) -> list[HeadArrays]:
    """The file's nodes, so many positions further on, relative to the context's offsets."""
    heads: list[HeadArrays] = []
    for layer, bank in zip(run.geometry.fitted, file.banks, strict=True):
        heads += _at(run, layer, bank, by).unstack() if by else bank.unstack()
    return heads


def _at(run: FitRun, layer: int, bank: Bank, by: int) -> Bank:
    offset = mx.array(0.0) if bank.offset is None else bank.offset.astype(mx.float32)[:, None]
    keys = shifted(run.model, layer, bank.parameters["keys"] + offset, by) - offset
    return replace(bank, parameters=bank.parameters | {"keys": keys})


def _use(queries: mx.array, nodes: HeadArrays, *, scale: float) -> mx.array:
    """How much of the attention of queries [N, D] each node takes, [m]."""
    scores = scale * queries.astype(mx.float32) @ nodes["keys"].T + nodes["bias"]
    return mx.softmax(scores, axis=-1).mean(0)


def _untouched(kind: EditFit, file: FileContents) -> dict[int, HeadArrays]:
    """The heads that answer the new text as well as they did the old one."""
    K, same = kind.run.geometry.n_kv_heads, dict[int, HeadArrays]()
    if not file.errors:
        return same
    for layer, bank in enumerate(file.banks):
        heads: Any = range(layer * K, layer * K + K)
        errors = np.array(regression.errors(bank, kind.held_out_samples(heads)))
        for index, head, error in zip(heads, bank.unstack(), errors, strict=True):
            if error <= _SAME * file.errors[index]:
                same[index] = head
    return same
