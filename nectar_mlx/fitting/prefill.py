"""Reading a text with the full model: its exact keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache

from ..core.types import Tokenizer
from ..heads import Exact
from ..mlxlm import prompts
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.cache import NectarCache, Window, make_caches
from .prefill_attention import Prefill, ReadingCache

READ = 512  # tokens of a text that are read at a time


@dataclass(frozen=True)
class Context:
    """A prefix and its exact keys and values: one `Exact` bank a layer with full attention ([K, n, D] each, positions
    0 … n-1), and the last window of each other layer, by its index. chunks: lengths of the prefix's last pieces, where
    each was read on its own (chunks.py). preamble: how many of the first tokens the heads that are fitted here do not
    stand for, for others will."""

    prefix: list[int]
    banks: list[Exact]
    windows: dict[int, Window] = field(default_factory=dict)
    chunks: Sequence[int] = ()
    preamble: int = 0

    @property
    def fitted(self) -> list[Exact]:
        """The keys and values that heads are fitted to."""
        return [bank.part(slice(self.preamble, None)) for bank in self.banks]

    @property
    def length(self) -> int:
        """How many tokens the heads stand for."""
        return len(self.prefix) - self.preamble

    @property
    def start(self) -> int:
        """The position of the token that follows."""
        return len(self.prefix) - sum(self.chunks) + max(self.chunks, default=0)

    @property
    def offsets(self) -> list[mx.array | None]:
        """What each layer's keys are relative to, [K, D]."""
        return [bank.offset for bank in self.banks]

    def make_cache(self, make: Callable[..., NectarCache] = NectarCache) -> list[Any]:
        """One cache a layer; make: as for `make_caches`."""
        return make_caches(self.banks, self.windows, self.start, make=make)


def read_text(
    model: nn.Module,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    prefill: Prefill = "dense",
    offsets: Sequence[mx.array | None] = (),
    preamble: int = 0,
    progress: Callable[[int], None] = lambda n: None,
) -> Context:
    """Prefills the prefix, some tokens at a time. progress is told how many tokens are done.

    preamble: as in `Context`. offsets: one [K, D] for each layer with full attention, relative to which its keys are
    kept (default: their mean).
    """
    caches: list[Any] = [reading_cache(len(prefix), window, prefill=prefill) for window in geometry.windows]
    tokens = mx.array(list(prefix))[None]
    for start in range(0, len(prefix), READ):
        model(tokens[:, start : start + READ], cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        progress(min(start + READ, len(prefix)))
    context = Context(list(prefix), [], preamble=preamble)
    for layer, cache in enumerate(caches):
        offset = offsets[len(context.banks)] if len(offsets) > len(context.banks) else None
        part = what_was_read(cache, scale=geometry.scale, offset=offset)
        if isinstance(part, Window):
            context.windows[layer] = part
        else:
            context.banks.append(part)
    return context


def read_head(model: nn.Module, tokenizer: Tokenizer, prefix: Sequence[int], geometry: Geometry) -> Context:
    """What a conversation without the text starts behind: the chat template's own tokens in front of it, or the first
    token of the prefix where there are none."""
    return read_text(model, prefix[: max(1, len(prompts.head(tokenizer)))], geometry)


def reading_cache(length: int, window: int, *, prefill: Prefill = "dense") -> Any:
    """For one layer and a text of `length` tokens. window: the layer's sliding window, 0 for full attention."""
    return RotatingKVCache(window) if window else ReadingCache(length, prefill=prefill)


def what_was_read(cache: Any, *, scale: float, offset: mx.array | None = None) -> Exact | Window:
    """Takes the keys and values of a whole text out of a `reading_cache`. offset: [K, D], as for `read`."""
    ring = isinstance(cache, RotatingKVCache)
    pair = [cache._temporal_order(x) for x in cache.state[:2]] if ring else cache.keys_and_values()
    window = cache.max_size if ring else 0
    # Read some tokens at a time, a ring outgrows its window.
    keys, values = mx.contiguous(pair[0][0, :, -window:]), mx.contiguous(pair[1][0, :, -window:])
    cache.keys = cache.values = None
    mx.eval(keys, values)
    if ring:
        return Window(keys, values, window)
    sizes = ((keys.shape[1],),) * keys.shape[0]
    if offset is None:
        offset = keys.astype(mx.float32).mean(1).astype(mx.bfloat16)  # as a file keeps it
    # 16 bits hold the difference of two such numbers of about one size exactly.
    keys = (keys.astype(mx.float32) - offset.astype(mx.float32)[:, None]).astype(keys.dtype)
    mx.eval(keys, offset)
    return Exact(parameters={"keys": keys, "values": values}, sizes=sizes, scale=scale, offset=offset)
