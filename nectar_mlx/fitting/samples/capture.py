"""Replaying conversations: what attention sees in them becomes samples.

A conversation is replayed (teacher-forced) in one pass behind the context. Every attention call keeps its post-RoPE
queries, the exact (o, L) of the context and the (o, L) of the live tokens: what the regression needs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core import attention
from ...core.attention import Partial
from ...core.device import device
from ...core.gather import take
from ...heads import Exact
from ...heads.together import Together
from ...mlxlm.kept import attention_caches
from .. import finite
from ..distributed import World, parts
from ..prefill import Context
from ..run import FitRun
from .conversation import Conversation, Split, furthest_ahead
from .sample_store import DeviceSampleStore, Samples, SampleStore
from .study_cache import StudyCache

_SMALL = 4096.0  # a sixteenth of what float16 holds
_FEWEST_TOKENS = 256  # that are replayed together
_FEWEST_HELD_OUT = 64  # samples a head


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What heads are fitted to: the conversations about a context, and what attention saw in them, by head.

    train, held_out: samples of the conversations of these splits, heads numbered layer by layer, the sliding-window
    layers left out. parts: all heads, divided whatever the number of ranks; each has the samples of some parts. finals:
    by the number of a check's conversation what the last layer gave where its answer was drawn, [answer, E], as far as
    that was kept.
    """

    context: Context
    conversations: Sequence[Conversation]
    train: SampleStore
    held_out: SampleStore
    parts: Sequence[Sequence[int]]
    finals: Mapping[int, mx.array] = field(default_factory=dict)

    @property
    def furthest(self) -> int:
        """How many positions further on than right behind the text a conversation began."""
        return furthest_ahead(self.conversations)

    def fetch(self, heads: Collection[int], world: World) -> None:
        """Gets the samples of heads that this rank does not have from those that do. All ranks must call it."""
        holders = {head: world.owner(number) for number, part in enumerate(self.parts) for head in part}
        for store in (self.train, self.held_out):
            missing = {head for head in heads if not store.has(head)}
            for head in sorted({head for of in world.values(sorted(missing)) for head in of}):
                holds = holders[head] == world.rank
                sent = world.arrays(store.heads([head])._asdict() if holds else {})
                if head in missing:
                    store.receive(head, Samples(**sent[holders[head]]))


def capture(
    run: FitRun, context: Context, conversations: Sequence[Conversation], *, tokens: int | None = None
) -> Collected:
    """The samples of conversations. tokens: how many are replayed together (default: as many as is quick)."""
    wanted = run.n_samples(run.n_heads)
    spare = held_out_count(wanted)
    folder = spill(run, wanted + spare)
    train = empty(run, wanted, folder and folder / "train.samples")
    held_out = empty(run, spare, folder and folder / "held_out.samples")
    replayed = [c for c in conversations if c.split != "check"]
    with run.progress("capturing attention", sum(c.fed_tokens for c in replayed)) as done:
        replay(
            run.model,
            context,
            replayed,
            {"train": train, "held_out": held_out},
            n_heads=run.geometry.n_heads,
            tokens=tokens,
            progress=done,
            world=run.world,
            shares=run.shares(run.n_heads, context.length),
        )
    return collected(run, context, conversations, train, held_out)


def collected(
    run: FitRun, context: Context, conversations: Sequence[Conversation], train: SampleStore, held_out: SampleStore
) -> Collected:
    """What was collected, if all of it is finite."""
    for bank in context.banks:
        bank.forget_half()
    broken = run.world.values(sorted(train.not_finite | held_out.not_finite))
    finite.check_heads("capturing attention", {head for of in broken for head in of}, run.geometry)
    K, layers = run.geometry.n_kv_heads, parts(range(len(context.banks)), run.shares(run.n_heads, context.length))
    return Collected(
        context=context,
        conversations=conversations,
        train=train,
        held_out=held_out,
        parts=[[layer * K + k for layer in part for k in range(K)] for part in layers],
    )


