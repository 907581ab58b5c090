"""Conversations about a context: sampled with the full cache in view, for the queries that matter are those of real
answers. Re-reading the text alone gives three times the divergence (docs/log/sampling.md).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ...core.exp import exp
from ...mlxlm import prompts
from ...mlxlm.attention_patch import Geometry
from ...mlxlm.cache import NectarCache
from ..prefill import Context
from . import instructions

_SHRINK = 8  # a batch is made smaller when one row in so many has ended
_STEP = 64  # tokens that keys and values grow by: conversations are short


Split = Literal["train", "held_out", "check"]


@dataclass
class Conversation:
    """A prompt that continues the prefix and the answer that the model gave with its full cache.

    split: heads are trained on "train" and compared on "held_out", which is of the same kind; the finished file is
    checked on "check", which is not.
    """

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    split: Split = "train"


def fed_tokens(conversation: Conversation) -> int:
    """Tokens that the model was fed: the last one of an answer is only kept."""
    return len(conversation.prompt) + max(0, len(conversation.answer) - 1)


def n_samples(
    conversations: Sequence[Conversation], geometry: Geometry, *, split: Split = "train", until: int | None = None
) -> int:
    """Rows a KV head that the conversations of a split give when they are heard: one a query head and token. until: how
    many tokens of each there are so far, at most."""
    group = geometry.n_heads // geometry.n_kv_heads
    fed = [fed_tokens(c) for c in conversations if c.split == split]
    return group * sum(tokens if until is None else min(tokens, until) for tokens in fed)


def training_conversations(
    tokenizer: Any, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """Conversations number first, first + 1, … about a text, their answers still to come; one in ten is held out,
    whatever the batches: were it one of each batch, a batch of one would give no rows.
    """
    questions = instructions.training(partial(instructions.passage, tokenizer, text), seed=seed + first)
    prompted = [prompts.prompt(tokenizer, question) for question in itertools.islice(questions, count)]
    return [Conversation(p, split="train" if number % 10 else "held_out") for number, p in enumerate(prompted, first)]


def check_conversations(
    tokenizer: Any, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """Conversations about a text by which a finished file is checked, their answers still to come. first: as above."""
    questions = instructions.checking(partial(instructions.passage, tokenizer, text), seed=seed + first)
    return [Conversation(prompts.prompt(tokenizer, q), split="check") for q in itertools.islice(questions, count)]


class StepCache(NectarCache):
    """Of several sequences that advance in step; some may end before the others."""

    def __init__(self, *rest: Any):
        super().__init__(*rest)
        self.live.step = _STEP

    def filter(self, rows: mx.array) -> None:
        live: Any = self.live
        live.keys, live.values = live.keys[rows], live.values[rows]


def sample_answers(
    model: nn.Module,
    context: Context,
    batch: Sequence[Conversation],
    *,
    stop: set[int],
    max_tokens: int,
    temperature: float,
    key: mx.array,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Samples the answers of a batch with the full cache, all rows in step; the shortest prompt comes first.
    progress is told how many tokens of each there are.

    Every row starts at the same position: the longer prompts are still being read while the shorter ones are
    answered, so no row is padded and positions are exact.
    """
    caches = context.make_cache(StepCache)
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
        progress(at)
        if all(done):
            return
        if sum(done) * _SHRINK >= len(done):  # the ended rows are fed zeros until it is worth dropping them
            going = [i for i, d in enumerate(done) if not d]
            rows, done = [rows[i] for i in going], [False] * len(going)
            for cache in caches:
                cache.filter(mx.array(going))
        tokens = mx.array([[(r.prompt + r.answer)[at] if not d else 0] for r, d in zip(rows, done, strict=True)])
        at += 1


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
