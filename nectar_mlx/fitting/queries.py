"""Which queries a fit sees: conversations about the context, sampled with the full cache in view, then heard.

The queries that matter are those of real answers; re-reading the text alone gives three times the divergence
(docs/log.md). When a conversation is heard, read again in one pass behind the context, every attention call keeps its
post-RoPE queries, the exact (o, L) of the context and the (o, L) of the live tokens: what the regression needs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import RotatingKVCache

from .. import attention
from .._exp import SLOW_EXP, exp
from ..adapter import Geometry
from ..cache import NectarCache, Window, make_caches, with_sinks
from ..heads import Bank, Exact
from .prefill import Prefill, ReadingCache

READ = 512  # tokens of a text that are read at a time
_SHRINK = 8  # a batch is made smaller when one row in so many has ended
_ROOM, _LEAST_TOGETHER = 1 << 23 if SLOW_EXP else 1 << 28, 256  # scores of one layer, and tokens, read together


@dataclass(frozen=True)
class Context:
    """A prefix and its exact keys and values: one `Exact` bank a layer with full attention ([K, n, D] each, positions
    0 … n-1), and the last window of each other layer, by its index. chunks: lengths of the prefix's last pieces, where
    each was read on its own (chunks.py)."""

    prefix: list[int]
    banks: list[Exact]
    windows: dict[int, Window] = field(default_factory=dict)
    chunks: Sequence[int] = ()

    @property
    def start(self) -> int:
        """The position of the token that follows."""
        return len(self.prefix) - sum(self.chunks) + max(self.chunks, default=0)

    def make_cache(self) -> list[Any]:
        return make_caches(self.banks, self.windows, self.start)


def read(
    model: nn.Module,
    prefix: Sequence[int],
    geometry: Geometry,
    *,
    prefill: Prefill = "dense",
    progress: Callable[[int], None] = lambda n: None,
) -> Context:
    """Prefills the prefix in chunks. progress is told how many tokens are done."""
    caches: list[Any] = [reading_cache(len(prefix), window, prefill=prefill) for window in geometry.windows]
    tokens = mx.array(list(prefix))[None]
    for start in range(0, len(prefix), READ):
        model(tokens[:, start : start + READ], cache=caches)
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        progress(min(start + READ, len(prefix)))
    context = Context(list(prefix), [])
    for layer, cache in enumerate(caches):
        part = what_was_read(cache, scale=geometry.scale)
        if isinstance(part, Window):
            context.windows[layer] = part
        else:
            context.banks.append(part)
    return context


def reading_cache(length: int, window: int, *, prefill: Prefill = "dense") -> Any:
    """For one layer and a text of `length` tokens. window: the layer's sliding window, 0 for full attention."""
    return RotatingKVCache(window) if window else ReadingCache(length, prefill=prefill)


def what_was_read(cache: Any, *, scale: float) -> Exact | Window:
    """Takes the keys and values of a whole text out of a `reading_cache`."""
    ring = isinstance(cache, RotatingKVCache)
    pair = [cache._temporal_order(x) for x in cache.state[:2]] if ring else cache.keys_and_values()
    window = cache.max_size if ring else 0
    keys, values = (mx.contiguous(x[0, :, -window:]) for x in pair)  # read in chunks, a ring outgrows its window
    cache.keys = cache.values = None
    mx.eval(keys, values)
    if ring:
        return Window(keys, values, window)
    sizes = ((keys.shape[1],),) * keys.shape[0]
    return Exact(parameters={"keys": keys, "values": values}, sizes=sizes, scale=scale)


class Captured(NamedTuple):
    """Rows of one or more heads: queries, context output and live output [M, N, D], log-normalisers [M, N]."""

    queries: Any
    output: Any
    live_output: Any
    log_normalizer: Any
    live_log_normalizer: Any


