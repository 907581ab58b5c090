"""Contexts beyond the model's window, fitted chunk by chunk; and those beyond memory, layer by layer.

Every chunk stands behind the template's head, at the positions that follow it, as if it were the whole text; what is
asked comes behind the longest one. So no distance is larger than the model was made for, and every chunk is as near to
the question as the last (parallel context windows, arXiv 2212.10947). Every chunk gets heads of its own, fitted without
the others; `store.chunking` joins them, so that file, cache and kernel know nothing of chunks. A model expects a text
to weigh what one window weighs: the plain sum of many chunks drowns the preamble and the live tokens
(docs/log/chunks.md).

A chunk is read without those before it: what it says about them is not understood, and their order is not known.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.clock import Clock
from ..core.device import device
from ..core.progress import Progress
from ..core.types import JsonObject
from ..heads import Exact, HeadArrays, Weighed
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.kept import make_caches
from ..retrieval.recall import Calibration, Seen
from ..store import Layout, chunking, load, states
from ..store.chunking import ChunkedPrefix
from . import finite, verdict
from .budget import affordable_bytes, share_of
from .distributed import World
from .fitted_chunk import Answer, ChunkTarget, FittedChunk
from .kinds import kind_fit
from .layers import LayerRunner
from .layerwise import LayerwiseFit
from .prefill import Context, read_head, read_text
from .prefill_attention import Prefill
from .run import FitRun
from .samples.conversation import answered_checks
from .samples.recording import collect
from .sizes import plan_sizes
from .stages import fit_context
from .train import merged_errors


def fit(
    run: FitRun, prefix: Sequence[int], *, chunks: Sequence[int], layerwise: bool, clock: Clock
) -> tuple[store.Tensors, JsonObject]:
    """Fits a prefix that ends with these chunks (their lengths in tokens) -> tensors and report.

    layerwise: whether the keys and values of only one layer of a chunk may exist at a time.
    """
    runner = LayerRunner(run.model, run.geometry)  # a model that has none is refused before anything takes long
    share = share_of(run.config, run.geometry, len(prefix))
    chosen = share is None
    if share is None:
        share = _excerpt_share(run, prefix)
    whole = ChunkedPrefix(prefix, chunks)
    preamble = whole.preamble if len(chunks) > 1 else 0  # tokens whose keys are kept beside the chunks' nodes
    nbytes = affordable_bytes(
        share,
        geometry=run.geometry,
        layout=run.layout,
        n=len(prefix),
        chunks=len(chunks),
        preamble=preamble,
        at_least=chosen,
    )
    target = ChunkTarget(nbytes / len(chunks), share, preamble=preamble)
    fitted = _fit_all(run, list(whole.texts()), target, layerwise=layerwise, clock=clock)
    offsets = fitted[0].offsets
    before = read_text(run.model, prefix[:preamble], run.geometry, offsets=offsets).banks if preamble else []
    heads = list(_heads(run.layout, before, [chunk.layers for chunk in fitted]))
    windows = states.coded(fitted[-1].windows, 16)
    tensors = store.contents(
        run.layout, heads, prefix=prefix, windows=windows, offsets=offsets, shared=run.world.shared
    )
    banks = load.banks(run.layout, tensors, trusted=True)
    finite.check_banks("rounding", banks, run.geometry)
    report = {
        "budget": share,
        "layerwise": layerwise,
        "sizes": fitted[0].plan.sizes,
        "queries": fitted[-1].samples,
        "error": [error for chunk in fitted for error in chunk.errors],
        "ahead": min(chunk.ahead for chunk in fitted),
    }
    make_cache = partial(make_caches, banks, windows, whole.start)
    head = read_head(run.model, run.tokenizer, prefix, run.geometry)
    recall, own = Calibration(prefix), list[list[Any]]()
    mine = run.world.mine(fitted)
    with run.progress("checking", len(mine)) as done:
        for number, chunk in enumerate(mine, 1):
            recall.seen = []
            own.append([chunk.check(runner, make_cache, head.make_cache, recall=recall), recall.seen])
            done(number)
    checked = run.world.in_order(mine, run.world.values(own))
    checks, recall.seen = [figures for figures, _ in checked], [Seen(*seen) for _, of in checked for seen in of]
    figures = verdict.mean(checks)
    report |= figures | {"recall": recall.report(figures["kl"])} | ({"chunks": checks} if len(checks) > 1 else {})
    clock.lap("check")
    return tensors, report


def _fit_all(
    run: FitRun, texts: Sequence[Sequence[int]], target: ChunkTarget, *, layerwise: bool, clock: Clock
) -> list[FittedChunk]:
    """All chunks. All ranks fit the first one together, and then each some of the others."""
    lengths = [len(text) for text in texts]

    def fitted(run: FitRun, number: int, target: ChunkTarget) -> FittedChunk:
        text = texts[number]
        chunk_run = run.part(f"chunk-{number}", progress=partial(_chunk_progress, run.progress, number, len(texts)))
        chunk_run.claim(text, preamble=target.preamble)
        kept = FittedChunk.load(chunk_run.checkpoint, run.geometry, len(text))
        kept = FittedChunk.of_all_ranks(run.world, {number: kept} if kept else {}, run.geometry, lengths).get(number)
        chunk = kept or (_fit_layerwise if layerwise else _fit_at_once)(chunk_run, text, target, clock=clock)
        if kept is None:
            chunk.save(chunk_run.checkpoint)
            mx.clear_cache()
        if number < len(texts) - 1:
            chunk.windows = {}  # of the last chunk alone: questions follow it
        return chunk

    first = fitted(run, 0, target)
    # Which heads need most is a matter of the model; heads that are to be joined share their offsets.
    target, alone = target._replace(plan=first.plan, offsets=first.offsets), replace(run, world=World())
    own = {number: fitted(alone, number, target) for number in run.world.mine(range(1, len(texts)))}
    every = FittedChunk.of_all_ranks(run.world, own, run.geometry, lengths)
    return [first, *(every[number] for number in range(1, len(texts)))]


def _fit_layerwise(run: FitRun, text: Sequence[int], target: ChunkTarget, *, clock: Clock) -> FittedChunk:
    """A chunk, behind the preamble, layer by layer."""
    return LayerwiseFit(run, text, target).fit(clock=clock)


def _fit_at_once(run: FitRun, text: Sequence[int], target: ChunkTarget, *, clock: Clock) -> FittedChunk:
    """A chunk, behind the preamble, all of its layers at once."""
    geometry = run.geometry
    with run.progress("reading", len(text)) as done:
        context = read_text(
            run.model,
            text,
            geometry,
            prefill=run.config.prefill,
            offsets=target.offsets,
            preamble=target.preamble,
            world=run.world,
            progress=done,
        )
    clock.lap("read")
    kind, plan, heads = fit_context(
        run, context, lambda share: target.nbytes, target.share, plan=target.plan, clock=clock
    )
    one, K = replace(run.layout, n_layers=1), geometry.n_kv_heads
    offsets = [bank.offset for bank in context.banks]
    layers = run.world.shared(
        range(len(offsets)),
        lambda mine: [store.pack(one, heads[i * K : i * K + K], offsets=[offsets[i]]) for i in mine],
    )
    runner = LayerRunner(run.model, geometry)
    return FittedChunk(
        plan=plan,
        layers=layers,
        errors=merged_errors(kind, [store.unpack(one, layer)[0] for layer in layers]),
        samples=kind.data.train.count,
        ahead=kind.data.furthest,
        windows=context.windows,
        answers=[Answer.replayed(runner, context, c) for c in answered_checks(kind.data.conversations)],
    )


def _excerpt_share(run: FitRun, prefix: Sequence[int]) -> float:
    """The budget that is expected to do for the first tokens of a text, which is kept to for all of it."""
    excerpt_run, tokens = run.part("excerpt"), prefix[: device().excerpt_tokens]
    excerpt_run.claim(tokens)
    if plan := excerpt_run.kept_plan():
        return plan.share
    excerpt = read_text(run.model, tokens, run.geometry)
    kind = kind_fit(excerpt_run, collect(excerpt_run, excerpt))
    affordable = partial(
        affordable_bytes, geometry=run.geometry, layout=run.layout, n=len(excerpt.prefix), at_least=True
    )
    return plan_sizes(kind, affordable, None).share


def read_chunks(
    model: nn.Module,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    chunks: Sequence[int],
    prefill: Prefill = "dense",
    progress: Callable[[int], None] = lambda n: None,
) -> Context:
    """The exact keys and values of a prefix that ends with these chunks, or of one that has none."""
    parts, done = list[Context](), 0
    for text in ChunkedPrefix(prefix, chunks or [len(prefix)]).texts():
        offsets = parts[0].offsets if parts else ()
        before = done
        parts.append(
            read_text(
                model,
                text,
                geometry,
                prefill=prefill,
                offsets=offsets,
                progress=lambda n, before=before: progress(before + n),  # type: ignore[misc]
            )
        )
        done += len(text)
    if len(parts) == 1:
        return parts[0]
    tokens, banks = len(prefix) - sum(chunks), list[Exact]()
    preamble = read_text(model, prefix[:tokens], geometry, offsets=parts[0].offsets)
    for first, *behind in zip(preamble.banks, *(part.banks for part in parts), strict=True):
        heads = chunking.join(first.nodes(), [bank.part(slice(tokens, None)).nodes() for bank in behind])
        banks.append(Weighed.stack(heads, scale=geometry.scale, offset=first.offset))
    return Context(list(prefix), banks, parts[-1].windows, chunks)


def _heads(
    layout: Layout, preamble: Sequence[Exact], fitted: Sequence[Sequence[store.Tensors]]
) -> Iterator[HeadArrays]:
    """All heads, layer by layer, each for the whole text. preamble: a bank a layer, where there are several chunks."""
    one = replace(layout, n_layers=1)
    for layer, parts in enumerate(zip(*fitted, strict=True)):
        heads = [store.unpack(one, part)[0].unstack() for part in parts]
        yield from chunking.join(preamble[layer].nodes(), heads) if len(heads) > 1 else heads[0]


def _chunk_progress(
    progress: Progress, number: int, count: int, description: str, total: int
) -> AbstractContextManager[Callable[[int], None]]:
    return progress(description if count == 1 else f"chunk {number + 1} of {count}: {description}", total)
