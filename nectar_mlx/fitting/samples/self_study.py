"""Self-study: questions about a text, and answers sampled with the full cache, for the queries that matter are those of
real answers. Replaying the text alone gives three times the divergence (docs/log/sampling.md).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core.device import device
from ...core.exp import exp
from ...core.gather import take
from ...core.types import Tokenizer
from ...mlxlm import prompts
from ...mlxlm.kept import attention_caches
from ..prefill import Context
from ..run import FitRun
from . import instructions
from .conversation import Conversation, answered_checks, count_samples
from .study_cache import StudyCache, allow_half

CHECK_TEMPERATURE = 0.7
_SHRINK = 8  # a batch is made smaller when one of so many conversations has ended
_STEP = 64  # tokens that are read at a time, and that keys and values are made for a multiple of
_LIVE_BYTES = 6_000_000_000  # of keys and values of conversations that are sampled together, at most
_ENOUGH = 0.9  # of the samples asked for: not another batch for the last few
_FEWEST_TOGETHER = 16  # conversations: with fewer, sampling is slow on any machine


class Prompts(Protocol):
    """Makes conversations number first, first + 1, … about a text, their answers still to come."""

    def __call__(
        self, tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
    ) -> list[Conversation]: ...


def study(run: FitRun, context: Context) -> list[Conversation]:
    """Samples conversations about a context until they give every head its samples, and those of the check."""
    conversations, config = run.checkpoint.load_conversations(), run.config
    wanted = run.n_samples(run.n_heads)
    allow_half(run.model, context)
    with run.progress("sampling answers", wanted) as done:
        while True:
            samples = count_samples(conversations, group=run.group)
            number = sum(c.split != "check" for c in conversations)
            batch: list[Conversation] = []
            if samples < _ENOUGH * wanted:
                count = side_by_side(run, missing=wanted - samples)
                batch += training_conversations(
                    run.tokenizer, context.prefix, first=number, count=count, seed=config.seed
                )
            if not answered_checks(conversations):  # beside the others they cost little
                batch += check_conversations(
                    run.tokenizer, context.prefix, first=0, count=config.checks, seed=config.seed
                )
            if not batch:
                break
            told = batch_progress(run, batch, samples, wanted, done)
            answer(run, context, batch, seed=config.seed + number, progress=told)
            conversations += batch
            run.checkpoint.save_conversations(conversations)
    return conversations


def side_by_side(run: FitRun, *, missing: int) -> int:
    """How many conversations are sampled together: as many as give the missing samples, and as the memory holds."""
    config, g = run.config, run.geometry
    room = min(run.memory // 4, _LIVE_BYTES)
    fit = max(_FEWEST_TOGETHER, room // g.cache_bytes(2 * config.answer_tokens))
    needed = missing // (run.group * config.answer_tokens) + 1
    return min(config.conversations, fit, max(_FEWEST_TOGETHER, needed))


def batch_progress(
    run: FitRun, batch: Sequence[Conversation], before: int, wanted: int, done: Callable[[int], None]
) -> Callable[[int], None]:
    """For `sample_answers`: tells `done` the samples so far. before: those of earlier batches."""
    return lambda tokens: done(min(wanted, before + count_samples(batch, group=run.group, until=tokens)))


def answer(
    run: FitRun,
    context: Context,
    batch: Sequence[Conversation],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Samples the answers of a batch, as long and at the temperatures that the run's configuration
    says; an interrupted one is continued."""
    ordered = sorted(batch, key=lambda c: len(c.prompt))

    def sampled(at: int) -> None:
        progress(at)
        run.checkpoint.save_answers(ordered, seed=seed, at=at)

    sample_answers(
        run.model,
        context,
        ordered,
        stop=set(run.tokenizer.eos_token_ids),
        max_tokens=run.config.answer_tokens,
        temperature=[CHECK_TEMPERATURE if c.split == "check" else run.config.temperature for c in ordered],
        key=mx.random.key(seed),
        progress=sampled,
        at=run.checkpoint.load_answers(ordered, seed=seed),
    )