def held_out_count(train: int) -> int:
    """How many samples are held out where so many are trained on."""
    return max(train // 10, _FEWEST_HELD_OUT)


def spill(run: FitRun, count: int) -> Path | None:
    """A folder for so many samples of every head, where they do not fit the memory."""
    store = SampleStore if device().linux_cpu else DeviceSampleStore
    fits = store.nbytes(run.n_heads, count, run.geometry.head_dim) <= run.memory
    return None if fits else run.checkpoint.spill()


def empty(run: FitRun, count: int, folder: Path | None) -> SampleStore:
    """A store for so many samples of every head, in memory or in a folder."""
    if folder or device().linux_cpu:
        return SampleStore(run.n_heads, count, run.geometry.head_dim, folder=folder)
    return DeviceSampleStore(count)


class CaptureCache(StudyCache):
    """Keeps the samples of every call: of one, or of as many as there are layers that share its keys.

    preamble: how many of the context's first tokens are counted to the live ones, for other heads will stand for them.
    So are other texts in view.
    """

    def __init__(self, bank: Exact | Together, context: int, *rest: Any, preamble: int = 0):
        self._together = bank if isinstance(bank, Together) else None
        own: Any = bank.own if isinstance(bank, Together) else bank
        super().__init__(own.part(slice(preamble, None)), context, *rest)
        self.captured: list[Samples] = []
        self._preamble = own.part(slice(preamble)) if preamble else None
        # Outputs are means of values: float16 holds them if it holds the values, with room for those to come.
        self._type = mx.float16 if own.largest_value < _SMALL else mx.float32

    def over_live(self, queries: mx.array, *rest: Any, **options: Any) -> Partial:
        live = super().over_live(queries, *rest, **options)
        if self._together is not None:
            return self._together.all_but_own(queries, live)
        if self._preamble is None:
            return live
        merged = attention.merge(self._preamble.over(queries), live)
        return merged._replace(output=merged.output.astype(live.output.dtype))

    def see(self, queries: mx.array, context: Partial, live: Partial) -> None:
        output, live_output = context.output.astype(self._type), live.output.astype(self._type)
        self.captured.append(Samples(queries, output, live_output, context.log_normalizer, live.log_normalizer))
        if queries.shape[2] > 1:
            mx.async_eval(self.captured[-1])  # or all layers' would wait in float32

    def take(self, places: np.ndarray) -> Samples:
        """The samples of these places [B, T], by KV head: [K, samples, ...]; those of a token lie side by side. Where
        several layers share the keys, a token's are those of one of them, in turn."""
        tokens, turns, parts = np.flatnonzero(places).astype(np.int32), len(self.captured), list[Samples]()
        for turn, captured in enumerate(self.captured):
            K, (B, H, T) = len(self.bank.sizes), captured.queries.shape[:3]
            split = (x.reshape(B, K, H // K, T, *x.shape[3:]) for x in captured)
            grouped = (x.swapaxes(0, 1).swapaxes(2, 3).reshape(K, B * T, H // K, *x.shape[4:]) for x in split)
            chosen = mx.array(tokens[turn::turns])
            parts.append(Samples(*(take(x, chosen, axis=1).reshape(K, -1, *x.shape[3:]) for x in grouped)))
        return parts[0] if turns == 1 else Samples(*(mx.concatenate(list(x), axis=1) for x in zip(*parts, strict=True)))


class ReplayBatch(NamedTuple):
    """Conversations of about one length that are replayed together: tokens [B, T], right-padded, and for each store
    the places [B, T] whose samples it keeps."""

    conversations: list[Conversation]
    tokens: mx.array
    places: list[np.ndarray]

    @property
    def ahead(self) -> list[int]:
        return [c.ahead for c in self.conversations]


def replay_batches(
    conversations: Sequence[Conversation], stores: Mapping[Split, SampleStore], *, group: int, tokens: int
) -> list[ReplayBatch]:
    """Conversations in batches of at most so many tokens, the longest first, so that little is padding.

    stores: of each split; each keeps as many samples as it has room for, `group` a token, of tokens drawn at random
    from all. Conversations of other splits are replayed and give none. The last token of an answer was never fed to
    the model: no sample.
    """
    ordered = sorted(conversations, key=lambda c: -len(c.prompt) - len(c.answer))
    fed = {split: sum(c.fed_tokens for c in ordered if c.split == split) for split in stores}
    chance = np.random.default_rng(0)
    batches, start = [], 0
    while start < len(ordered):
        longest = len(ordered[start].prompt) + len(ordered[start].answer)
        batch = ordered[start : start + max(1, tokens // longest)]
        start += len(batch)
        sequences = [c.prompt + c.answer for c in batch]
        lengths = np.array([c.fed_tokens for c in batch])[:, None]
        splits = np.array([c.split for c in batch])[:, None]
        drawn, fed_places = chance.random((len(batch), longest)), np.arange(longest)[None] < lengths
        places = [
            fed_places & (splits == split) & (drawn * group * fed[split] < store.capacity)
            for split, store in stores.items()
        ]
        padded = mx.array([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
        batches.append(ReplayBatch(batch, padded, places))
    return batches


def replay(
    model: nn.Module,
    context: Context,
    conversations: Sequence[Conversation],
    stores: Mapping[Split, SampleStore],
    *,
    n_heads: int,
    tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    world: World | None = None,
    shares: int = 1,
) -> None:
    """Replays conversations behind the context; what attention sees goes into the stores of their splits.

    n_heads: of queries. tokens: how many are replayed together, about; default: as many as is quick. progress is told
    how many are done. world: whose ranks share the work; each gets the samples of its layers, which are divided into so
    many shares.
    """
    group = n_heads // len(context.banks[0].sizes)
    tokens = tokens or together(context, n_heads)
    done, world = 0, world or World()
    batches = replay_batches(conversations, stores, group=group, tokens=tokens)
    for first in range(0, len(batches), world.size):
        share, capturing, places = batches[first : first + world.size], list[CaptureCache](), list[np.ndarray]()
        if world.rank < len(share):
            batch = share[world.rank]
            make = partial(CaptureCache, preamble=context.preamble)
            caches = context.make_cache(make, ahead=batch.ahead)
            capturing = [c for _, c in attention_caches(caches) if isinstance(c, CaptureCache)]
            model(batch.tokens, cache=caches)  # its logits are never evaluated
            mx.async_eval([c.captured for c in capturing])
            places = batch.places
        taken = list[dict[str, mx.array]]()
        for rank in range(world.size):
            layers = [layer for layer in range(len(context.banks)) if world.owner(layer % shares) == rank]
            of_all = world.arrays(_taken(capturing, stores.values(), places, layers))
            if rank == world.rank:
                taken = of_all
        for batch, arrays in zip(share, taken, strict=False):
            _keep(arrays, stores.values(), batch.places, group=group)
        mx.eval([c.captured for c in capturing])  # not more than a batch is under way
        done += sum(c.fed_tokens for batch in share for c in batch.conversations)
        progress(done)


def together(context: Context, n_heads: int) -> int:
    """How many tokens it is quick to replay together."""
    return max(_FEWEST_TOKENS, device().replay_scores // (n_heads * len(context.prefix)))


def record(cache: CaptureCache, stores: Collection[SampleStore], places: Sequence[np.ndarray], *, group: int) -> None:
    """Writes what a layer's cache saw into each store, from its places [B, T]: `group` samples a token."""
    _keep(_taken([cache], stores, places, [0]), stores, places, group=group)


def _taken(
    caches: Sequence[CaptureCache], stores: Iterable[SampleStore], places: Iterable[np.ndarray], layers: Sequence[int]
) -> dict[str, mx.array]:
    """What the caches of these layers saw in the places of each store, by store, layer and field."""
    taken: dict[str, mx.array] = {}
    for number, (store, chosen) in enumerate(zip(stores, places, strict=False)):
        if store.full or not chosen.any():
            continue
        for layer in layers:
            samples = caches[layer].take(chosen)
            mx.async_eval(samples)
            taken |= {f"{number}.{layer}.{name}": x for name, x in samples._asdict().items()}
    return taken


def _keep(
    taken: Mapping[str, mx.array], stores: Iterable[SampleStore], places: Iterable[np.ndarray], *, group: int
) -> None:
    """Writes what was taken into the stores, which count all samples, whichever rank keeps them."""
    seen: dict[tuple[int, int], dict[str, mx.array]] = {}
    for key, x in taken.items():
        owner, at, name = key.split(".")
        seen.setdefault((int(owner), int(at)), {})[name] = x
    for number, (store, chosen) in enumerate(zip(stores, places, strict=True)):
        if store.full:
            continue
        for (of, layer), fields in seen.items():
            if of == number:
                samples = Samples(**fields)
                store.add(layer * samples.queries.shape[0], samples)
        store.advance(group * int(chosen.sum()))
