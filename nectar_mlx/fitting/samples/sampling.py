"""Answers sampled with the full cache, all conversations of a batch in step."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...core.device import device
from ...core.exp import exp
from ...core.gather import take
from ...core.types import FloatArray
from ...mlxlm.kept import attention_caches
from ..layers import LayerRunner
from ..prefill import Context
from .conversation import Conversation
from .study_cache import StepCache

_SHRINK = 8  # a batch is made smaller when one of so many conversations has ended
_STEP = 64  # tokens that are read at a time, and that keys and values are made for a multiple of


class Recorder(Protocol):
    """Keeps what attention sees while answers are sampled (`recording.Recording`)."""

    def begin(self, first: int) -> None:
        """Called before some conversations are sampled together. first: the number of the first of them, of all."""

    def make_cache(self, context: Context, conversations: Sequence[Conversation]) -> list[Any]:
        """One cache a layer, for conversations that advance in step, that shows what it sees."""

    def fed(self, caches: Sequence[Any]) -> None:
        """Called when some tokens more were fed to each sequence."""

    def predicted(self, going: Sequence[Conversation], last: mx.array, answering: Sequence[int]) -> None:
        """Called with what the last layer gave, [B, 1, E], and the sequences whose next token is drawn from it."""

    def keep(self, caches: Sequence[Any], going: Sequence[Conversation], places: np.ndarray, *, last: bool) -> None:
        """Called when it is known which of the tokens fed since the last time, [B, T], belong to their conversations.
        last: whether some sequences are dropped, or all end, behind these."""


def chances(seed: int, numbers: Iterable[int], count: int) -> FloatArray:
    """Random numbers in [0, 1) by which the answers of some conversations are drawn, [conversations, count]: a
    conversation's follow from its number, whatever the others are."""
    return np.stack([np.random.default_rng((seed, number)).random(count, np.float32) for number in numbers])