def training_conversations(
    tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """Conversations number first, first + 1, … about a text, their answers still to come; one in ten is held out,
    whatever the batches: were it one of each batch, a batch of one would give no samples.
    """
    questions = instructions.training(partial(instructions.passage, tokenizer, text), seed=seed + first)
    prompted = [prompts.prompt(tokenizer, question) for question in itertools.islice(questions, count)]
    return [Conversation(p, split="train" if number % 10 else "held_out") for number, p in enumerate(prompted, first)]


def check_conversations(
    tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
) -> list[Conversation]:
    """Conversations about a text by which a finished file is checked, their answers still to come. first: as above."""
    questions = instructions.checking(partial(instructions.passage, tokenizer, text), seed=seed + first)
    return [Conversation(prompts.prompt(tokenizer, q), split="check") for q in itertools.islice(questions, count)]


class StepCache(StudyCache):
    """Of several sequences that advance in step; some may end before the others."""

    def filter(self, kept: mx.array) -> None:
        live: Any = self.live
        live.keys, live.values = take(live.keys, kept), take(live.values, kept)


def sample_answers(
    model: nn.Module,
    context: Context,
    batch: Sequence[Conversation],
    *,
    stop: set[int],
    max_tokens: int,
    temperature: float | Sequence[float],
    key: mx.array,
    progress: Callable[[int], None] = lambda tokens: None,
    at: int = 0,
) -> None:
    """Samples the answers of a batch with the full cache, all conversations in step; the shortest prompt comes first.
    temperature: of all, or of each. progress is told how many tokens of each there are. at: how many there were when it
    was interrupted, 0 to begin.

    Every conversation starts at the same position: the longer prompts are still being read while the shorter ones are
    answered, so none is padded and positions are exact. Several steps are queued before the first one's tokens are
    looked at; what is drawn behind the end of an answer is dropped.
    """
    going, first = list(batch), min(len(c.prompt) for c in batch)
    ahead, longest = device().steps_ahead, max(len(c.prompt) for c in batch)
    heats = [temperature] * len(batch) if isinstance(temperature, float | int) else temperature
    heat_of = {id(c): heat for c, heat in zip(batch, heats, strict=True)}
    for step in range(first, at + 1):  # those that were sampled before
        key, _ = mx.random.split(key)
        if (step - first + 1) % ahead == 0:
            ended = [_has_ended(c, stop, max_tokens) and len(c.prompt) + len(c.answer) <= step + 1 for c in going]
            if all(ended):
                return
            if sum(ended) * _SHRINK >= len(ended):
                going = [c for c, end in zip(going, ended, strict=True) if not end]
    caches = context.make_cache(StepCache, sequences=len(going))
    for _, cache in attention_caches(caches):  # keys and values never have to grow
        cache.live.step = -(-(longest + max_tokens) // _STEP) * _STEP
    at = max(at + 1, first)
    tokens = mx.array([(c.prompt + c.answer + [0] * at)[:at] for c in going])
    # The logits of these tokens are not needed, so the vocabulary-wide product is never computed.
    for start, end in itertools.pairwise([0, *range(first - 1, at - 1, _STEP), at - 1]):
        if start < end:
            model(tokens[:, start:end], cache=caches)
            mx.eval([c.state for c in caches])
    tokens = tokens[:, -1:]
    prompts_ = mx.array([c.prompt + [-1] * (longest + max_tokens - len(c.prompt)) for c in going])
    heat = mx.array([heat_of[id(c)] for c in going])[:, None]
    queued: list[mx.array] = []
    while True:
        logits = model(tokens, cache=caches)[:, -1]
        key, now = mx.random.split(key)
        queued.append(sample(logits, temperature=heat, key=now))
        last = at + 1 >= longest + max_tokens
        if not last:
            tokens = mx.where(prompts_[:, at : at + 1] >= 0, prompts_[:, at : at + 1], queued[-1][:, None])
            mx.async_eval(tokens)
            mx.eval(queued[-2:-1])  # no more than two steps are under way: they take memory
        at += 1
        if len(queued) < ahead and not last:
            continue
        known = at - len(queued)
        for step, drawn in enumerate(np.array(mx.stack(queued)).tolist()):
            ended = [_extend(c, token, known + step, stop, max_tokens) for c, token in zip(going, drawn, strict=True)]
        queued = []
        progress(at - 1)
        if all(ended):
            return
        if sum(ended) * _SHRINK >= len(ended):  # some go on for nothing until it is worth dropping them
            kept = mx.array([i for i, end in enumerate(ended) if not end], mx.int32)
            going = [c for c, end in zip(going, ended, strict=True) if not end]
            prompts_, heat, tokens = (take(x, kept) for x in (prompts_, heat, tokens))
            for cache in caches:
                cache.filter(kept)


def sample(logits: mx.array, *, temperature: float | mx.array, key: mx.array) -> mx.array:
    """Tokens [B] drawn from softmax(logits / temperature), logits [B, V], by inverting the distribution function.
    temperature: of all, or of each, [B, 1].

    (`mx.random.categorical` takes two logarithms an entry, a third of a decode step on a Linux CPU.)
    """
    logits = logits.astype(mx.float32)
    cumulative = mx.cumsum(exp((logits - logits.max(-1, keepdims=True)) / temperature), axis=-1)
    point = mx.random.uniform(shape=(logits.shape[0], 1), key=key) * cumulative[:, -1:]
    return (cumulative > point).argmax(-1).astype(mx.int32)


def _has_ended(conversation: Conversation, stop: set[int], max_tokens: int) -> bool:
    answer = conversation.answer
    return bool(answer) and (answer[-1] in stop or len(answer) >= max_tokens)


def _extend(conversation: Conversation, token: int, at: int, stop: set[int], max_tokens: int) -> bool:
    """Adds the sampled token if the prompt is read; True if the answer has ended (a stop token is not fed)."""
    ended = _has_ended(conversation, stop, max_tokens)
    if ended or at < len(conversation.prompt):
        return ended
    conversation.answer.append(token)
    return _has_ended(conversation, stop, max_tokens)
