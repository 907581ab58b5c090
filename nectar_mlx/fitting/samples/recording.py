"""Samples without a replay: what attention sees while answers are sampled is what it would see in a replay.

A token of a conversation then goes through the model once. An interrupted fit feeds the tokens that it has again, in
the very steps of before, so that its samples are the same to the last bit.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...core.device import device
from ...core.gather import take
from ...errors import NectarError
from ...mlxlm.kept import attention_caches
from ..distributed import World
from ..layers import layer_runner
from ..prefill import Context
from ..run import FitRun
from .capture import CaptureCache, Collected, collected, empty, held_out_count, replay_batches, spill, together
from .conversation import Conversation, Split, count_samples
from .sample_store import Samples, SampleStore
from .sampling import Recorder
from .self_study import study
from .study_cache import StepCache

_STEPS = 16  # of which samples are taken together
_SPLITS: tuple[Split, ...] = ("train", "held_out")


Ask = Callable[[FitRun, Context, Recorder | None], list[Conversation]]


def collect(
    run: FitRun,
    context: Context,
    ask: Ask = study,
    *,
    kept: Sequence[Conversation] = (),
    whole: bool = False,
) -> Collected:
    """Samples conversations about a context and captures what attention sees in them.

    ask: makes the conversations, and samples their answers (default: those of a fit). kept: others, whose answers are
    known. whole: all their samples are taken, not as many as a fit wants. NectarError that names the layer and
    head where a number is not finite.
    """
    wanted = run.n_samples(run.n_heads)
    folder = spill(run, wanted + held_out_count(wanted))
    recording = Recording(folder and folder / "recorded", density=1.0 if whole else run.density(context))
    conversations = [*kept, *ask(run, context, recording)]
    if whole:
        wanted = max(1, count_samples(conversations, group=run.group))
        run = replace(run, config=replace(run.config, queries=wanted))
    if kept:
        recording.replay(run, context, kept)
    counts: dict[Split, int] = {"train": wanted, "held_out": held_out_count(wanted)}
    folder = spill(run, sum(counts.values()))
    stores = {split: empty(run, count, folder and folder / f"{split}.samples") for split, count in counts.items()}
    for split, store in stores.items():
        recording.move(split, store, run.world, shares=run.shares(run.n_heads, context.length))
    data = collected(run, context, conversations, stores["train"], stores["held_out"])
    return replace(data, finals=recording.finals_of(conversations, run.world))


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
    """What attention saw in the conversations that were sampled so far (`sampling.Recorder`)."""

    def __init__(self, folder: Path | None = None, *, density: float = 1.0) -> None:
        """folder: for what is captured, where it does not fit the memory. density: share of the tokens whose samples
        are kept."""
        self._fed, self._density, self._chance = _Fed(), density, np.random.default_rng(0)
        self._finals = dict[int, list[mx.array]]()  # by the identity of a check's conversation
        self._pieces = _Pieces() if folder is None else _PiecesOnDisk(folder)

    def begin(self, first: int) -> None:
        self._pieces.group, self._chance = first, np.random.default_rng(first)

    def make_cache(self, context: Context, conversations: Sequence[Conversation]) -> list[Any]:
        make, ahead = partial(_Cache, preamble=context.preamble), [c.ahead for c in conversations]
        return context.make_cache(make, ahead=ahead)

    def fed(self, caches: Sequence[Any]) -> None:
        capturing = _capturing(caches)
        self._fed.captured.append([cache.captured for cache in capturing])
        for cache in capturing:
            cache.captured = []

    def predicted(self, going: Sequence[Conversation], last: mx.array, answering: Sequence[int]) -> None:
        kept = [i for i in answering if going[i].split == "check"]
        if kept:
            finals = take(last[:, 0], mx.array(kept, mx.int32))
            mx.eval(finals)
            for i, final in zip(kept, finals, strict=True):
                self._finals.setdefault(id(going[i]), []).append(final)

    def keep(self, caches: Sequence[Any], going: Sequence[Conversation], places: np.ndarray, *, last: bool) -> None:
        """last: whether the batch changes, or ends, behind these."""
        if self._density < 1:
            places = places & (self._chance.random(places.shape, np.float32) < self._density)
        self._fed.places.append(places)
        self._fed.splits = [c.split for c in going]
        if last or len(self._fed.captured) >= _STEPS:
            self._take(_capturing(caches))

    def replay(self, run: FitRun, context: Context, conversations: Sequence[Conversation]) -> None:
        """Sees conversations whose answers are known, behind those that were sampled; those of a check where it keeps
        what their tokens are drawn from."""
        group, tokens = run.group, together(context, run.geometry.n_heads)
        runner = layer_runner(run.model, run.geometry) if device().linux_cpu else None
        conversations = [c for c in conversations if runner or c.split != "check"]
        with run.progress("capturing attention", sum(c.fed_tokens for c in conversations)) as done:
            seen = 0
            for batch in replay_batches(conversations, {}, group=group, tokens=tokens):
                caches = self.make_cache(context, batch.conversations)
                last = runner.through(batch.tokens, caches) if runner else run.model(batch.tokens, cache=caches)
                self.fed(caches)  # a model's logits are never evaluated
                for i, c in enumerate(batch.conversations):
                    if c.split == "check":
                        finals = last[i, len(c.prompt) - 1 : c.fed_tokens]
                        mx.eval(finals)
                        self._finals[id(c)] = list(finals)
                fed = np.array([c.fed_tokens for c in batch.conversations])
                places = np.arange(batch.tokens.shape[1])[None] < fed[:, None]
                self.keep(caches, batch.conversations, places, last=True)
                seen += int(fed.sum())
                done(seen)

    def finals_of(self, conversations: Sequence[Conversation], world: World) -> dict[int, mx.array]:
        """For `Collected`: what the last layer gave where the checks' answers were drawn, whichever rank drew them."""
        kept = {i: self._finals[id(c)][: len(c.answer)] for i, c in enumerate(conversations) if id(c) in self._finals}
        mine = {str(i): mx.stack(finals) for i, finals in kept.items() if finals}
        return {int(i): finals for of_rank in world.arrays(mine) for i, finals in of_rank.items()}

    def _take(self, capturing: Sequence[CaptureCache]) -> None:
        """One layer after the other: what was captured of all of them would be there three times over."""
        fed, self._fed = self._fed, _Fed()
        places, splits = np.concatenate(fed.places, axis=1), np.array(fed.splits)
        chosen = {split: places & (splits == split)[:, None] for split in _SPLITS}
        for layer, cache in enumerate(capturing):
            steps = [step[layer] for step in fed.captured]
            cache.captured = [_joined(turn) for turn in zip(*steps, strict=True)]
            for split, of_split in chosen.items():
                if of_split.any():
                    self._pieces.add(split, layer, cache.take(of_split))
            cache.captured = []
            for step in fed.captured:
                step[layer] = []

    def move(self, split: Split, store: SampleStore, world: World, *, shares: int = 1) -> None:
        """Moves the samples of a split that all ranks have into empty stores: as many as these hold, drawn at random;
        each layer's, of so many shares, into that of its rank."""
        total = sum(world.values(self._pieces.count[split]))
        drawn = np.random.default_rng(0).permutation(total)[: store.capacity]
        chosen = mx.array(np.sort(drawn).astype(np.int32))
        for layer, samples in self._pieces.layers(split, world, shares):
            store.add(layer * samples.queries.shape[0], samples.take(chosen) if len(drawn) < total else samples)
        store.advance(total)


