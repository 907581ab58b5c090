"""Fisher information: which errors of a head the answers notice.

An error δ in what a head gives to the model moves the next-token distributions by about ½ δᵀFδ nats, where
F = E[g gᵀ] is the Fisher information and g the gradient of log p(answer) by the head's output, for answers that the
model drew itself. With it the errors of all heads are counted in one currency, nats, and bytes go where they buy most.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core import attention
from ..core.device import device
from ..mlxlm.attention_patch import Geometry
from ..mlxlm.cache import NectarCache
from ..mlxlm.kept import attention_caches
from .backward import Call, backward, differentiable, forward
from .distributed import World, batches
from .fidelity import log_probabilities
from .layers import LayerRunner, layer_runner
from .prefill import Context
from .samples.conversation import Conversation

_ANSWERED = 128  # tokens of all answers whose logits are held at a time


class ProbedCache(NectarCache):
    """Exact attention plus `probe` [B, H, T, D], by which its effect is differentiated."""

    probe: mx.array

    def attend(self, queries: mx.array, *rest: Any, **options: Any) -> mx.array:
        output = super().attend(queries, *rest, **options)
        return output + self.probe[..., : output.shape[-1]].astype(output.dtype)


def metric(
    model: nn.Module,
    context: Context,
    conversations: Sequence[Conversation],
    *,
    geometry: Geometry,
    progress: Callable[[int], None] = lambda done: None,
    world: World | None = None,
) -> mx.array:
    """½ E[g gᵀ] per fitted layer and KV head, [M, D, D], by which an error δ of an output costs δᵀ · metric · δ nats:
    over the tokens of the conversations and the query heads of the group. progress is told how many conversations are
    done. world: whose ranks share the work; all of them get the same.
    """
    runner = layer_runner(model, geometry)
    if runner:
        gradients = partial(_gradients, runner, context, geometry=geometry)
    else:
        gradients = partial(_gradients_at_once, model, context, geometry=geometry)
    K, D, world = geometry.n_kv_heads, geometry.head_dim, world or World()
    together = batches(
        len(conversations), most=_together(context, conversations, geometry), shares=device().study_shares
    )
    parts = [[conversations[number] for number in numbers] for numbers in together]
    sums: dict[str, mx.array] = {}
    done = 0
    for number, part in enumerate(world.mine(parts)):
        layers = [mx.zeros((K, D, D)) for _ in context.banks]
        for fitted, g in gradients(part):
            grouped = attention.group(g, K)
            layers[fitted] = layers[fitted] + grouped.swapaxes(1, 2) @ grouped
            mx.eval(layers[fitted])
        sums[str(number)] = mx.concatenate(layers)
        mx.clear_cache()
        done += len(part) * world.size
        progress(min(len(conversations), done))
    # In the order of the parts, whoever made them: so all worlds get the same bits.
    ordered = world.in_order(list(sums), [list(of.values()) for of in world.arrays(sums)])
    total = sum(ordered, mx.zeros((K * len(context.banks), D, D)))
    count = geometry.n_heads // K * sum(c.fed_tokens for c in conversations)
    return total / (2 * max(count, 1))


def _together(context: Context, conversations: Sequence[Conversation], geometry: Geometry) -> int:
    """How many conversations are differentiated at a time, at most: their scores in one layer must fit the memory."""
    longest = max((c.fed_tokens for c in conversations), default=1)
    room = device().max_batch_scores // (geometry.n_heads * longest * len(context.prefix))
    return max(1, min(device().fisher_batch, room))


def _gradients(
    runner: LayerRunner, context: Context, conversations: Sequence[Conversation], *, geometry: Geometry
) -> Iterator[tuple[int, mx.array]]:
    """∇ log p(answers) by what a fitted layer's attention gives, [B, H, T, D], for each of them, the last one first.

    Only one layer's reverse pass exists at a time, the layer computed again for it: through the whole model at once it
    would be gigabytes.
    """
    sequences = [c.prompt + c.answer for c in conversations]
    longest = max(len(s) for s in sequences) - 1
    # Right padding is harmless: attention is causal, and the targets of padded places count for nothing.
    tokens = mx.array([s[:-1] + [0] * (longest + 1 - len(s)) for s in sequences])
    targets = np.full(tokens.shape, -1, np.int32)
    for row, c in zip(targets, conversations, strict=True):
        row[len(c.prompt) - 1 : len(c.prompt) - 1 + len(c.answer)] = c.answer
    make_cache = partial(context.make_cache, ahead=[c.ahead for c in conversations])
    before, hidden = forward(runner, tokens, make_cache())
    step = max(1, _ANSWERED // len(sequences))

    def log_likelihood(last: mx.array, start: int) -> mx.array:
        logs = log_probabilities(runner.logits(last[:, start : start + step]))
        target = mx.array(targets[:, start : start + step, None])
        # Not `take_along_axis`: what MLX differentiates it by is built for seconds under CUDA.
        return mx.where(mx.arange(logs.shape[-1]) == target, logs, 0.0).sum()

    change = mx.zeros_like(hidden)
    for start in range(min(len(c.prompt) for c in conversations) - 1, longest, step):
        change = change + mx.grad(log_likelihood)(hidden, start)
        mx.eval(change)
    caches = make_cache()

    def probed(layer: int) -> tuple[Call, list[mx.array]]:
        cache = caches.pop()
        if not isinstance(cache, NectarCache):
            return partial(_through, runner, layer, cache), []
        zeros = mx.zeros((len(sequences), geometry.n_heads, longest, geometry.head_dim))
        return partial(_through, runner, layer, ProbedCache(cache.bank, cache.context)), [zeros]

    fitted = len(context.banks)
    for _, probe in backward(runner, before, change, probed):
        if probe:
            fitted -= 1
            yield fitted, probe[0]


def _gradients_at_once(
    model: nn.Module, context: Context, conversations: Sequence[Conversation], *, geometry: Geometry
) -> Iterator[tuple[int, mx.array]]:
    """The same through the whole model, for models whose layers are not called one by one, a conversation at a time.
    Takes as much memory as all layers' reverse passes."""
    for conversation in conversations:
        yield from _gradients_of_one(model, context, conversation, geometry)


def _gradients_of_one(
    model: nn.Module, context: Context, conversation: Conversation, geometry: Geometry
) -> Iterator[tuple[int, mx.array]]:
    tokens, first = conversation.prompt + conversation.answer, len(conversation.prompt) - 1
    answer, fitted = mx.array(conversation.answer)[None, :, None], len(context.banks)

    def log_likelihood(probes: list[mx.array]) -> mx.array:
        caches = context.make_cache(ProbedCache, ahead=[conversation.ahead])
        for (_, cache), probe in zip(attention_caches(caches), probes, strict=True):
            cast("ProbedCache", cache).probe = probe
        logits = model(mx.array([tokens[:-1]]), cache=caches)[:, first:]
        return mx.take_along_axis(log_probabilities(logits), answer, axis=-1).sum()

    zeros = mx.zeros((1, geometry.n_heads, len(tokens) - 1, geometry.head_dim))
    with differentiable(model):
        probes = mx.grad(log_likelihood)([zeros] * fitted)
        mx.eval(probes)
    yield from enumerate(probes)


def _through(runner: LayerRunner, layer: int, cache: Any, hidden: mx.array, *probe: mx.array) -> mx.array:
    if probe:
        (cache.probe,) = probe
    return runner.layer(layer, hidden, cache)
