"""How close two views of a context are: their next-token distributions on the same answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.device import device
from ..core.exp import exp
from ..mlxlm.kept import widened
from .samples.conversation import Conversation

MakeCache = Callable[[], Any]
Prompt = Callable[[Conversation], list[int]]
Change = Callable[[Conversation, mx.array], mx.array]  # of an answer's logits [answer, vocabulary]
Known = Callable[[Conversation], mx.array | None]
Observe = Callable[[str, Conversation, mx.array, mx.array], None]

MAX_ENTRIES = 1 << 24  # entries of a vocabulary-wide array at a time: 64 MB, whatever the vocabulary


class Divergence(NamedTuple):
    """One value per answer token, over all conversations, [tokens] each.

    kl: KL(reference ‖ other) in nats. agree: same arg-max. conversation: the index of the conversation that the
    token belongs to. correct, reference_correct: whether the arg-max is the answer's own token.
    """

    kl: np.ndarray
    agree: np.ndarray
    conversation: np.ndarray
    correct: np.ndarray
    reference_correct: np.ndarray

    def of(self, conversations: Sequence[int]) -> "Divergence":
        """The tokens of some conversations."""
        return self.where(np.isin(self.conversation, conversations))

    def where(self, chosen: np.ndarray) -> "Divergence":
        """Some of the tokens; chosen: bool [tokens]."""
        return Divergence(*(x[chosen] for x in self))


_NONE = Divergence(*(np.zeros(0, kind) for kind in (np.float32, bool, np.int32, bool, bool)))


def log_probabilities(logits: mx.array) -> mx.array:
    """log softmax over the last axis, float32."""
    shifted = logits.astype(mx.float32)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - mx.log(exp(shifted).sum(-1, keepdims=True))


def answer_logits(
    model: nn.Module, cache: Any, conversations: Sequence[Conversation], prompt: Prompt | None = None
) -> list[mx.array]:
    """Teacher-forced logits of every answer token, one array [answer, vocabulary] a conversation."""
    prompts = [prompt(c) if prompt else c.prompt for c in conversations]
    sequences = [p + c.answer for p, c in zip(prompts, conversations, strict=True)]
    longest, shared = max(len(s) for s in sequences), min(len(p) for p in prompts) - 1
    cache = widened(cache, len(sequences))
    # Right padding is harmless: attention and states are causal and padded places are not read.
    tokens = mx.array([s + [0] * (longest - len(s)) for s in sequences])
    if shared:  # the logits of these tokens are not needed, so the vocabulary-wide product is never computed
        model(tokens[:, :shared], cache=cache)
        mx.eval([c.state for c in cache])
    logits = model(tokens[:, shared:], cache=cache)
    answers = []
    for i, (p, c) in enumerate(zip(prompts, conversations, strict=True)):
        first = len(p) - 1 - shared
        answers.append(logits[i, first : first + len(c.answer)])
    mx.eval(answers)
    return answers


def compare(
    model: nn.Module,
    reference: MakeCache,
    others: Mapping[str, MakeCache],
    conversations: Sequence[Conversation],
    *,
    prompts: Mapping[str, Prompt | None] | None = None,
    change: Mapping[str, Change] | None = None,
    known: Known = lambda conversation: None,
    observe: Observe = lambda *_: None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Divergence]:
    """Every other view of the context against the reference, teacher-forced on the same answers.

    prompts: for a view that reads something else than the conversation's own prompt, what it reads. change: for a view
    whose logits are changed, how. known: gives the reference's logits, None where they must be computed. observe:
    told each view's name, each conversation, the reference's logits and the view's. progress is told how many
    conversations are done.
    """
    divergences: dict[str, list[Divergence]] = {name: [] for name in others}
    batch = device().check_batch
    for start in range(0, len(conversations), batch):
        part = conversations[start : start + batch]
        truth = _truth(model, reference, part, known)
        for name, make_cache in others.items():
            ours = answer_logits(model, make_cache(), part, (prompts or {}).get(name))
            for i, conversation in enumerate(part):
                logits = ours[i] if change is None or name not in change else change[name](conversation, ours[i])
                observe(name, conversation, truth[i], logits)
                divergences[name].append(divergence(truth[i], logits, conversation.answer, start + i))
        progress(start + len(part))
    return {n: joined(parts) for n, parts in divergences.items()}


def _truth(
    model: nn.Module, reference: MakeCache, conversations: Sequence[Conversation], known: Known
) -> list[mx.array]:
    """The reference's logits."""
    found = [known(c) for c in conversations]
    missing = [c for c, logits in zip(conversations, found, strict=True) if logits is None]
    computed = iter(answer_logits(model, reference(), missing) if missing else ())
    return [next(computed) if logits is None else logits for logits in found]


def joined(parts: Sequence[Divergence]) -> Divergence:
    """The tokens of all of them."""
    return Divergence(*(np.concatenate(x) for x in zip(_NONE, *parts, strict=True)))


def divergence(reference: mx.array, other: mx.array, answer: Sequence[int], conversation: int) -> Divergence:
    """reference, other: logits [answer, vocabulary] of the same answer tokens."""
    parts = []
    step = max(1, MAX_ENTRIES // reference.shape[1])
    for at in range(0, len(answer), step):
        p, q = log_probabilities(reference[at : at + step]), log_probabilities(other[at : at + step])
        token, top, ours = mx.array(list(answer[at : at + step])), p.argmax(-1), q.argmax(-1)
        kl = (exp(p) * (p - q)).sum(-1)
        fields = kl, top == ours, mx.full(token.shape, conversation), ours == token, top == token
        mx.eval(fields)  # at once: each array by itself would be waited for
        parts.append(Divergence(*(np.array(x) for x in fields)))
    return joined(parts)