class Study:
    """Captured rows of all heads, layer by layer, float16 and float32, in memory or in a mapped file."""

    def __init__(self, heads: int, rows: int, head_dim: int, *, folder: Path | None):
        self.rows = 0
        wide, narrow = (heads, rows, head_dim), (heads, rows)
        arrays = []
        for name, shape in zip(Captured._fields, (wide, wide, wide, narrow, narrow), strict=True):
            dtype = np.float16 if len(shape) == 3 else np.float32
            if folder is None:
                arrays.append(np.empty(shape, dtype))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                arrays.append(np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape))
        self._data = Captured(*arrays)

    @property
    def capacity(self) -> int:
        return int(self._data.queries.shape[1])

    @property
    def full(self) -> bool:
        return self.rows >= self.capacity

    def add(self, first_head: int, rows: Captured) -> None:
        """Writes rows [K, n, ...] of one layer at the current end; call `advance` once all layers are in."""
        K, n = rows.queries.shape[0], min(rows.queries.shape[1], self.capacity - self.rows)
        for kept, new in zip(self._data, rows, strict=True):
            kept[first_head : first_head + K, self.rows : self.rows + n] = np.array(new)[:, :n]

    def advance(self, rows: int) -> None:
        self.rows = min(self.capacity, self.rows + rows)

    def heads(self, indices: Sequence[int], rows: Any = None) -> Captured:
        """The rows of some heads as mx arrays; rows: their indices, default all."""
        few = rows is not None and 2 * len(rows) < self.rows  # then nothing else is read
        read = rows if few else slice(self.rows)
        whole = (mx.array(np.stack([a[i][read] for i in indices])) for a in self._data)
        # Taking rows on the device also moves them there: arrays made from numpy stay in host memory under CUDA.
        order = mx.arange(len(rows) if few else self.rows) if few or rows is None else mx.array(rows)
        taken = Captured(*(mx.take(x, order, axis=1) for x in whole))
        mx.eval(taken)
        return taken

    @staticmethod
    def nbytes(heads: int, rows: int, head_dim: int) -> int:
        return heads * rows * (3 * 2 * head_dim + 2 * 4)


class StepCache(NectarCache):
    """Of several sequences that advance in step; some may end before the others."""

    def filter(self, rows: mx.array) -> None:
        live: Any = self.live
        live.keys, live.values = live.keys[rows], live.values[rows]


