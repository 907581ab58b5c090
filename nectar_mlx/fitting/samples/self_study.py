"""Self-study: questions about a text, and answers sampled with the full cache, for the queries that matter are those of
real answers. Replaying the text alone gives three times the divergence (docs/log/sampling.md).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core.device import device
from ...core.exp import exp
from ...core.gather import take
from ...core.types import FloatArray, Tokenizer
from ...mlxlm import prompts
from ...mlxlm.kept import attention_caches
from ..prefill import Context
from ..run import FitRun
from . import instructions
from .conversation import FEWEST_TOGETHER, Conversation, answered_checks, count_groups, count_samples
from .study_cache import StudyCache, allow_half

CHECK_TEMPERATURE = 0.7
_SHRINK = 8  # a batch is made smaller when one of so many conversations has ended
_STEP = 64  # tokens that are read at a time, and that keys and values are made for a multiple of
_LIVE_BYTES = 6_000_000_000  # of keys and values of conversations that are sampled together, at most
_ENOUGH = 0.9  # of the samples asked for: not another batch for the last few


class Prompts(Protocol):
    """Makes conversations number first, first + 1, … about a text, their answers still to come."""

    def __call__(
        self, tokenizer: Tokenizer, text: Sequence[int], *, first: int, count: int, seed: int
    ) -> list[Conversation]: ...


def study(run: FitRun, context: Context) -> list[Conversation]:
    """Samples conversations about a context until they give every head its samples, and those of the check."""
    conversations, config = run.kept_conversations(), run.config
    wanted = run.n_samples(run.n_heads)
    allow_half(run.model, context)
    with run.progress("sampling answers", wanted) as done:
        while True:
            samples = count_samples(conversations, group=run.group)
            number = sum(c.split != "check" for c in conversations)
            batch: list[Conversation] = []
            if samples < _ENOUGH * wanted:
                batch += expected_to_give(
                    wanted - samples, partial(training_conversations, run.tokenizer, context.prefix), run, first=number
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
            done(min(wanted, count_samples(conversations, group=run.group)))
            run.checkpoint.save_conversations(conversations)
    return conversations


def expected_to_give(
    samples: int, make: Callable[..., list[Conversation]], run: FitRun, *, first: int
) -> list[Conversation]:
    """Conversations number first, first + 1, …: as few as give so many samples if every answer is of full length.
    make: `training_conversations` about a text."""
    config = run.config
    most = max(FEWEST_TOGETHER, samples // (run.group * config.answer_tokens) * 10 // 9 + 2)
    batch, given, count = make(first=first, count=most, seed=config.seed), 0, 0
    while count < most and (given < samples or count < FEWEST_TOGETHER):
        conversation = batch[count]
        given += run.group * (len(conversation.prompt) + config.answer_tokens) * (conversation.split == "train")
        count += 1
    return batch[:count]


def side_by_side(run: FitRun, count: int) -> list[slice]:
    """How so many conversations, in order of their prompts' lengths, are divided into those that are sampled together:
    whatever the number of ranks, for a conversation's logits are rounded otherwise beside others.

    No more together than was chosen and the memory holds; a multiple of the device's shares, if that leaves enough.
    """
    config = run.config
    fit = max(FEWEST_TOGETHER, min(run.memory // 4, _LIVE_BYTES) // run.geometry.cache_bytes(2 * config.answer_tokens))
    groups = count_groups(count, most=min(config.conversations, fit), shares=device().study_shares)
    return [slice(count * i // groups, count * (i + 1) // groups) for i in range(groups)]


def batch_progress(
    run: FitRun, batch: Sequence[Conversation], before: int, wanted: int, done: Callable[[int], None]
) -> Callable[[int], None]:
    """For `answer`: tells `done` the samples so far. before: those of earlier batches.

    A small batch gives enough samples long before its longest answer ends, so no more count than its share of tokens.
    """
    before, longest = min(before, wanted), max(len(c.prompt) for c in batch) + run.config.answer_tokens

    def told(tokens: int) -> None:
        given = count_samples(batch, group=run.group, until=tokens)
        done(before + min(given, (wanted - before) * tokens // longest))

    return told


def answer(
    run: FitRun,
    context: Context,
    batch: Sequence[Conversation],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Samples the answers of a batch, as long and at the temperatures that the run's configuration says; an interrupted
    one is continued. Each rank samples some of them. progress is told the tokens of each, on average."""
    config, world = run.config, run.world
    order = sorted(range(len(batch)), key=lambda i: len(batch[i].prompt))
    groups = [order[part] for part in side_by_side(run, len(batch))]
    mine = world.mine(groups)
    share = [batch[i] for group in mine for i in group]
    begun, at = run.checkpoint.load_answers(share, seed=seed)
    lengths = [len(batch[group[-1]].prompt) + config.answer_tokens for group in mine]

    def sampled(number: int, at: int) -> None:
        progress((sum(lengths[:number]) + at) * max(lengths) // sum(lengths))
        run.checkpoint.save_answers(share, seed=seed, group=number, at=at)

    for number, group in enumerate(mine):
        if number < begun:
            continue
        if number > begun:
            sampled(number, 0)
        together = [batch[i] for i in group]
        sample_answers(
            run.model,
            context,
            together,
            stop=set(run.tokenizer.eos_token_ids),
            max_tokens=config.answer_tokens,
            temperature=[CHECK_TEMPERATURE if c.split == "check" else config.temperature for c in together],
            chances=chances(seed, group, config.answer_tokens),
            progress=partial(sampled, number),
            at=at if number == begun else 0,
        )
    answers = [[batch[i].answer for i in group] for group in mine]
    for group, sampled_answers in zip(groups, world.in_order(answers, world.values(answers)), strict=True):
        for i, sampled_answer in zip(group, sampled_answers, strict=True):
            batch[i].answer = sampled_answer


def chances(seed: int, numbers: Iterable[int], count: int) -> FloatArray:
    """Random numbers in [0, 1) by which the answers of some conversations are drawn, [conversations, count]: a
    conversation's follow from its number, whatever the others are."""
    return np.stack([np.random.default_rng((seed, number)).random(count, np.float32) for number in numbers])


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
    chances: FloatArray,
    progress: Callable[[int], None] = lambda tokens: None,
    at: int = 0,
) -> None:
    """Samples the answers of a batch with the full cache, all conversations in step; the shortest prompt comes first.
    temperature: of all, or of each. chances: random numbers [conversations, max_tokens]. progress is told how many
    tokens of each there are. at: how many there were when it was interrupted, 0 to begin.

    Every conversation starts at the same position: the longer prompts are still being read while the shorter ones are
    answered, so none is padded and positions are exact. Several steps are queued before the first one's tokens are
    looked at; what is drawn behind the end of an answer is dropped.
    """
    going, first = list(batch), min(len(c.prompt) for c in batch)
    ahead, longest = device().steps_ahead, max(len(c.prompt) for c in batch)
    heats = [temperature] * len(batch) if isinstance(temperature, float | int) else temperature
    drawn_by = {id(c): (heat, row) for c, heat, row in zip(batch, heats, chances, strict=True)}
    for step in range(first, at + 1):  # those that were sampled before
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
    heat = mx.array([drawn_by[id(c)][0] for c in going])[:, None]
    points = np.zeros((len(going), longest + max_tokens), np.float32)  # where the tokens will stand
    for row, c in zip(points, going, strict=True):
        row[len(c.prompt) : len(c.prompt) + max_tokens] = drawn_by[id(c)][1]
    point = mx.array(points)
    queued: list[mx.array] = []
    while True:
        logits = model(tokens, cache=caches)[:, -1]
        queued.append(sample(logits, temperature=heat, chance=point[:, at : at + 1]))
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
            prompts_, heat, point, tokens = (take(x, kept) for x in (prompts_, heat, point, tokens))
            for cache in caches:
                cache.filter(kept)


def sample(logits: mx.array, *, temperature: float | mx.array, chance: mx.array) -> mx.array:
    """Tokens [B] drawn from softmax(logits / temperature), logits [B, V], by inverting the distribution function.
    temperature: of all, or of each, [B, 1]. chance: where, in [0, 1), [B, 1].

    (`mx.random.categorical` takes two logarithms an entry, a third of a decode step on a Linux CPU.)
    """
    logits = logits.astype(mx.float32)
    cumulative = mx.cumsum(exp((logits - logits.max(-1, keepdims=True)) / temperature), axis=-1)
    return (cumulative > chance * cumulative[:, -1:]).argmax(-1).astype(mx.int32)


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
