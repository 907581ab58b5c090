"""How close two ways of seeing a context are: divergence of their next-token distributions on the same answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ._exp import exp
from .queries import Conversation

MakeCache = Callable[[], Any]


class Divergence(NamedTuple):
    """Per answer token, over all conversations: KL(reference ‖ other) in nats [tokens], same arg-max [tokens], and the index
    of the conversation that each token belongs to."""

    kl: np.ndarray
    agree: np.ndarray
    conversation: np.ndarray


def log_probabilities(logits: mx.array) -> mx.array:
    """log softmax over the last axis, float32."""
    shifted = logits.astype(mx.float32)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - mx.log(exp(shifted).sum(-1, keepdims=True))


def answer_logits(model: nn.Module, make_cache: MakeCache, conversations: Sequence[Conversation]) -> list[mx.array]:
    """Teacher-forced logits of every answer token, one array [answer, vocabulary] a conversation."""
    tokens = [c.prompt + c.answer for c in conversations]
    longest = max(len(t) for t in tokens)
    # Right padding is harmless: attention is causal and padded places are not read.
    batch = mx.array([t + [0] * (longest - len(t)) for t in tokens])
    logits = model(batch, cache=make_cache())
    rows = [logits[i, len(c.prompt) - 1 : len(c.prompt) + len(c.answer) - 1] for i, c in enumerate(conversations)]
    mx.eval(rows)
    return rows


def compare(
    model: nn.Module,
    reference: MakeCache,
    others: dict[str, MakeCache],
    conversations: Sequence[Conversation],
    *,
    batch: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Divergence]:
    """Every other view of the context against the reference, teacher-forced on the same answers."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in others}
    for start in range(0, len(conversations), batch):
        part = conversations[start : start + batch]
        truth = [log_probabilities(x) for x in answer_logits(model, reference, part)]
        mx.eval(truth)
        for name, make_cache in others.items():
            for i, logits in enumerate(answer_logits(model, make_cache, part)):
                ours = log_probabilities(logits)
                kl = (exp(truth[i]) * (truth[i] - ours)).sum(-1)
                agree = truth[i].argmax(-1) == ours.argmax(-1)
                index = np.full(len(part[i].answer), start + i)
                found[name].append((np.array(kl), np.array(agree), index))
        progress(start + len(part))
    return {name: Divergence(*(np.concatenate(x) for x in zip(*parts, strict=True))) for name, parts in found.items()}
