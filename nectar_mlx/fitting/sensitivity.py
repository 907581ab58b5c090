"""Which errors of a head the answers notice.

An error δ in what a head gives to the model moves the next-token distributions by about ½ δᵀFδ nats, where
F = E[g gᵀ] is the Fisher information and g the gradient of log p(answer) by the head's output, for answers that the
model drew itself. With it the errors of all heads are counted in one currency, nats, and bytes go where they buy most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import attention
from .._exp import SLOW_EXP
from ..cache import NectarCache
from ..evaluation.fidelity import log_probabilities
from .queries import Context, Conversation

_ROOM = 1 << 24 if SLOW_EXP else 1 << 28  # scores of one layer
_TOKENS = 512  # read together: all their logits exist at once, and several times


class _ProbedCache(NectarCache):
    """Exact attention plus `probe` [B, H, T, D], by which its effect is differentiated."""

    probe: mx.array

    def attend(self, queries: mx.array, *rest: Any, **options: Any) -> mx.array:
        return super().attend(queries, *rest, **options) + self.probe.astype(queries.dtype)

    def over_context(self, queries: mx.array) -> attention.Partial:
        # Recomputed in the reverse pass: of all layers at once, the weights of a long context would fill the memory.
        found: Any = mx.checkpoint(lambda q: tuple(self.bank.over(q)))(queries)
        return attention.Partial(*found)


def metric(information: mx.array) -> mx.array:
    """What turns an output's error Δ [N, D] into nats, |Δ · metric|² = ½ ΔᵀFΔ: half of F [M, D, D], its root."""
    values, vectors = np.linalg.eigh(np.array(information, dtype=np.float64) / 2)
    roots = np.sqrt(np.maximum(values, 0))[:, None]
    return mx.array(((vectors * roots) @ vectors.swapaxes(1, 2)).astype(np.float32))


def fisher(
    model: nn.Module,
    context: Context,
    conversations: Sequence[Conversation],
    *,
    n_heads: int,
    progress: Callable[[int], None] = lambda done: None,
) -> mx.array:
    """E[g gᵀ] per fitted layer and KV head, [M, D, D], in nats: over the tokens of the conversations and the query
    heads of the group. n_heads: of queries. progress is told how many conversations are done.
    """
    K, D = len(context.banks[0].sizes), context.banks[0].head_dim
    longest = max(len(c.prompt) + len(c.answer) for c in conversations)
    batch = max(1, min(_ROOM // (n_heads * longest * len(context.prefix)), _TOKENS // longest))
    total = mx.zeros((len(context.banks), K, D, D))
    count = 0
    for start in range(0, len(conversations), batch):
        part = conversations[start : start + batch]
        gradients = _gradients(model, context, part, n_heads)
        for layer, g in enumerate(gradients):
            rows = attention.group(g, K)
            total[layer] = total[layer] + rows.swapaxes(1, 2) @ rows
        mx.eval(total)
        count += sum(len(c.prompt) + len(c.answer) - 1 for c in part) * (n_heads // K)
        progress(start + len(part))
    return total.reshape(-1, D, D) / max(count, 1)


def _gradients(
    model: nn.Module, context: Context, conversations: Sequence[Conversation], n_heads: int
) -> Sequence[mx.array]:
    """∇ log p(answers) by what each fitted layer's attention gives, [B, H, T, D] a layer; zero on padding."""
    sequences = [c.prompt + c.answer for c in conversations]
    longest = max(len(s) for s in sequences)
    tokens = mx.array([s + [0] * (longest - len(s)) for s in sequences])
    place = mx.arange(longest - 1)[None]
    first = mx.array([len(c.prompt) - 1 for c in conversations])[:, None]
    last = mx.array([len(s) - 1 for s in sequences])[:, None]
    answered = (place >= first) & (place < last)

    def log_likelihood(probes: list[mx.array]) -> mx.array:
        logits = model(tokens[:, :-1], cache=_probed(context, probes))
        chosen = mx.take_along_axis(log_probabilities(logits), tokens[:, 1:, None], axis=-1)[..., 0]
        return (chosen * answered).sum()

    shape = (len(sequences), n_heads, longest - 1, context.banks[0].head_dim)
    found: Any = mx.grad(log_likelihood)([mx.zeros(shape) for _ in context.banks])
    mx.eval(found)
    return list(found)


def _probed(context: Context, probes: Sequence[mx.array]) -> list[Any]:
    remaining = iter(probes)
    caches = []
    for cache in context.make_cache():
        if isinstance(cache, NectarCache):
            cache = _ProbedCache(cache.bank, cache.context)
            cache.probe = next(remaining)
        caches.append(cache)
    return caches
