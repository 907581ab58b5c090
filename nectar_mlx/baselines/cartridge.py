"""Cartridges (arXiv 2506.06266): keys and values trained end to end to give the full cache's distributions.

Initialized from the context's first tokens, with a frozen sink; Adam with linear decay, on self-study conversations. It
sees few of them, on a GPU 2,400, where the published method sees 65,536 twice: its figures do not judge that one. It
takes minutes of forward and backward passes through the whole model, so it runs only when named.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models.cache import KVCache

from ..core.device import device
from ..errors import NectarError
from ..fitting import fidelity
from ..fitting.samples.conversation import Conversation
from ..heads import HeadArrays
from ..mlxlm.cache import NectarCache
from .base import Baseline, EvalContext, View

_RATE, _BATCH = 2e-2, 8  # of Adam; conversations a step

_EFFORT = "little training; published: 65,536 conversations, twice"

Layers = list[list[mx.array]]  # a layer: keys and values, [K, p, D] each


class _TrainedCache(KVCache):
    """Ordinary attention over trained keys and values [K, p, D] and the live tokens behind them."""

    def __init__(self, trained: Sequence[mx.array], context: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.trained, self.offset = trained, context

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        B = keys.shape[0]
        pair = zip(self.trained, (keys, values), strict=True)
        full = [mx.concatenate([mx.broadcast_to(t[None].astype(x.dtype), (B, *t.shape)), x], axis=2) for t, x in pair]
        return full[0], full[1]

    def make_mask(self, N: int, **kwargs: Any) -> mx.array:
        """[N, p + N]: all trained positions, and the live tokens causally."""
        visible = mx.ones((N, self.trained[0].shape[1]), dtype=mx.bool_)
        return mx.concatenate([visible, mx.tril(mx.ones((N, N), dtype=mx.bool_))], axis=1)


def cartridge(ctx: EvalContext, nbytes: int, *, steps: int | None = None) -> View:
    """steps: of the training; None for the device's number."""
    steps = device().cartridge_steps if steps is None else steps
    if ctx.context.windows:
        raise NectarError("models with sliding windows are not trained")
    count = ctx.affordable_each(nbytes, "exact")
    conversations = ctx.answered
    truth = [x.astype(mx.float16) for x in _reference(ctx, conversations)]
    start = [[x[:, :count].astype(mx.float32) for x in ctx.layer(layer)] for layer in range(ctx.n_layers)]
    offsets = [ctx.offset(layer).astype(mx.float32)[:, None] for layer in range(ctx.n_layers)]
    start = [[keys + offset, values] for (keys, values), offset in zip(start, offsets, strict=True)]
    sinks: Layers = [[x[:, :1] for x in pair] for pair in start]
    trained: Layers = [[x[:, 1:] for x in pair] for pair in start]

    def whole(free: Layers) -> Layers:
        layers = zip(sinks, free, strict=True)
        return [[mx.concatenate([s, t], axis=1) for s, t in zip(*layer, strict=True)] for layer in layers]

    def loss(free: Layers, batch: list[int]) -> mx.array:
        logits = _answers(ctx, whole(free), [conversations[i] for i in batch])
        total = mx.array(0.0)
        for i, ours in zip(batch, logits, strict=True):
            p = truth[i].astype(mx.float32)
            total = total + (mx.exp(p) * (p - nn.log_softmax(ours.astype(mx.float32), axis=-1))).sum()
        return total / sum(len(conversations[i].answer) for i in batch)

    optimizer = optim.Adam(learning_rate=optim.linear_schedule(_RATE, 0.02 * _RATE, max(1, steps)))
    step = mx.value_and_grad(loss)
    size = min(_BATCH, len(conversations))
    for i in range(steps if trained[0][0].shape[1] else 0):
        batch = [(i * size + j) % len(conversations) for j in range(size)]
        _, gradients = step(trained, batch)
        trained = optimizer.apply_gradients({"layers": gradients}, {"layers": trained})["layers"]
        mx.eval(trained, optimizer.state)
    heads: list[HeadArrays] = []
    for (keys, values), offset in zip(whole(trained), offsets, strict=True):
        heads += [{"keys": k, "values": v} for k, v in zip(keys - offset, values, strict=True)]
    return ctx.stored("exact", heads, detail=f"{count} keys a head, {steps} steps of {size}: {_EFFORT}")


def _reference(ctx: EvalContext, conversations: list[Conversation]) -> list[mx.array]:
    """log-probabilities of the full cache, [answer, vocabulary] a conversation."""
    reference = []
    for i in range(0, len(conversations), 4):
        logits = fidelity.answer_logits(ctx.model, ctx.context.make_cache(), conversations[i : i + 4])
        reference += [fidelity.log_probabilities(x) for x in logits]
        mx.eval(reference)
    return reference


def _answers(ctx: EvalContext, pairs: Layers, conversations: list[Conversation]) -> list[mx.array]:
    """Teacher-forced logits of the answers behind trained keys and values, in one differentiable pass."""
    remaining = iter(pairs)
    caches = [
        _TrainedCache(next(remaining), ctx.context.start) if isinstance(c, NectarCache) else c
        for c in ctx.context.make_cache()
    ]
    sequences = [c.prompt + c.answer for c in conversations]
    longest = max(len(s) for s in sequences)
    logits = ctx.model(mx.array([s + [0] * (longest - len(s)) for s in sequences]), cache=caches)
    rows = zip(logits, conversations, strict=True)
    return [x[len(c.prompt) - 1 : len(c.prompt) + len(c.answer) - 1] for x, c in rows]


BASELINES = (Baseline(name="Cartridge", build=cartridge, extra=True),)
