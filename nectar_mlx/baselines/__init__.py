"""Other ways to keep a context in few bytes, each a small file behind one interface: `build(task, nbytes) -> View`.

Every method is stored the way that is best for it: the context's own keys and fitted nodes in int8 (groups of 32),
as the fitted heads are; its bytes are what it then takes.
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
from .base import Baseline, Task, View, slug

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


def choose(names: str, *, slow: bool) -> list[Baseline]:
    """`all`, `none`, or names with commas between. slow: whether `all` includes those that take minutes."""
    if names == "none":
        return []
    if names == "all":
        return [b for b in BASELINES.values() if slow or not b.slow]
    by_slug = {b.slug: b for b in BASELINES.values()}
    wanted = [slug(name) for name in names.split(",")]
    if unknown := [name for name in wanted if name not in by_slug]:
        raise NectarError(f"there is no baseline {unknown[0]!r}; there are: all, none, {', '.join(by_slug)}")
    return [by_slug[name] for name in wanted]


__all__ = ["BASELINES", "NO_CONTEXT", "Baseline", "Task", "View", "choose"]
