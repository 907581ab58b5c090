"""Other ways to keep a context in few bytes, each a small file behind one interface: `build(task, nbytes) -> View`.

Every method is stored the way that is best for it: the context's own keys in 8 bits, Attention Matching's nodes in 5
(groups of 32), for more of them outweigh the rounding, and in 8 where the name says so. Its bytes are what it takes.
"""

from ..errors import NectarError
from . import (
    attention_matching,
    cartridge,
    expected_attention,
    fixed_pattern,
    most_attended,
    nothing,
    passages,
    quantized_cache,
    sinks_window,
    snap,
    summary,
)
from .base import Baseline, EvalContext, View, slug

BASELINES = {
    b.name: b
    for b in (
        *nothing.BASELINES,
        *sinks_window.BASELINES,
        *fixed_pattern.BASELINES,
        *most_attended.BASELINES,
        *snap.BASELINES,
        *expected_attention.BASELINES,
        *attention_matching.BASELINES,
        *cartridge.BASELINES,
        *quantized_cache.BASELINES,
        *summary.BASELINES,
        *passages.BASELINES,
    )
}
NO_CONTEXT = "no context"


def choose(names: str) -> list[Baseline]:
    """Names with commas between; `all` stands for those that are not extra, `none` for no baseline."""
    by_slug = {b.slug: b for b in BASELINES.values()}
    groups = {"all": [b for b in BASELINES.values() if not b.extra], "none": []}
    found: list[Baseline] = []
    for name in map(slug, names.split(",")):
        if name not in groups and name not in by_slug:
            raise NectarError(f"there is no baseline {name!r}; there are: all, none, {', '.join(by_slug)}")
        found += groups[name] if name in groups else [by_slug[name]]
    return list(dict.fromkeys(found))


__all__ = ["BASELINES", "NO_CONTEXT", "Baseline", "EvalContext", "View", "choose"]
