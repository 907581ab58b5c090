"""Fitting heads that stand for the keys that are not read exactly: what is common to the kinds of `heads.HybridHead`.

They are fitted as any kind is, to the samples that `thresholds.split` makes.
"""

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from ...errors import NectarError
from ...heads import Bank, HeadArrays
from ...heads.hybrid import ANCHORS, EVERYTHING, SINKS, anchor_positions, middle
from ...retrieval import EXACT_FRACTION, sketch, sources
from ...retrieval.bank import hybrid_banks
from ...retrieval.router import routers
from ...store.kv_file import KeyFile
from ...store.tensor_file import Arrays
from ..prefill import Context
from ..run import ROUTER_SAMPLES, FitRun
from ..samples import thresholds
from ..samples.sample_store import Samples
from .base import KindFit

_FEWEST_TOKENS = 4 * ANCHORS
_UNREAD_WEIGHT = 0.02  # of errors with nothing read, where bytes are shared out


class HybridFit(KindFit):
    """Of the kinds that are kept with a file of exact keys; see `key_file`."""

    @classmethod
    def check(cls, run: FitRun, context: Context) -> None:
        if context.length < _FEWEST_TOKENS:
            raise NectarError(
                f"kind {run.config.kind} needs a text of at least {_FEWEST_TOKENS} tokens: use quadrature"
            )

    def prepare(self) -> None:
        _ = self.sketch

    @cached_property
    def order(self) -> np.ndarray:
        """Shuffled by token: its heads read the same keys."""
        group = self.run.group
        tokens = self.shuffled(self.data.train.count // group)
        return (tokens[:, None] * group + np.arange(group)).reshape(-1)

    def training_samples(self, heads: Sequence[int], count: int | None = None) -> Samples:
        whole = count and count // self.run.group * self.run.group  # samples of whole tokens
        return self._split(super().training_samples(heads, whole), heads, thresholds.UNREAD, group=self.run.group)

    def held_out_samples(self, heads: Sequence[int]) -> Samples:
        return self._split(super().held_out_samples(heads), heads, thresholds.UNREAD, group=self.run.group)

    def judge(self, bank: Bank, samples: Samples, metric: mx.array) -> np.ndarray:
        """Errors where keys are read, and a little of those where none is: heads that copy err most without
        retrieval, and need their bytes least when they read."""
        unread = np.array(samples.queries[0, :, -1] >= EVERYTHING)  # the same samples of all heads
        errors = np.zeros(len(bank.sizes))
        for which, weight in ((~unread, 1.0), (unread, _UNREAD_WEIGHT)):
            if which.any():
                errors += weight * super().judge(bank, samples.take(mx.array(np.flatnonzero(which))), metric)
        return errors

    @cached_property
    def trained_positions(self) -> mx.array:
        """The positions of the context that training looks at: all of them."""
        return mx.arange(self.length)

    @property
    def repeat(self) -> float:
        """How many keys of the middle each of the trained ones stands for."""
        return (self.length - ANCHORS) / (self.trained_positions.size - ANCHORS)

    def selector(self, heads: Sequence[int]) -> sketch.Sketch:
        """What chooses among the trained positions, of some heads."""
        positions = self.trained_positions
        inside = np.array(positions)[middle(positions.size)] - SINKS
        at = [divmod(head, self.run.geometry.n_kv_heads) for head in heads]
        return sketch.load(self.sketch, at, scale=self.run.geometry.scale, keys=inside)

    def keys_and_values(self, heads: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Exact keys and values [M, n, D] of some heads."""
        at = [divmod(head, self.run.geometry.n_kv_heads) for head in heads]
        keys = mx.stack([self.banks[layer].parameters["keys"][k] for layer, k in at])
        values = mx.stack([self.banks[layer].parameters["values"][k] for layer, k in at])
        return keys, values

    def anchors(self, head: int) -> HeadArrays:
        """The exact keys and values of the first and last tokens."""
        at = mx.array(anchor_positions(self.length))
        keys, values = self.keys_and_values([head])
        return {"anchor_keys": keys[0, at].astype(mx.float32), "anchor_values": values[0, at].astype(mx.float32)}

    def _split(self, samples: Samples, heads: Sequence[int], unread: float, *, group: int = 1) -> Samples:
        keys, values = self.keys_and_values(heads)
        return thresholds.split(
            samples,
            keys[:, self.trained_positions],
            values[:, self.trained_positions],
            self.selector(heads),
            scale=self.run.geometry.scale,
            seed=self.run.config.seed,
            unread=unread,
            group=group,
            repeat=self.repeat,
        )

    @cached_property
    def sketch(self) -> Arrays:
        """The router's index, as the file of keys holds it."""
        K, train = self.run.geometry.n_kv_heads, self.data.train
        # At random: samples at a fixed distance may all be one query head's.
        chosen = np.sort(self.shuffled(train.count)[:ROUTER_SAMPLES])
        own = {str(i): train.heads(range(i * K, i * K + K), chosen).queries.astype(mx.float32) for i in self.layers}
        every = {layer: x for part in self.run.world.arrays(own) for layer, x in part.items()}
        queries = [np.array(every[str(layer)]) for layer in range(len(self.banks))]
        keys = [bank.parameters["keys"] for bank in self.banks]
        return sketch.build(keys, queries, scale=self.run.geometry.scale)

    def key_file(self, text: str, *, nectar: str) -> KeyFile:
        """The file of exact keys that belongs to the .nectar of this digest."""
        context: Context = self.data.context
        layers = [(bank.parameters["keys"], bank.parameters["values"]) for bank in context.banks]
        small = self.sketch | sources.arrays(self.run.tokenizer, text, context.prefix)
        return KeyFile.of(layers, small=small, nectar=nectar)

    def reading_banks(self, banks: Sequence[Bank], keys: KeyFile) -> Sequence[Bank]:
        """The banks as they answer unless a request says otherwise: some keys read exactly, if there are enough."""
        selectors = routers(keys, scale=self.run.geometry.scale)
        return hybrid_banks(banks, keys, selectors, exact_fraction=EXACT_FRACTION, group=self.run.group) or banks
