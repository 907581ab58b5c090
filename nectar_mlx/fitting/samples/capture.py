"""Hearing conversations: what attention sees in them goes into a study.

When a conversation is heard, read again in one pass behind the context, every attention call keeps its post-RoPE
queries, the exact (o, L) of the context and the (o, L) of the live tokens: what the regression needs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core import attention
from ...core.device import device
from ...heads import Exact
from ...mlxlm.cache import NectarCache
from ..prefill import Context
from .sample_store import Samples, SampleStore
from .self_study import Conversation, Split, fed_tokens

_SMALL = 4096.0  # a sixteenth of what float16 holds
_LEAST_TOGETHER = 256  # tokens that are replayed together


class CaptureCache(NectarCache):
    """Attends exactly and keeps what it saw at the last call.

    skip: how many of the context's first tokens are counted to the live ones, for other heads will stand for them.
    """

    seen: Samples

    def __init__(self, bank: Exact, context: int, *rest: Any, skip: int = 0):
        super().__init__(bank.part(slice(skip, None)), context, *rest)
        self._beside = bank.part(slice(skip)) if skip else None
        # Outputs are means of values: float16 holds them if it holds the values, with room for those to come.
        self._type = mx.float16 if bank.largest_value < _SMALL else mx.float32

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        live = self.over_live(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        if self._beside is not None:
            live = attention.merge(self._beside.over(queries), live)
        context = self.over_context(queries)
        o, live_o = (x.astype(self._type) for x in (context.output, live.output))
        self.seen = Samples(queries, o, live_o, context.log_normalizer, live.log_normalizer)
        mx.async_eval(self.seen)  # or all layers' would wait in float32
        return attention.merge(context, live).output.astype(queries.dtype)

    def take(self, places: np.ndarray) -> Samples:
        """What was seen at some places [B, T], by KV head: [K, rows, ...]; the rows of a token lie side by side."""
        K = len(self.bank.sizes)
        B, H, T = self.seen.queries.shape[:3]
        split = (x.reshape(B, K, H // K, T, *x.shape[3:]) for x in self.seen)
        grouped = (x.swapaxes(0, 1).swapaxes(2, 3).reshape(K, B * T, H // K, *x.shape[4:]) for x in split)
        rows = mx.array(np.flatnonzero(places))
        return Samples(*(mx.take(x, rows, axis=1).reshape(K, -1, *x.shape[3:]) for x in grouped))


class ReplayBatch(NamedTuple):
    """Conversations of about one length that are read together: tokens [B, T], right-padded, and for each study the
    places [B, T] whose rows it keeps."""

    conversations: list[Conversation]
    tokens: mx.array
    places: list[np.ndarray]


def together(
    conversations: Sequence[Conversation], studies: Mapping[Split, SampleStore], *, group: int, tokens: int
) -> list[ReplayBatch]:
    """Conversations in batches of at most so many tokens, the longest first, so that little is padding.

    studies: of each split; each keeps as many rows as it has room for, `group` rows a token, of tokens drawn at random
    from all. Conversations of other splits are read and give no rows. The last token of an answer was never fed to the
    model: no row.
    """
    ordered = sorted(conversations, key=lambda c: -len(c.prompt) - len(c.answer))
    fed = {split: sum(fed_tokens(c) for c in ordered if c.split == split) for split in studies}
    chance = np.random.default_rng(0)
    batches, start = [], 0
    while start < len(ordered):
        longest = len(ordered[start].prompt) + len(ordered[start].answer)
        batch = ordered[start : start + max(1, tokens // longest)]
        start += len(batch)
        rows = [c.prompt + c.answer for c in batch]
        lengths, splits = (np.array(x)[:, None] for x in ([*map(fed_tokens, batch)], [c.split for c in batch]))
        drawn, seen = chance.random((len(batch), longest)), np.arange(longest)[None] < lengths
        places = [
            seen & (splits == split) & (drawn * group * fed[split] < study.capacity) for split, study in studies.items()
        ]
        padded = mx.array([row + [0] * (longest - len(row)) for row in rows])
        batches.append(ReplayBatch(batch, padded, places))
    return batches


def replay(
    model: nn.Module,
    context: Context,
    conversations: Sequence[Conversation],
    studies: Mapping[Split, SampleStore],
    *,
    n_heads: int,
    skip: int = 0,
    tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Reads conversations behind the context; what attention saw goes into the studies of their splits.

    n_heads: of queries. skip: as in `CaptureCache`. tokens: how many are read together, about; default: what is quick.
    progress is told how many are done.
    """
    group = n_heads // len(context.banks[0].sizes)
    tokens = tokens or max(_LEAST_TOGETHER, device().replay_scores // (n_heads * len(context.prefix)))
    done = 0
    for heard in together(conversations, studies, group=group, tokens=tokens):
        caches = context.make_cache(partial(CaptureCache, skip=skip))
        studied = [c for c in caches if isinstance(c, CaptureCache)]
        model(heard.tokens, cache=caches)  # its logits are never evaluated
        mx.eval([c.seen for c in studied])
        record(studied, studies.values(), heard.places)
        done += sum(map(fed_tokens, heard.conversations))
        progress(done)


def record(caches: Sequence[CaptureCache], studies: Iterable[SampleStore], places: Iterable[np.ndarray]) -> None:
    """Writes what the caches saw into each study, from its places [B, T]."""
    for study, chosen in zip(studies, places, strict=True):
        if study.full or not chosen.any():
            continue
        for layer, cache in enumerate(caches):
            rows = cache.take(chosen)
            mx.eval(rows)
            study.add(layer * rows.queries.shape[0], rows)
        study.advance(rows.queries.shape[1])
