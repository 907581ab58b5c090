"""The context of one layer: some keys read exactly for every query, a head function for all others."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..core.attention import Partial, join
from ..core.device import device
from ..heads import Bank, HeadArrays
from ..heads.hybrid import ANCHORS, SINKS, HybridHead, Retrieved
from ..store.kv_file import KeyFile
from .selection import Selector


class Reading(NamedTuple):
    """The result of one call. part: [B, H, T, ...]. positions: [B, K, T, k] in the context. scores: [B, H, T, k]."""

    part: Partial
    positions: mx.array
    scores: mx.array


class LayerKeys(NamedTuple):
    """The exact keys and values of one layer."""

    file: KeyFile
    layer: int

    def read(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [K, ..., D] at positions [K, ...]."""
        return self.file.read(self.layer, np.array(positions))


class HybridBank(Bank):
    """`summary` with `count` keys a KV head and step read exactly from `keys`, chosen by `selector`.

    The query heads of a KV head share what is read, so that count bounds the keys read for one token. summary_bytes:
    of the layer's summary, as stored. group: query heads a KV head, in whose order queries come (`SampleStore`).
    """

    def __init__(
        self,
        summary: HybridHead,
        keys: LayerKeys,
        selector: Selector,
        *,
        count: int,
        summary_bytes: int = 0,
        group: int = 1,
    ):
        super().__init__(parameters=summary.parameters, sizes=summary.sizes, scale=summary.scale, offset=summary.offset)
        self.summary, self.keys, self.selector = summary, keys, selector
        self.count, self.summary_bytes, self.group = count, summary_bytes, group

    @property
    def head_dim(self) -> int:
        return self.summary.head_dim

    @property
    def step_bytes(self) -> int:
        """Bytes read for one token: keys and values, what the selector scans, and the summary."""
        rows = len(self.sizes) * self.count * self.keys.file.format.nbytes
        return rows + self.selector.step_bytes(self.count) + self.summary_bytes

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        """queries [K, N, D], those of one token's heads side by side; each row left over is read for by itself."""
        assert parameters is self.parameters, "what is retrieved cannot be differentiated"
        whole = queries.shape[1] // self.group * self.group
        batches = ((queries[:, :whole], self.group), (queries[:, whole:], 1))
        return join([self._over_rows(rows, group) for rows, group in batches if rows.shape[1]], axis=1)

    def _over_rows(self, rows: mx.array, group: int) -> Partial:
        """rows [K, N, D], `group` of one token side by side."""
        K, N, D = rows.shape
        heads = rows.reshape(K, N // group, group, D).swapaxes(1, 2).reshape(1, K * group, N // group, D)
        part = self.over(heads)
        return Partial(
            *(x.reshape(K, group, N // group, *x.shape[3:]).swapaxes(1, 2).reshape(K, N, *x.shape[3:]) for x in part)
        )

    def over(self, queries: mx.array) -> Partial:
        return self.read(queries).part

    def read(self, queries: mx.array) -> Reading:
        """queries [B, H, T, D]."""
        B, H, T, D = queries.shape
        K = len(self.sizes)
        G = H // K
        rows = queries.reshape(B, K, G, T, D).transpose(1, 0, 3, 2, 4).reshape(K, B * T, G, D)
        step = max(1, device().max_scores // (K * max(2 * self.count * D, 32 * self.count + 4 * self.keys.file.tokens)))
        readings = []
        for start in range(0, B * T, step):
            readings.append(self._read(rows[:, start : start + step]))
            mx.eval(readings[-1])
        part = join([reading.part for reading in readings], axis=1)
        positions = mx.concatenate([reading.positions for reading in readings], axis=1)
        scores = mx.concatenate([reading.scores for reading in readings], axis=1)

        def ungroup(x: mx.array) -> mx.array:
            """[K, B·T, G, ...] -> [B, H, T, ...]"""
            x = x.reshape(K, B, T, *x.shape[2:])
            return x.transpose(1, 0, 3, 2, *range(4, x.ndim)).reshape(B, H, T, *x.shape[4:])

        positions = positions.reshape(K, B, T, -1).transpose(1, 0, 2, 3)
        return Reading(Partial(*map(ungroup, part)), positions, ungroup(scores))

    def _read(self, queries: mx.array) -> Reading:
        """queries [K, N, G, D] -> part [K, N, G, ...], positions [K, N, k], scores [K, N, G, k]."""
        queries = queries.astype(mx.float32)
        anchors = self.summary.anchors(self.parameters, queries)
        choice = self.selector.choose(queries, anchors.log_normalizer, count=self.count)
        positions = choice.positions + SINKS
        keys, values = self.keys.read(positions)
        scores = (queries * self.scale) @ keys.swapaxes(-1, -2)
        retrieved = Retrieved(keys, values, scores, choice.scores, choice.threshold)
        part = self.summary.complete(queries, retrieved)
        return Reading(part, positions, self.summary.used(retrieved))


def hybrid_banks(
    banks: Sequence[Bank],
    keys: KeyFile,
    selectors: Sequence[Selector],
    *,
    exact_fraction: float,
    nbytes: int = 0,
    group: int = 1,
) -> list[HybridBank]:
    """The banks of all layers, reading at most that fraction of the context's keys at a step, anchors included.

    No banks if that leaves no key to read. nbytes: of all banks, as stored. group: query heads a KV head.
    """
    count = int(exact_fraction * keys.tokens + 1e-9) - ANCHORS
    if count < 1:
        return []
    layer_bytes, hybrids = nbytes // len(banks), []
    for layer, (bank, selector) in enumerate(zip(banks, selectors, strict=True)):
        assert isinstance(bank, HybridHead), bank.kind
        hybrids.append(
            HybridBank(bank, LayerKeys(keys, layer), selector, count=count, summary_bytes=layer_bytes, group=group)
        )
    return hybrids
