"""Fitting heads that stand for what is not read: the fit as for any kind, on the rows that `training.split` makes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...errors import NectarError
from ...heads import Bank, HeadArrays, Size
from ...heads.hybrid import ANCHORS, EVERYTHING, SINKS, anchor_positions, middle
from ...heads.thresholded import TrainableThresholdedNodes
from ...retrieval import EXACT_FRACTION, sketch, sources
from ...retrieval.bank import hybrid_banks
from ...retrieval.router import routers
from ...store.kv_file import Arrays, KeyFile
from ..auto_budget import FIRST
from ..checkpoint import Plan
from ..fitter import Fitter
from ..samples.sample_store import Samples
from ..sizes import Affordable
from ..solve.initial import Init
from . import distillation, training

_SKETCHED = 2048  # captured queries that the router is made from
_LEAST = 4 * ANCHORS
_SHARPNESS = 1.0  # its logarithm, to start from
_ALONE = 0.02  # weight of errors with nothing read, where bytes are shared out


class RetrievalFitter(Fitter):
    """The kinds retrieval, completion and hybrid, and the keys that go beside them."""

    def __init__(self, model: Any, tokenizer: Any, context: Any, geometry: Any, config: Any, **options: Any):
        if len(context.prefix) < _LEAST:
            raise NectarError(f"kind {config.kind} needs a text of at least {_LEAST} tokens: use quadrature")
        if config.kind == "retrieval":  # nothing is regressed
            config = replace(config, queries=min(config.queries or _SKETCHED, _SKETCHED))
        super().__init__(model, tokenizer, context, geometry, config, **options)

    def prepare(self) -> None:
        self._sketch = self._sketched()
        if self.layout.kind == "hybrid":
            super().prepare()
            inside = np.zeros(self.length, np.float32)
            inside[middle(self.length)] = 1
            self.importance = [weights * mx.array(inside) for weights in self.importance]
        # No node is chosen for the other kinds. Rows are shuffled by token: its heads read the same keys.
        tokens = np.random.default_rng(self.config.seed).permutation(self.study.rows // self._group)
        self.rows = (tokens[:, None] * self._group + np.arange(self._group)).reshape(-1)

    @property
    def _group(self) -> int:
        """Query heads a KV head, whose rows lie side by side."""
        return self.geometry.n_heads // self.geometry.n_kv_heads

    def plan(self, affordable: Affordable, share: float | None) -> Plan:
        if self.layout.kind == "retrieval":
            return Plan([(0,)] * self.n_heads, share or FIRST)
        return super().plan(affordable, share)

    def regress(self, sizes: Sequence[Size]) -> list[HeadArrays]:
        if self.layout.kind == "retrieval":
            return [self._anchors(head) for head in range(self.n_heads)]
        heads = super().regress(sizes)
        if self.layout.kind != "completion":
            return heads
        return [self._summarised(index, head) for index, head in enumerate(heads)]

    def training_rows(self, heads: Sequence[int], count: int | None = None) -> Samples:
        whole = count and count // self._group * self._group  # rows of whole tokens
        return self._split(super().training_rows(heads, whole), heads, training.UNREAD, group=self._group)

    def held_out_rows(self, heads: Sequence[int]) -> Samples:
        whole = super().held_out_rows(heads)
        return self._split(whole, heads, training.UNREAD, group=self._group)

    def _samples(self, heads: Sequence[int]) -> Samples:
        """Rows of the whole middle, for Attention Matching."""
        rows = self._split(super()._samples(heads), heads, unread=1.0)
        return rows._replace(queries=rows.queries[..., :-1])

    def _split(self, rows: Samples, heads: Sequence[int], unread: float, *, group: int = 1) -> Samples:
        keys, values = (x[:, self._seen] for x in self._context(heads))
        return training.split(
            rows,
            keys,
            values,
            self._selector(heads),
            scale=self.geometry.scale,
            seed=self.config.seed,
            unread=unread,
            group=group,
            repeat=self._repeat,
        )

    @cached_property
    def _seen(self) -> mx.array:
        """The positions that training looks at: all, but for a completion, which weighs every key for every row."""
        inside = np.arange(self.length)[middle(self.length)]
        if self.layout.kind == "completion" and len(inside) > device().completion_keys:
            inside = np.sort(
                np.random.default_rng(self.config.seed).choice(inside, device().completion_keys, replace=False)
            )
        first, last = np.split(anchor_positions(self.length), [SINKS])
        return mx.array(np.concatenate([first, inside, last]))

    @property
    def _repeat(self) -> float:
        return (self.length - ANCHORS) / (self._seen.size - ANCHORS)

    def _selector(self, heads: Sequence[int]) -> sketch.Sketch:
        inside = np.array(self._seen)[middle(self._seen.size)] - SINKS
        at = [divmod(head, self.geometry.n_kv_heads) for head in heads]
        return sketch.load(self._sketch, at, scale=self.geometry.scale, keys=inside)

    def _context(self, heads: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Exact keys and values [M, n, D] of some heads."""
        at = [divmod(head, self.geometry.n_kv_heads) for head in heads]
        parameters = [(self.context.banks[layer].parameters, k) for layer, k in at]
        keys, values = (mx.stack([p[name][k] for p, k in parameters]) for name in ("keys", "values"))
        return keys, values

    def _anchors(self, head: int) -> HeadArrays:
        at = mx.array(anchor_positions(self.length))
        keys, values = self._context([head])
        return {"anchor_keys": keys[0, at].astype(mx.float32), "anchor_values": values[0, at].astype(mx.float32)}

    @property
    def _batch(self) -> int:
        """A completion weighs every key for every row of a batch."""
        return max(32, self.config.batch // 4) if self.layout.kind == "completion" else self.config.batch

    def judged(self, bank: Bank, rows: Samples, metric: mx.array) -> np.ndarray:
        """Errors where keys are read, and a little of those where none is: heads that copy err most alone, and need
        their bytes least when they read."""
        unread = np.array(rows.queries[0, :, -1] >= EVERYTHING)  # the same rows of all heads
        found = np.zeros(len(bank.sizes))
        for which, weight in ((~unread, 1.0), (unread, _ALONE)):
            if which.any():
                part = Samples(*(mx.take(x, mx.array(np.flatnonzero(which)), axis=1) for x in rows))
                found += weight * super().judged(bank, part, metric)
        return found

    def groups(self, sizes: Sequence[Size]) -> list[list[int]]:
        wide = [(self._seen.size // 4,)] * self.n_heads if self.layout.kind == "completion" else sizes
        return super().groups(wide)

    def start(self, group: Sequence[int], sizes: Sequence[Size], rows: Samples) -> Init:
        counts = [size[0] for size in sizes]
        make = self._remainder if self.layout.kind == "hybrid" else self._completion
        return Init.of(make(group, counts, rows))

    def _remainder(self, group: Sequence[int], counts: Sequence[int], rows: Samples) -> Bank:
        """Nodes of the whole middle; where to cut is learned from there."""
        heads = [
            nodes
            | {"cut": mx.zeros(nodes["bias"].shape), "sharpness": mx.full(nodes["bias"].shape, _SHARPNESS)}
            | self._anchors(index)
            for index, nodes in zip(group, self.matched(group, counts), strict=True)
        ]
        return TrainableThresholdedNodes.stack(heads, scale=self.layout.scale)

    def _completion(self, group: Sequence[int], counts: Sequence[int], rows: Samples) -> Bank:
        keys, values = (x[:, self._seen][:, middle(self._seen.size)].astype(mx.float32) for x in self._context(group))
        asked = np.array(rows.queries[..., :-1].astype(mx.float32))
        heads = [
            distillation.clusters(np.array(keys[i]), asked[i], count, scale=self.layout.scale, seed=self.config.seed)
            | self._anchors(index)
            for i, (index, count) in enumerate(zip(group, counts, strict=True))
        ]
        return distillation.Distilled.start(
            heads, keys, values, self._selector(group), scale=self.layout.scale, repeat=self._repeat
        )

    def _summarised(self, index: int, head: HeadArrays) -> HeadArrays:
        keys, values = (x[0, middle(self.length)] for x in self._context([index]))
        assert self.layout.bits is not None, "these kinds are not coded"
        return distillation.summarise(head, keys, values, bits=self.layout.bits)

    def _sketched(self) -> Arrays:
        K = self.geometry.n_kv_heads
        # At random: rows at a fixed distance may all be one query head's.
        rows = np.sort(np.random.default_rng(self.config.seed).permutation(self.study.rows)[:_SKETCHED])
        queries = [
            np.array(self.study.heads(range(i * K, i * K + K), rows).queries.astype(mx.float32))
            for i in range(self.n_layers)
        ]
        keys = [bank.parameters["keys"] for bank in self.context.banks]
        return sketch.build(keys, queries, scale=self.geometry.scale)

    def keys(self, text: str, *, nectar: str) -> KeyFile:
        """The file beside the .nectar of this digest."""
        layers = [(bank.parameters["keys"], bank.parameters["values"]) for bank in self.context.banks]
        small = self._sketch | sources.arrays(self.tokenizer, text, self.context.prefix)
        return KeyFile.of(layers, small=small, nectar=nectar)

    def reading(self, banks: Sequence[Bank], keys: KeyFile) -> Sequence[Bank]:
        """The banks as they answer unless a request says otherwise: some keys read exactly, if there are enough."""
        selectors = routers(keys, scale=self.geometry.scale)
        found = hybrid_banks(banks, keys, selectors, exact_fraction=EXACT_FRACTION, group=self._group)
        return found or banks
