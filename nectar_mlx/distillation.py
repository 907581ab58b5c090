"""The last stage of a fit: all heads together, so that the model says what it says with its full cache.

The regression fits each head to attention's outputs, one by one. Here the heads are trained end to end on
KL(full ‖ fitted) over the answers of the sampled conversations, as Cartridges (arXiv 2506.06266) train keys and
values; started from the regression, a few hundred steps are enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import fidelity, optimizers, regression
from ._exp import COMPILE, exp
from .cache import NectarCache, make_caches
from .heads import Bank, HeadArrays
from .queries import Context, Conversation

_LIKELY = 64  # tokens of each distribution that are kept one by one; the rest is kept as one mass


class Lesson(NamedTuple):
    """Conversations of equal length: tokens [B, T], and of every place [B, T] the `likely` tokens [B, T, k] that the
    full cache gives log-probabilities `log_p` [B, T, k], and whether it belongs to an answer.
    """

    tokens: mx.array
    likely: mx.array
    log_p: mx.array
    answered: mx.array


def lessons(
    model: nn.Module, context: Context, conversations: Sequence[Conversation], *, batch: int
) -> list[Lesson]:
    """What the full cache says in conversations, in batches of similar lengths; the last, incomplete one is left out."""
    ordered = sorted((c for c in conversations if c.answer), key=lambda c: len(c.prompt) + len(c.answer))
    length = max((len(c.prompt) + len(c.answer) for c in ordered), default=1)
    found = []
    for start in range(0, len(ordered) - batch + 1, batch):
        part = ordered[start : start + batch]
        found.append(_lesson(model, context, part, length))
    return found


def _lesson(model: nn.Module, context: Context, conversations: Sequence[Conversation], length: int) -> Lesson:
    B, k = len(conversations), _LIKELY
    tokens = np.zeros((B, length), np.int32)
    likely, log_p = np.zeros((B, length, k), np.int32), np.full((B, length, k), -30, np.float32)
    answered = np.zeros((B, length), bool)
    logits = fidelity.answer_logits(model, context.make_cache(), conversations)
    for i, (c, of_answer) in enumerate(zip(conversations, logits, strict=True)):
        known = fidelity.log_probabilities(of_answer)
        top = mx.argpartition(-known, k, axis=-1)[:, :k]
        place = slice(len(c.prompt) - 1, len(c.prompt) - 1 + len(c.answer))
        tokens[i, : place.stop + 1] = c.prompt + c.answer
        likely[i, place], answered[i, place] = np.array(top), True
        log_p[i, place] = np.array(mx.take_along_axis(known, top, axis=-1))
    return Lesson(*(mx.array(x) for x in (tokens, likely, log_p, answered)))


def divergence(logits: mx.array, lesson: Lesson) -> mx.array:
    """Mean KL(full ‖ these logits [B, T, V]) over the answers' places, in nats."""
    log_q = fidelity.log_probabilities(logits)
    q = mx.take_along_axis(log_q, lesson.likely, axis=-1)
    p = exp(lesson.log_p)
    rest_p, rest_q = (mx.maximum(1 - x.sum(-1), 1e-6) for x in (p, exp(q)))
    kl = (p * (lesson.log_p - q)).sum(-1) + rest_p * mx.log(rest_p / rest_q)
    return (kl * lesson.answered).sum() / lesson.answered.sum()


def distill(
    model: nn.Module,
    context: Context,
    banks: Sequence[Bank],
    course: Sequence[Lesson],
    *,
    steps: int,
    rate: float,
    bits: int = 16,
    progress: Callable[[int], None] = lambda step: None,
) -> list[Bank]:
    """The banks, one a layer, after `steps` steps of Adam on the lessons in random order."""
    names = [(layer, name) for layer, bank in enumerate(banks) for name in bank.parameters]
    parameters = {f"{layer}.{name}": banks[layer].parameters[name].astype(mx.float32) for layer, name in names}

    def put(flat: HeadArrays) -> list[Bank]:
        whole: list[HeadArrays] = [{} for _ in banks]
        for layer, name in names:
            whole[layer][name] = flat[f"{layer}.{name}"]
        return [replace(bank, parameters=p) for bank, p in zip(banks, whole, strict=True)]

    def loss(flat: HeadArrays, lesson: Lesson) -> mx.array:
        rounded = [replace(b, parameters=regression.as_stored(b.parameters, bits)) for b in put(flat)]
        caches = make_caches(rounded, context.windows, len(context.prefix))
        return divergence(model(lesson.tokens, cache=caches), lesson)

    def step(flat: HeadArrays, state: optimizers.State, lesson: Lesson, factor: mx.array) -> Any:
        value, gradients = mx.value_and_grad(loss)(flat, lesson)
        return value, *optimizers.update(
            flat, gradients, state, rate=rate * factor, muon_rate=factor, muon=frozenset()
        )

    run = mx.compile(step) if COMPILE else step
    state = optimizers.start(parameters)
    order = np.random.default_rng(0).permuted(np.arange(steps) % len(course))
    for i in range(steps):
        factor = mx.array(optimizers.schedule(i, steps, warm_up=20, decay=1.0))
        value, parameters, state = run(parameters, state, course[int(order[i])], factor)
        mx.eval(value, parameters, state)
        progress(i + 1)
    return put(parameters)
