"""Reading a text with the full model: its exact keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from ..core.types import Tokenizer
from ..heads import Bank, Exact
from ..mlxlm import prompts
from ..mlxlm.cache import NectarCache
from ..mlxlm.geometry import LATENT, SHARED, STATE, Geometry, Layer
from ..mlxlm.kept import Kept, make_caches, shared_layers, what_is_kept, widened
from .distributed import World
from .layers import layer_runner
from .others import Others
from .prefill_attention import Prefill, ReadingCache
from .shared_reading import can_be_shared, read_layers

READ = 512  # tokens of a text that are read at a time


@dataclass(frozen=True)
class Context:
    """A prefix and its exact keys and values: one `Exact` bank a layer with full attention ([K, n, D] each, positions
    0 … n-1), and what each other layer keeps, by its index. chunks: lengths of the prefix's last pieces, where
    each was read on its own (chunks.py). preamble: how many of the first tokens the heads that are fitted here do not
    stand for, for others will. others: other texts in view."""

    prefix: list[int]
    banks: list[Exact]
    windows: dict[int, Kept] = field(default_factory=dict)
    chunks: Sequence[int] = ()
    preamble: int = 0
    others: Others | None = None

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

    def make_cache(self, make: Callable[..., NectarCache] = NectarCache, *, ahead: Sequence[int] = (0,)) -> list[Any]:
        """One cache a layer, for as many sequences as `ahead` has; make, ahead: as for `make_caches`."""
        caches = make_caches(self.in_view(self.banks), self.windows, self.start, make=make, ahead=ahead)
        return list(widened(caches, len(ahead)))

    def in_view(self, banks: Sequence[Bank]) -> Sequence[Bank]:
        """Heads for this text, a bank a layer, beside those of the other texts in view."""
        return banks if self.others is None else self.others.together(banks)


def read_text(
    model: nn.Module,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    prefill: Prefill = "dense",
    offsets: Sequence[mx.array | None] = (),
    preamble: int = 0,
    world: World | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Context:
    """Prefills the prefix, some tokens at a time. progress is told how many tokens are done.

    preamble: as in `Context`. offsets: one [K, D] for each layer with full attention, relative to which its keys are
    kept (default: their mean). world: of the ranks that share the work, where the model allows it; all call this.
    """
    layers = [layer for layer in geometry.layers if layer.kind != SHARED]
    tokens, pieces = mx.array(list(prefix))[None], [slice(i, i + READ) for i in range(0, len(prefix), READ)]
    caches: Sequence[Any]
    shared = world is not None and world.size > 1 and len(pieces) > 1 and can_be_shared(geometry)
    if shared and world is not None and (runner := layer_runner(model, geometry)) is not None:
        caches = read_layers(runner, tokens, pieces=pieces, world=world, prefill=prefill, progress=progress)
    else:
        caches = [reading_cache(len(prefix), layer, prefill=prefill) for layer in layers]
        read_into(model, prefix, caches, progress=progress)
    context = Context(list(prefix), [], shared_layers(geometry), preamble=preamble)
    for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        offset = offsets[len(context.banks)] if len(offsets) > len(context.banks) else None
        bank, kept = what_is_kept(cache, layer, offset=offset)
        context.banks.extend([bank] if bank else [])
        context.windows.update({number: kept} if kept else {})
    return context


def read_into(
    model: nn.Module, tokens: Sequence[int], caches: Sequence[Any], *, progress: Callable[[int], None]
) -> None:
    """Feeds tokens to a model's caches, some at a time. progress is told how many are done."""
    for start in range(0, len(tokens), READ):
        model(mx.array([list(tokens[start : start + READ])]), cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        progress(min(start + READ, len(tokens)))


def read_head(model: nn.Module, tokenizer: Tokenizer, prefix: Sequence[int], geometry: Geometry) -> Context:
    """What a conversation without the text starts behind: the chat template's own tokens in front of it, or the first
    token of the prefix where there are none."""
    return read_text(model, prefix[: max(1, len(prompts.head(tokenizer)))], geometry)


def reading_cache(length: int, layer: Layer, *, prefill: Prefill = "dense") -> Any:
    """For one layer and a text of `length` tokens."""
    state: Any = ArraysCache(len(layer.states))
    if layer.kind == STATE:
        return state
    if layer.window:
        attention: Any = RotatingKVCache(layer.window)
    elif layer.kind == LATENT:  # mlx-lm's own way is the faster one for many tokens
        attention = KVCache()
        attention.step = length
    else:
        attention = ReadingCache(length, prefill=prefill)
    return CacheList(state, attention) if layer.states else attention
