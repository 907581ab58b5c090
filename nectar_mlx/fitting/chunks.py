"""Contexts beyond the model's window, fitted chunk by chunk; and those beyond memory, layer by layer.

Every chunk stands behind the template's head, at the positions that follow it, as if it were the whole text; what is
asked comes behind the longest one. So no distance is larger than the model was made for, and every chunk is as near to
the question as the last (parallel context windows, arXiv 2212.10947). Every chunk gets heads of its own, fitted with
the others out of sight; `store.chunking` joins them, so that file, cache and kernel know nothing of chunks. A model
expects a text to weigh what one window weighs: the plain sum of many chunks drowns the preamble and the live tokens
(docs/log/chunks.md).

A chunk is read without those before it: what it says about them is not understood, and their order is not known.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import store
from ..core.clock import Clock
from ..core.device import device
from ..heads import Exact, HeadArrays, Size, Weighed
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.cache import make_caches
from ..store import Layout, chunking, load
from ..store.chunking import ChunkedPrefix
from . import finite, verdict
from .checkpoint import Checkpoint, Plan
from .config import FitConfig, affordable_bytes, layout_for, share_of
from .fitted_chunk import FittedChunk, checked, heard
from .fitter import Fitter, Progress
from .layers import LayerRunner
from .layerwise import LayerwiseFitter
from .prefill import Context, read_head, read_text
from .prefill_attention import Prefill


def fit(
    model: nn.Module,
    tokenizer: Any,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    chunks: Sequence[int],
    layerwise: bool,
    config: FitConfig,
    progress: Progress,
    checkpoint: Checkpoint,
    clock: Clock,
) -> tuple[Layout, store.Tensors, dict[str, Any]]:
    """Fits a prefix that ends with these chunks (their lengths in tokens) -> heads and report.

    layerwise: whether the keys and values of only one layer of a chunk may exist at a time.
    """
    if len(chunks) > 1:
        config = replace(config, kind="quadrature")  # heads made of nodes can be joined
    share = share_of(config, geometry, len(prefix))
    chosen = share is None
    if share is None:
        share = _excerpt_share(model, tokenizer, prefix, geometry, config, progress=progress, checkpoint=checkpoint)
    layout = layout_for(config, geometry, n_layers=len(geometry.fitted))
    opening = len(prefix) - sum(chunks) if len(chunks) > 1 else 0  # tokens that are kept beside the chunks
    finely = replace(layout, bits=layout.bits or 8)  # what is kept as it was takes more than what is settled
    aside = layout.n_layers * layout.n_kv_heads * store.head_bytes(finely, (opening,)) if opening else 0
    affordable = partial(affordable_bytes, geometry=geometry, layout=layout, n=len(prefix), parts=len(chunks))
    nbytes = affordable(share, aside=aside, at_least=chosen)
    parts: list[FittedChunk] = []
    whole = ChunkedPrefix(prefix, chunks)
    for number, text in enumerate(whole.texts()):
        saved = checkpoint.part(f"chunk-{number}")
        saved.claim(asdict(config) | {"skip": opening}, text)
        part = FittedChunk.load(saved)
        if part is None:
            part = _fit_chunk(
                model,
                tokenizer,
                text,
                geometry,
                config,
                layerwise=layerwise,
                nbytes=nbytes / len(chunks),
                share=share,
                sizes=parts[0].sizes if parts else [],  # which heads need most is a matter of the model
                offsets=parts[0].offsets if parts else [],  # heads that are to be joined share them
                skip=opening,
                progress=partial(_of, progress, number, len(chunks)),
                checkpoint=saved,
                clock=clock,
            )
            part.save(saved)
            mx.clear_cache()
        if parts:
            parts[-1].windows = {}  # of the last chunk alone: questions follow it
        parts.append(part)
    offsets = parts[0].offsets
    before = read_text(model, prefix[:opening], geometry, offsets=offsets).banks if opening else []
    heads = list(_heads(layout, before, [part.layers for part in parts]))
    tensors = store.contents(layout, heads, prefix=prefix, windows=parts[-1].windows, offsets=offsets)
    banks = load.banks(layout, tensors)
    finite.check_banks("rounding", banks, geometry)
    make_cache = partial(make_caches, banks, parts[-1].windows, whole.start)
    report = {
        "budget": share,
        "layerwise": layerwise,
        "sizes": parts[0].sizes,
        "queries": parts[-1].rows,
        "error": [error for each in parts for error in each.errors],
    }
    head = read_head(model, tokenizer, prefix, geometry)
    checks = [part.fidelity(LayerRunner(model, geometry), make_cache, head.make_cache) for part in parts]
    report |= verdict.mean(checks) | ({"chunks": checks} if len(checks) > 1 else {})
    clock.lap("check")
    return layout, tensors, report


def _fit_chunk(
    model: nn.Module,
    tokenizer: Any,
    text: Sequence[int],
    geometry: Geometry,
    config: FitConfig,
    *,
    layerwise: bool,
    nbytes: float,
    share: float,
    sizes: Sequence[Size],
    offsets: Sequence[mx.array | None],
    skip: int,
    progress: Progress,
    checkpoint: Checkpoint,
    clock: Clock,
) -> FittedChunk:
    """One chunk, behind what comes before the first, in so many bytes, a share of its KV cache. sizes, offsets: of its
    heads, where they are known."""
    plan = Plan(list(sizes), share) if sizes else None
    if layerwise:
        by_layer = LayerwiseFitter(
            model,
            tokenizer,
            text,
            geometry,
            config,
            progress=progress,
            checkpoint=checkpoint,
            skip=skip,
            offsets=offsets,
        )
        return by_layer.fit(nbytes, share, plan=plan, clock=clock)
    with progress("reading", len(text)) as done:
        context = read_text(model, text, geometry, prefill=config.prefill, offsets=offsets, progress=done)
    clock.lap("read")
    fitter = Fitter(model, tokenizer, context, geometry, config, progress=progress, checkpoint=checkpoint, skip=skip)
    _, heads = fitter.fit(lambda share: nbytes, share, plan=plan, clock=clock)
    one, K = replace(fitter.layout, n_layers=1), geometry.n_kv_heads
    layers = [
        store.pack(one, heads[i : i + K], offsets=[bank.offset])
        for i, bank in zip(range(0, len(heads), K), context.banks, strict=True)
    ]
    walk = LayerRunner(model, geometry)
    return FittedChunk(
        layers=layers,
        errors=fitter.errors([store.unpack(one, layer)[0] for layer in layers]),
        rows=fitter.study.rows,
        windows=context.windows,
        answers=[heard(walk, context, c) for c in checked(fitter.conversations)],
    )


def _excerpt_share(
    model: nn.Module,
    tokenizer: Any,
    prefix: Sequence[int],
    geometry: Geometry,
    config: FitConfig,
    *,
    progress: Progress,
    checkpoint: Checkpoint,
) -> float:
    """The budget that is expected to do for the first tokens of a text, which is kept to for all of it."""
    kept = checkpoint.part("excerpt")
    if plan := kept.load_plan():
        return plan.share
    excerpt = read_text(model, prefix[: device().excerpt_tokens], geometry)
    fitter = Fitter(model, tokenizer, excerpt, geometry, config, progress=progress, checkpoint=kept)
    fitter.collect()
    n = len(excerpt.prefix)
    affordable = partial(affordable_bytes, geometry=geometry, layout=fitter.layout, n=n, at_least=True)
    return fitter.plan(affordable, None).share


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
        after = partial(_after, progress, done)
        parts.append(read_text(model, text, geometry, prefill=prefill, offsets=offsets, progress=after))
        done += len(text)
    if len(parts) == 1:
        return parts[0]
    before, banks = prefix[: len(prefix) - sum(chunks)], list[Exact]()
    opening = read_text(model, before, geometry, offsets=parts[0].offsets)
    for first, *behind in zip(opening.banks, *(part.banks for part in parts), strict=True):
        heads = chunking.join(first.nodes(), [bank.part(slice(len(before), None)).nodes() for bank in behind])
        banks.append(Weighed.stack(heads, scale=geometry.scale, offset=first.offset))
    return Context(list(prefix), banks, parts[-1].windows, chunks)


def _after(progress: Callable[[int], None], done: int, more: int) -> None:
    progress(done + more)


def _heads(layout: Layout, opening: Sequence[Exact], fitted: Sequence[Sequence[store.Tensors]]) -> Iterator[HeadArrays]:
    """All heads, layer by layer, each for the whole text. opening: a bank a layer, where there are several chunks."""
    one = replace(layout, n_layers=1)
    for layer, parts in enumerate(zip(*fitted, strict=True)):
        heads = [store.unpack(one, part)[0].unstack() for part in parts]
        yield from chunking.join(opening[layer].nodes(), heads) if len(heads) > 1 else heads[0]


def _of(progress: Progress, number: int, count: int, description: str, total: int) -> Any:
    return progress(description if count == 1 else f"chunk {number + 1} of {count}: {description}", total)
