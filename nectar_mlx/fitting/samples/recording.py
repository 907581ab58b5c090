"""Samples without a replay: what attention sees while answers are sampled is what it would see in a replay.

A token of a conversation then goes through the model once. An interrupted fit feeds the tokens that it has again, in
the very steps of before, so that its samples are the same to the last bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...mlxlm.kept import attention_caches
from ..prefill import Context
from ..run import FitRun
from .capture import CaptureCache, Collected, capture, collected, empty, held_out_count
from .conversation import Conversation, Split
from .sample_store import Samples, SampleStore
from .self_study import study
from .study_cache import StepCache

_STEPS = 16  # of which samples are taken together
_SPLITS: tuple[Split, ...] = ("train", "held_out")


def collect(run: FitRun, context: Context) -> Collected:
    """Samples conversations about a context and captures what attention sees in them.

    NectarError that names the layer and head where a number is not finite.
    """
    wanted = run.n_samples(run.n_heads)
    counts: dict[Split, int] = {"train": wanted, "held_out": held_out_count(wanted)}
    # Samples come from all of the answers, of which more are kept than are wanted until all are there.
    room = 2 * SampleStore.nbytes(run.n_heads, sum(counts.values()), run.geometry.head_dim)
    if not device().record or room > run.memory or run.world.size > 1:
        return capture(run, context, study(run, context))
    recording = Recording()
    conversations = study(run, context, recording)
    stores = {split: empty(run, count, None) for split, count in counts.items()}
    for split, store in stores.items():
        recording.move(split, store)
    return collected(run, context, conversations, stores["train"], stores["held_out"])


class _Cache(CaptureCache, StepCache):
    """Of sequences that advance in step, some of which end before the others."""


class _Fed:
    """Tokens that were fed and whose samples were not taken yet: what each layer captured, step by step, and, once it
    is known, which of them belong to their conversations and of which split those are."""

    def __init__(self) -> None:
        self.captured = list[list[list[Samples]]]()
        self.places = list[np.ndarray]()
        self.splits: Sequence[Split] = ()


class Recording:
    """What attention saw in the conversations that were sampled so far (`self_study.Recorder`)."""

    def __init__(self) -> None:
        self._fed = _Fed()
        self._taken = {split: dict[int, list[Samples]]() for split in _SPLITS}  # by layer

    def make_cache(self, context: Context, *, sequences: int) -> list[Any]:
        return context.make_cache(partial(_Cache, preamble=context.preamble), sequences=sequences)

    def fed(self, caches: Sequence[Any]) -> None:
        capturing = _capturing(caches)
        self._fed.captured.append([cache.captured for cache in capturing])
        for cache in capturing:
            cache.captured = []

    def keep(self, caches: Sequence[Any], going: Sequence[Conversation], places: np.ndarray, *, last: bool) -> None:
        """last: whether the batch changes, or ends, behind these."""
        self._fed.places.append(places)
        self._fed.splits = [c.split for c in going]
        if last or len(self._fed.captured) >= _STEPS:
            self._take(_capturing(caches))

    def _take(self, capturing: Sequence[CaptureCache]) -> None:
        fed, self._fed = self._fed, _Fed()
        places = np.concatenate(fed.places, axis=1)
        for layer, cache in enumerate(capturing):
            cache.captured = [_joined(turn) for turn in zip(*(step[layer] for step in fed.captured), strict=True)]
        for split, taken in self._taken.items():
            chosen = places & (np.array(fed.splits) == split)[:, None]
            if chosen.any():
                pieces = [cache.take(chosen) for cache in capturing]
                mx.eval(pieces)
                for layer, samples in enumerate(pieces):
                    taken.setdefault(layer, []).append(samples)
        for cache in capturing:
            cache.captured = []

    def move(self, split: Split, store: SampleStore) -> None:
        """Moves the samples of a split into an empty store: as many as it holds, drawn at random."""
        taken = self._taken[split]
        total = sum(samples.queries.shape[1] for samples in taken.get(0, []))
        drawn = np.random.default_rng(0).permutation(total)[: store.capacity]
        chosen = mx.array(np.sort(drawn).astype(np.int32))
        for layer in sorted(taken):
            samples = _joined(taken.pop(layer), axis=1)
            store.add(layer * samples.queries.shape[0], samples.take(chosen) if len(drawn) < total else samples)
        store.advance(total)


def _capturing(caches: Sequence[Any]) -> list[CaptureCache]:
    return [cache for _, cache in attention_caches(caches) if isinstance(cache, CaptureCache)]


def _joined(pieces: Sequence[Samples], *, axis: int = 2) -> Samples:
    return Samples(*(mx.concatenate(list(field), axis=axis) for field in zip(*pieces, strict=True)))
