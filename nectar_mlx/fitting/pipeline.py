"""Fitting: a text goes in, what a .nectar holds comes out.

read the text once -> converse about it -> capture what attention sees in that -> decide each head's budget
-> start every head from Attention Matching at its own budget -> regress -> round, and train on meanwhile -> report

Where the text does not fit the model's window, or its keys and values the memory: chunks.py.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.nn as nn

from .. import models, store
from ..core.clock import Clock
from ..errors import NectarError
from ..heads import KINDS, Bank, HybridHead, Quadrature
from ..mlxlm import attention_patch, prompts
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.window import window as _window
from ..store import Layout, chunking, load
from ..store.kv_file import KeyFile
from . import chunks, finite, prefill, verdict
from .checkpoint import Checkpoint
from .config import FitConfig, affordable_bytes, free_memory, layout_for, share_of
from .fitter import Fitter, Progress, silent
from .hybrid.fitter import RetrievalFitter


def fit(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    config: FitConfig,
    name: str = "",
    source: str = "",
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
) -> tuple[store.Tensors, store.Metadata, KeyFile | None]:
    """Fits a text -> what a Nectar is made of; see the module's first lines.

    name, source: what the file says of the model and the text. checkpoint: where an interrupted fit leaves its work,
    and a resumed one finds it. NectarError for a text, budget or model that cannot be fitted.
    """
    clock, keys = Clock(), None
    finite.check_weights(model)
    geometry = attention_patch.route(model)
    whole = _checked_prefix(tokenizer, text)
    prefix = whole
    if config.context_tokens is not None:
        prefix = prompts.cut(tokenizer, whole, config.context_tokens)
    provenance = {
        "model": name or getattr(tokenizer, "name_or_path", ""),
        "model_sha256": models.fingerprint(model),
        "tokenizer_sha256": models.tokenizer_fingerprint(tokenizer),
        "config": asdict(config),
        "source": source,
    }
    lengths = _chunks(model, tokenizer, prefix, config)
    layerwise = _needs_layers(model, geometry, config, len(prefix) - sum(lengths) + max(lengths))
    checkpoint = checkpoint or Checkpoint(None)
    told: dict[str, Any] = {"config": config, "progress": progress, "checkpoint": checkpoint, "clock": clock}
    if len(lengths) > 1 or layerwise:
        layout, tensors, report = chunks.fit(
            model, tokenizer, prefix, geometry, chunks=lengths, layerwise=layerwise, **told
        )
    else:
        layout, tensors, report, keys = _fit_whole(model, tokenizer, prefix, geometry, text=text, **told)
    kept = sum(x.nbytes for name, x in tensors.items() if name != "prefix")
    if sentence := verdict.sentence(report, share=kept / geometry.cache_bytes(len(prefix))):
        report["verdict"] = sentence
    if left_out := len(whole) - len(prefix):
        report["left_out_tokens"] = left_out
    report["seconds"] = clock.laps
    metadata = store.description(tensors, layout, geometry, provenance=provenance, report=report, chunks=lengths)
    return tensors, metadata, keys


def _fit_whole(
    model: nn.Module,
    tokenizer: Any,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    text: str,
    config: FitConfig,
    progress: Progress,
    checkpoint: Checkpoint,
    clock: Clock,
) -> tuple[Layout, store.Tensors, dict[str, Any], KeyFile | None]:
    """All layers of all of the text at once -> heads and report, and the keys, where the kind keeps them."""
    with progress("reading", len(prefix)) as done:
        context = prefill.read_text(model, prefix, geometry, prefill=config.prefill, progress=done)
    clock.lap("read")
    finite.check_banks("reading", context.banks, geometry)
    if config.kind == "exact":
        layout = layout_for(config, geometry, n_layers=len(context.banks))
        heads = [head for bank in context.banks for head in bank.unstack()]
        tensors = store.contents(layout, heads, prefix=prefix, windows=context.windows, offsets=context.offsets)
        return layout, tensors, {}, None
    make = RetrievalFitter if issubclass(KINDS.get(config.kind, Quadrature), HybridHead) else Fitter
    fitter = make(model, tokenizer, context, geometry, config, progress=progress, checkpoint=checkpoint)
    layout, keys = fitter.layout, None
    share = share_of(config, geometry, len(prefix))
    affordable = partial(affordable_bytes, geometry=geometry, layout=layout, n=len(prefix), at_least=share is None)
    plan, heads = fitter.fit(affordable, share, clock=clock)
    tensors = store.contents(layout, heads, prefix=prefix, windows=context.windows, offsets=context.offsets)
    banks: Sequence[Bank] = load.banks(layout, tensors)
    finite.check_banks("rounding", banks, geometry)
    if isinstance(fitter, RetrievalFitter):
        keys = fitter.keys(text, nectar=store.digest(tensors))
        banks = fitter.reading(banks, keys)
        clock.lap("keys")
    report = {"budget": plan.share, "sizes": plan.sizes, "queries": fitter.study.rows, "error": fitter.errors(banks)}
    report |= ({"exponent": plan.exponent} if plan.exponent else {}) | fitter.fidelity(banks)
    clock.lap("check")
    return layout, tensors, report, keys


def _needs_layers(model: nn.Module, geometry: Geometry, config: FitConfig, n: int) -> bool:
    """Whether the fit goes layer by layer: when it is told to, or when the KV cache would not fit the memory."""
    keeps_keys = config.kind == "exact" or issubclass(KINDS.get(config.kind, Quadrature), HybridHead)
    if config.layerwise and keeps_keys:
        raise NectarError(
            f"kind {config.kind} keeps the text's keys, and --layerwise forgets them: leave one of them out"
        )
    if config.layerwise is not None or keeps_keys:
        return bool(config.layerwise)
    return geometry.cache_bytes(n) * attention_patch.compute_type(model).size // 2 > (
        config.memory or free_memory() // 2
    )


def _checked_prefix(tokenizer: Any, text: str) -> list[int]:
    if not text.strip():
        raise NectarError("the text is empty")
    return prompts.prefix(tokenizer, text)


def _chunks(model: nn.Module, tokenizer: Any, prefix: Sequence[int], config: FitConfig) -> list[int]:
    """The lengths of the pieces in which the document fits the model's window; one, wherever it can be."""
    opening, window = prompts.preamble(tokenizer), _window(model)
    room = (window or 1 << 62) - opening - 1024  # questions and answers need positions too
    tokens = len(prefix) - opening
    if config.kind == "exact" or tokens <= room:
        return [tokens]
    if room < 64 or config.kind not in ("auto", "quadrature"):
        raise NectarError(
            f"the text has {len(prefix):,} tokens; the model's window of {window:,} leaves room for {max(0, room):,}: "
            f"cut it with --context-tokens {max(0, room)}, or fit it chunk by chunk with --kind quadrature"
        )
    return chunking.split(tokens, room)
