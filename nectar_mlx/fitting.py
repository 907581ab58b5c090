"""Fitting: a text goes in, a Nectar comes out.

read the text once -> converse about it, capturing queries and exact attention -> decide each head's budget
-> start every head from Attention Matching at its own budget -> regress -> quantise -> report
"""

from dataclasses import asdict
from typing import Any

import mlx.nn as nn

from . import adapter, models, nectar, prompts, queries
from .adapter import Geometry
from .checkpoint import Checkpoint
from .clock import Clock
from .errors import NectarError
from .fitter import FitConfig, Fitter, Progress, affordable_bytes, free_memory, silent
from .layerwise import LayerwiseFitter
from .nectar import Nectar


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
) -> Nectar:
    """Fits a text; see the module's first lines. name, source: what the file says of the model and the text.

    checkpoint: where an interrupted fit leaves its work, and a resumed one finds it. NectarError for a text, budget
    or model that cannot be fitted.
    """
    clock = Clock()
    geometry = adapter.route(model)
    prefix = _checked_prefix(model, tokenizer, text, config)
    provenance = {
        "model": name or getattr(tokenizer, "name_or_path", ""),
        "model_sha256": models.fingerprint(model),
        "tokenizer_sha256": models.tokenizer_fingerprint(tokenizer),
        "config": asdict(config),
        "source": source,
    }
    if _needs_layers(model, geometry, config, len(prefix)):
        by_layers = LayerwiseFitter(
            model, tokenizer, prefix, geometry, config, progress=progress, checkpoint=checkpoint or Checkpoint(None)
        )
        return _fit_layers(by_layers, provenance, clock)
    with progress("reading", len(prefix)) as done:
        context = queries.read(model, prefix, geometry, prefill=config.prefill, progress=done)
    clock.lap("read")
    fitter = Fitter(model, tokenizer, context, geometry, config, progress=progress, checkpoint=checkpoint)
    report: dict[str, Any] = {}
    if config.kind == "exact":
        heads = [head for bank in context.banks for head in bank.unstack()]
    else:
        nbytes = affordable_bytes(config, geometry, fitter.layout, n=len(prefix))
        fitter.converse()
        clock.lap("study")
        fitter.prepare()
        sizes = fitter.sizes(nbytes)
        clock.lap("budgets")
        heads = fitter.regress(sizes)
        clock.lap("regression")
        report |= {"sizes": sizes, "queries": fitter.study.rows}
    fitted = nectar.build(
        fitter.layout,
        heads,
        prefix=prefix,
        geometry=geometry,
        provenance=provenance,
        report=report,
        windows=context.windows,
    )
    if config.kind != "exact":
        report["error"] = fitter.errors(fitted.banks)
        report |= fitter.fidelity(fitted)
        clock.lap("check")
    report["seconds"] = clock.laps
    return fitted


def _needs_layers(model: nn.Module, geometry: Geometry, config: FitConfig, n: int) -> bool:
    """Whether the fit goes layer by layer: when it is told to, or when the KV cache would not fit the memory."""
    if config.layerwise is not None or config.kind == "exact":
        return bool(config.layerwise) and config.kind != "exact"
    return geometry.cache_bytes(n) * adapter.compute_type(model).size // 2 > (config.memory or free_memory() // 2)


def _fit_layers(fitter: LayerwiseFitter, provenance: dict[str, Any], clock: Clock) -> Nectar:
    config, geometry = fitter.config, fitter.geometry
    nbytes = affordable_bytes(config, geometry, fitter.layout, n=len(fitter.prefix))
    sizes = fitter.sizes(nbytes)
    clock.lap("budgets")
    fitter.converse()
    clock.lap("study")
    heads, errors = fitter.regress(sizes)
    clock.lap("regression")
    report: dict[str, Any] = {"sizes": sizes, "queries": fitter.rows, "error": errors, "layerwise": True}
    fitted = nectar.build(
        fitter.layout,
        heads,
        prefix=fitter.prefix,
        geometry=geometry,
        provenance=provenance,
        report=report,
        windows=fitter.windows,
    )
    report |= fitter.fidelity(fitted.make_cache)
    clock.lap("check")
    report["seconds"] = clock.laps
    return fitted


def _checked_prefix(model: nn.Module, tokenizer: Any, text: str, config: FitConfig) -> list[int]:
    if not text.strip():
        raise NectarError("the text is empty")
    prefix = prompts.prefix(tokenizer, text, max_tokens=config.context_tokens)
    window = _window(model)
    room = (window or 1 << 62) - 1024  # questions and answers need positions too
    if config.kind != "exact" and len(prefix) > room:
        raise NectarError(
            f"the text has {len(prefix):,} tokens; the model's window of {window:,} leaves room for {max(0, room):,}: "
            f"cut it with --context-tokens {max(0, room - 64)}"
        )
    return prefix


def _window(model: nn.Module) -> int | None:
    """Positions the model was made for, where its configuration (or its text part's) says."""
    arguments = getattr(model, "args", None)
    told = getattr(arguments, "max_position_embeddings", None)
    if told is None:
        told = (getattr(arguments, "text_config", None) or {}).get("max_position_embeddings")
    return told