def sample_answers(
    model: nn.Module,
    context: Context,
    batch: Sequence[Conversation],
    *,
    stop: set[int],
    max_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    chances: FloatArray,
    progress: Callable[[int], None] = lambda tokens: None,
    at: int = 0,
    recorder: Recorder | None = None,
    runner: LayerRunner | None = None,
) -> None:
    """Samples the answers of a batch with the full cache, all conversations in step; the shortest prompt comes first.
    max_tokens, temperature: of all, or of each. chances: random numbers [conversations, max_tokens]. progress is told
    how many tokens of each there are. at: how many there were when it was interrupted, 0 to begin. recorder: shown what
    attention sees, in the very steps of a run that was not interrupted; the tokens of before are not drawn again.
    runner: of the model's layers, where those logits alone are to be computed that a token is drawn from.

    Every conversation starts at the same position: the longer prompts are still being read while the shorter ones are
    answered, so none is padded and positions are exact. Several steps are queued before the first one's tokens are
    looked at; what is drawn behind the end of an answer is dropped.
    """
    limits = [max_tokens] * len(batch) if isinstance(max_tokens, int) else max_tokens
    ends = {id(c): _End(stop, limit) for c, limit in zip(batch, limits, strict=True)}
    first, length = min(len(c.prompt) for c in batch), max(len(c.prompt) + ends[id(c)].limit for c in batch)
    ahead = device().steps_ahead
    heats = [temperature] * len(batch) if isinstance(temperature, float | int) else temperature
    drawn_by = {id(c): (heat, row) for c, heat, row in zip(batch, heats, chances, strict=True)}
    before = dict[int, list[int]]()
    if recorder:
        before = {id(c): c.prompt + c.answer for c in batch}
        for c in batch:
            c.answer = []
    drawn_until, at = (at, 0) if recorder else (0, at)
    going = _going_on(batch, at, ahead=ahead, ends=ends)
    if not going:
        return
    if recorder:
        caches = recorder.make_cache(context, going)
    else:
        caches = context.make_cache(StepCache, ahead=[c.ahead for c in going])
    for _, cache in attention_caches(caches):  # keys and values never have to grow
        cache.live.step = -(-length // _STEP) * _STEP
    at = max(at + 1, first)
    tokens = mx.array([(c.prompt + c.answer + [0] * at)[:at] for c in going])
    _read(model, caches, tokens[:, :-1], going, first=first, recorder=recorder)
    tokens = tokens[:, -1:]
    prompts = mx.array([c.prompt + [-1] * (length - len(c.prompt)) for c in going])
    heat = mx.array([drawn_by[id(c)][0] for c in going])[:, None]
    chance = mx.array(np.stack([_placed(drawn_by[id(c)][1], len(c.prompt), length) for c in going]))
    queued: list[mx.array] = []
    while True:
        top = runner.through(tokens, caches)[:, -1:] if runner else model(tokens, cache=caches)[:, -1]
        if recorder:
            recorder.fed(caches)
        if runner:
            answering = [i for i, c in enumerate(going) if at >= len(c.prompt) and not ends[id(c)].of(c.answer)]
            if recorder:
                recorder.predicted(going, top, answering)
        if at <= drawn_until:  # then the logits are never evaluated
            queued.append(mx.array([before[id(c)][at] if at < len(before[id(c)]) else 0 for c in going], mx.int32))
        elif runner:
            queued.append(_drawn(runner, top, answering, temperature=heat, chance=chance[:, at : at + 1]))
        else:
            queued.append(sample(top, temperature=heat, chance=chance[:, at : at + 1]))
        last = at + 1 >= length
        if not last:
            tokens = mx.where(prompts[:, at : at + 1] >= 0, prompts[:, at : at + 1], queued[-1][:, None])
            mx.async_eval(tokens)
            mx.eval(queued[-2:-1])  # no more than two steps are under way: they take memory
        at += 1
        if len(queued) < ahead and not last:
            continue
        known = at - len(queued)
        for step, drawn in enumerate(np.array(mx.stack(queued)).tolist()):
            ended = [_extend(c, token, known + step, ends[id(c)]) for c, token in zip(going, drawn, strict=True)]
        if recorder:
            recorder.keep(caches, going, _belong(going, ended, known - 1, at - 1), last=_worth_dropping(ended))
        queued = []
        progress(at - 1)
        if all(ended):
            return
        if _worth_dropping(ended):
            kept = mx.array([i for i, end in enumerate(ended) if not end], mx.int32)
            going = [c for c, end in zip(going, ended, strict=True) if not end]
            prompts, heat, chance, tokens = (take(x, kept) for x in (prompts, heat, chance, tokens))
            for cache in caches:
                cache.filter(kept)


class _End(NamedTuple):
    """Where an answer ends: at one of these tokens, or after so many."""

    stop: set[int]
    limit: int

    def of(self, answer: Sequence[int]) -> bool:
        return bool(answer) and (answer[-1] in self.stop or len(answer) >= self.limit)


def _going_on(batch: Sequence[Conversation], at: int, *, ahead: int, ends: Mapping[int, _End]) -> list[Conversation]:
    """Those that a run which was interrupted at so many tokens of each had not dropped; none where it had ended."""
    going = list(batch)
    first = min(len(c.prompt) for c in batch)
    for step in range(first + ahead - 1, at + 1, ahead):
        ended = [ends[id(c)].of(c.answer) and len(c.prompt) + len(c.answer) <= step + 1 for c in going]
        if all(ended):
            return []
        if _worth_dropping(ended):
            going = [c for c, end in zip(going, ended, strict=True) if not end]
    return going


def _placed(chances: FloatArray, first: int, length: int) -> FloatArray:
    """Each random number where its token will stand, behind a prompt of `first` tokens, [length]."""
    placed = np.zeros(length, np.float32)
    placed[first : first + len(chances)] = chances[: length - first]
    return placed


def _read(
    model: nn.Module,
    caches: Sequence[Any],
    tokens: mx.array,
    going: Sequence[Conversation],
    *,
    first: int,
    recorder: Recorder | None,
) -> None:
    """Feeds tokens [B, T] that are known; the first ones at once, as all prompts have them. Their logits are not
    needed, so the vocabulary-wide product is never computed."""
    end = tokens.shape[1]
    for start, stop in itertools.pairwise([0, *range(first - 1, end, _STEP), end]):
        if start < stop:
            model(tokens[:, start:stop], cache=caches)
            mx.eval([c.state for c in caches])
            if recorder:
                recorder.fed(caches)
                recorder.keep(caches, going, np.ones((len(going), stop - start), bool), last=True)


def _drawn(
    runner: LayerRunner, top: mx.array, answering: Sequence[int], *, temperature: mx.array, chance: mx.array
) -> mx.array:
    """Tokens [B] for what the last layer gave, [B, 1, E], drawn where they are answers; 0 elsewhere."""
    drawn = mx.zeros(top.shape[0], mx.int32)
    if not answering:
        return drawn
    rows = mx.array(list(answering), mx.int32)
    logits = runner.logits(take(top, rows))[:, -1]
    return drawn.at[rows].add(sample(logits, temperature=take(temperature, rows), chance=take(chance, rows)))


def _worth_dropping(ended: Sequence[bool]) -> bool:
    """Whether so many have ended that it is worth dropping them; fewer go on for nothing."""
    return sum(ended) * _SHRINK >= len(ended)


def _belong(going: Sequence[Conversation], ended: Sequence[bool], first: int, last: int) -> np.ndarray:
    """Which of the tokens first … last - 1 that were fed belong to their conversations, [B, T]."""
    until = [c.fed_tokens if end else last for c, end in zip(going, ended, strict=True)]
    return np.arange(first, last)[None] < np.array(until)[:, None]


def sample(logits: mx.array, *, temperature: float | mx.array, chance: mx.array) -> mx.array:
    """Tokens [B] drawn from softmax(logits / temperature), logits [B, V], by inverting the distribution function.
    temperature: of all, or of each, [B, 1]. chance: where, in [0, 1), [B, 1].

    (`mx.random.categorical` takes two logarithms an entry, a third of a decode step on a Linux CPU.)
    """
    logits = logits.astype(mx.float32)
    cumulative = mx.cumsum(exp((logits - logits.max(-1, keepdims=True)) / temperature), axis=-1)
    return (cumulative > chance * cumulative[:, -1:]).argmax(-1).astype(mx.int32)


def _extend(conversation: Conversation, token: int, at: int, end: _End) -> bool:
    """Adds the sampled token if the prompt is read; True if the answer has ended (a stop token is not fed)."""
    ended = end.of(conversation.answer)
    if ended or at < len(conversation.prompt):
        return ended
    conversation.answer.append(token)
    return end.of(conversation.answer)