class _Pieces:
    """Samples of all layers, some at a time. count: of each split. group: the number of the conversations that are
    sampled together now, which one rank has."""

    def __init__(self) -> None:
        self.count, self.group = dict.fromkeys(_SPLITS, 0), 0
        self._of = {split: list[list[tuple[int, Any]]]() for split in _SPLITS}  # by layer

    def add(self, split: Split, layer: int, samples: Samples) -> None:
        """Of a layer, when those before it were added."""
        of_layers = self._of[split]
        if layer == 0:
            self.count[split] += samples.queries.shape[1]
        if layer == len(of_layers):
            of_layers.append([])
        mx.eval(samples)
        of_layers[layer].append((self.group, self._kept(samples)))

    def layers(self, split: Split, world: World, shares: int) -> Iterator[tuple[int, Samples]]:
        """The samples of all ranks in this rank's layers, in an order that does not depend on the number of ranks. They
        are no longer here then."""
        for layer in range(max(world.values(len(self._of[split])))):
            own = self._of[split].pop(0) if self._of[split] else []
            mine = {
                f"{group}.{number}.{name}": x
                for number, (group, kept) in enumerate(own)
                for name, x in self._samples(kept)._asdict().items()
            }
            parts, every = world.arrays(mine), dict[tuple[int, int], dict[str, mx.array]]()
            if world.owner(layer % shares) != world.rank:
                continue
            for part in parts:
                for key, x in part.items():
                    group, number, name = key.split(".")
                    every.setdefault((int(group), int(number)), {})[name] = x
            yield layer, _joined([Samples(**every[at]) for at in sorted(every)], axis=1)

    def _kept(self, samples: Samples) -> Any:
        return samples

    def _samples(self, kept: Any) -> Samples:
        samples: Samples = kept
        return samples


class _PiecesOnDisk(_Pieces):
    """The same, in files of a folder of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        folder.mkdir(parents=True)
        self._paths = (folder / f"{number}.npy" for number in itertools.count())

    def _kept(self, samples: Samples) -> Path:
        path = next(self._paths)
        try:
            with path.open("wb") as file:
                for x in samples:
                    np.save(file, np.array(x.astype(mx.float32)))
        except OSError as error:
            raise NectarError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def _samples(self, kept: Path) -> Samples:
        with kept.open("rb") as file:
            samples = Samples(*(mx.array(np.load(file)) for _ in Samples._fields))
        kept.unlink()
        return samples


def _capturing(caches: Sequence[Any]) -> list[CaptureCache]:
    return [cache for _, cache in attention_caches(caches) if isinstance(cache, CaptureCache)]


def _joined(pieces: Sequence[Samples], *, axis: int = 2) -> Samples:
    return Samples(*(mx.concatenate(list(field), axis=axis) for field in zip(*pieces, strict=True)))
