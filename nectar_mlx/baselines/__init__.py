"""Other methods to keep a context in few bytes, one file each, all with one function: `build(ctx, nbytes) -> View`.

Each method is stored in the format that is best for it: the context's own keys in 8 bits, Attention Matching's nodes in
5 bits (groups of 32), because more nodes outweigh the rounding; in 8 bits if the name says so. Its bytes are its stored
size.
"""

from ..errors import NectarError
from . import (
    attention_matching,
    cartridge,
    expected_attention,
    fixed_pattern,
    kvzip,
    most_attended,
    no_context,
    passages,
    quantized_cache,
    sinks_window,
    snap,
    summary,
)
from .base import Baseline, EvalConfig, EvalContext, LiveText, View, slug

BASELINES = {
    b.name: b
    for b in (
        *no_context.BASELINES,
        *sinks_window.BASELINES,
        *fixed_pattern.BASELINES,
        *most_attended.BASELINES,
        *snap.BASELINES,
        *expected_attention.BASELINES,
        *kvzip.BASELINES,
        *attention_matching.BASELINES,
        *cartridge.BASELINES,
        *quantized_cache.BASELINES,
        *summary.BASELINES,
        *passages.BASELINES,
    )
}
NO_CONTEXT = "no context"


def choose(names: str) -> list[Baseline]:
    """The baselines of a comma-separated list of names; `all` means all that are not extra, `none` means none."""
    by_slug = {b.slug: b for b in BASELINES.values()}
    groups = {"all": [b for b in BASELINES.values() if not b.extra], "none": []}
    chosen: list[Baseline] = []
    for name in map(slug, names.split(",")):
        if name not in groups and name not in by_slug:
            raise NectarError(f"there is no baseline {name!r}; there are: all, none, {', '.join(by_slug)}")
        chosen += groups[name] if name in groups else [by_slug[name]]
    return list(dict.fromkeys(chosen))


__all__ = ["BASELINES", "NO_CONTEXT", "Baseline", "EvalConfig", "EvalContext", "LiveText", "View", "choose"]