class StudyCache(NectarCache):
    """Attends exactly and keeps what it saw at the last call.

    beside: a part of the context that is counted to the live tokens, for other heads will stand for it.
    """

    seen: Captured

    def __init__(self, bank: Bank, context: int, *, beside: Bank | None = None):
        super().__init__(bank, context)
        self._beside = None if beside is None else NectarCache(beside, 0)

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
        live = attention.causal(queries, keys, values, scale=scale, mask=mask)
        if sinks is not None:
            live = with_sinks(live, sinks)
        if self._beside is not None:
            live = attention.merge(self._beside.over_context(queries), live)
        context = self.over_context(queries)
        q, o, live_o = (x.astype(mx.float16) for x in (queries, context.output, live.output))
        self.seen = Captured(q, o, live_o, context.log_normalizer, live.log_normalizer)
        return attention.merge(context, live).output.astype(queries.dtype)

    def take(self, places: np.ndarray) -> Captured:
        """What was seen at some places [B, T], by KV head: [K, rows, ...]; the rows of a token lie side by side."""
        K = len(self.bank.sizes)
        B, H, T = self.seen.queries.shape[:3]
        split = (x.reshape(B, K, H // K, T, *x.shape[3:]) for x in self.seen)
        grouped = (x.swapaxes(0, 1).swapaxes(2, 3).reshape(K, B * T, H // K, *x.shape[4:]) for x in split)
        rows = mx.array(np.flatnonzero(places))
        return Captured(*(mx.take(x, rows, axis=1).reshape(K, -1, *x.shape[3:]) for x in grouped))


@dataclass
class Conversation:
    """A prompt that continues the prefix and the answer that the model gave with its full cache."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    held_out: bool = False  # kept from training


def converse(
    model: nn.Module,
    context: Context,
    batch: Sequence[Conversation],
    *,
    stop: set[int],
    max_tokens: int,
    temperature: float,
    key: mx.array,
) -> None:
    """Samples the answers of a batch with the full cache, all rows in step; the shortest prompt comes first.

    Every row starts at the same position: the longer prompts are still being read while the shorter ones are
    answered, so no row is padded and positions are exact.
    """
    caches = [StepCache(c.bank, c.context) if isinstance(c, NectarCache) else c for c in context.make_cache()]
    rows = list(batch)
    tokens = mx.array([r.prompt[: min(len(r.prompt) for r in rows)] for r in rows])
    at = tokens.shape[1]
    if at > 1:  # nobody asks for the logits of these places, so the vocabulary-wide product is never computed
        model(tokens[:, :-1], cache=caches)
        mx.eval([c.state for c in caches])
        tokens = tokens[:, -1:]
    while True:
        logits = model(tokens, cache=caches)[:, -1]
        key, now = mx.random.split(key)
        drawn: Any = sample(logits, temperature=temperature, key=now).tolist()
        done = [_extend(row, token, at, stop, max_tokens) for row, token in zip(rows, drawn, strict=True)]
        if all(done):
            return
        if sum(done) * _SHRINK >= len(done):  # the ended rows are fed zeros until it is worth dropping them
            going = [i for i, d in enumerate(done) if not d]
            rows, done = [rows[i] for i in going], [False] * len(going)
            for cache in caches:
                cache.filter(mx.array(going))
        tokens = mx.array([[(r.prompt + r.answer)[at] if not d else 0] for r, d in zip(rows, done, strict=True)])
        at += 1


class Heard(NamedTuple):
    """Conversations of about one length that are read together: tokens [B, T], right-padded, and for each study the
    places [B, T] whose rows it keeps."""

    conversations: list[Conversation]
    tokens: mx.array
    places: list[np.ndarray]


def together(
    conversations: Sequence[Conversation], studies: Mapping[bool, Study], *, group: int, tokens: int
) -> list[Heard]:
    """Conversations in batches of at most so many tokens, the longest first, so that little is padding.

    studies: for those held out (True) and the others; each keeps as many rows as it has room for, `group` rows a
    token, of tokens drawn at random from all. The last token of an answer was never fed to the model: no row.
    """
    ordered = sorted(conversations, key=lambda c: -len(c.prompt) - len(c.answer))
    fed = {kept: sum(fed_tokens(c) for c in ordered if c.held_out == kept) for kept in studies}
    chance = np.random.default_rng(0)
    batches, start = [], 0
    while start < len(ordered):
        longest = len(ordered[start].prompt) + len(ordered[start].answer)
        batch = ordered[start : start + max(1, tokens // longest)]
        start += len(batch)
        rows = [c.prompt + c.answer for c in batch]
        lengths, held_out = (np.array(x)[:, None] for x in ([*map(fed_tokens, batch)], [c.held_out for c in batch]))
        drawn, seen = chance.random((len(batch), longest)), np.arange(longest)[None] < lengths
        places = [
            seen & (held_out == kept) & (drawn * group * fed[kept] < study.capacity) for kept, study in studies.items()
        ]
        padded = mx.array([row + [0] * (longest - len(row)) for row in rows])
        batches.append(Heard(batch, padded, places))
    return batches


def fed_tokens(conversation: Conversation) -> int:
    """Tokens that the model was fed: the last one of an answer is only kept."""
    return len(conversation.prompt) + max(0, len(conversation.answer) - 1)


def hear(
    model: nn.Module,
    context: Context,
    conversations: Sequence[Conversation],
    studies: Mapping[bool, Study],
    *,
    n_heads: int,
    tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Reads conversations behind the context; what attention saw goes into the studies of those held out (True) and of
    the others (False). n_heads: of queries. tokens: how many are read together, about; default: what is quick. progress
    is told how many are done.
    """
    group = n_heads // len(context.banks[0].sizes)
    tokens = tokens or max(_LEAST_TOGETHER, _ROOM // (n_heads * len(context.prefix)))
    done = 0
    for heard in together(conversations, studies, group=group, tokens=tokens):
        caches = [StudyCache(c.bank, c.context) if isinstance(c, NectarCache) else c for c in context.make_cache()]
        studied = [c for c in caches if isinstance(c, StudyCache)]
        model(heard.tokens, cache=caches)  # its logits are never evaluated
        mx.eval([c.seen for c in studied])
        record(studied, studies.values(), heard.places)
        done += sum(map(fed_tokens, heard.conversations))
        progress(done)


def sample(logits: mx.array, *, temperature: float, key: mx.array) -> mx.array:
    """Tokens [B] drawn from softmax(logits / temperature), logits [B, V], by inverting the distribution function.

    (`mx.random.categorical` takes two logarithms an entry, a third of a decode step on a Linux CPU.)
    """
    logits = logits.astype(mx.float32)
    cumulative = mx.cumsum(exp((logits - logits.max(-1, keepdims=True)) / temperature), axis=-1)
    point = mx.random.uniform(shape=(logits.shape[0], 1), key=key) * cumulative[:, -1:]
    return (cumulative > point).argmax(-1)


def _extend(row: Conversation, token: int, at: int, stop: set[int], max_tokens: int) -> bool:
    """Adds the sampled token if the row's prompt is read; True if the row has ended (a stop token is not fed)."""
    ended = bool(row.answer) and (row.answer[-1] in stop or len(row.answer) >= max_tokens)
    if ended or at < len(row.prompt):
        return ended
    row.answer.append(token)
    return token in stop or len(row.answer) >= max_tokens


def record(caches: Sequence[StudyCache], studies: Iterable[Study], places: Iterable[np.ndarray]) -> None:
    """Writes what the caches saw into each study, from its places [B, T]."""
    for study, chosen in zip(studies, places, strict=True):
        if study.full or not chosen.any():
            continue
        taken = [cache.take(chosen) for cache in caches]
        mx.eval(taken)
        for layer, rows in enumerate(taken):
            study.add(layer * rows.queries.shape[0], rows)
        study.advance(taken[0].queries.shape[1])
