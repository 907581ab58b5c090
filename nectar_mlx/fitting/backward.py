"""The reverse pass through a model a layer at a time: through the whole model at once it would be gigabytes.

The forward pass keeps what goes into each layer; the reverse pass computes a layer again and differentiates it alone.
The host prepares one layer while the one before it is computed, and no more: each takes memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layers import LayerRunner

Call = Callable[..., mx.array]  # of a layer's input [B, T, E] and what else it is differentiated by -> its output


def forward(runner: LayerRunner, tokens: mx.array, caches: Sequence[Any]) -> tuple[list[mx.array], mx.array]:
    """Tokens [B, T] through all layers: what goes into each of them, and what comes out of the last, [B, T, E]."""
    before, hidden = list[mx.array](), runner.embed(tokens)
    for layer, cache in enumerate(caches):
        before.append(hidden)
        hidden = runner.layer(layer, hidden, cache)
        mx.async_eval(hidden)
        mx.eval(before[-1])
    return before, hidden


def backward(
    runner: LayerRunner,
    before: list[mx.array],
    change: mx.array,
    differentiated: Callable[[int], tuple[Call, list[mx.array]]],
) -> Iterator[tuple[int, list[mx.array]]]:
    """Layer by layer, the last one first, the gradients by what `differentiated` names.

    before: of `forward`, used up. change: the gradient by the last layer's output, [B, T, E]. differentiated: of a
    layer's number, how it is called and what it is differentiated by besides its input.
    """
    later = change
    for layer in reversed(range(len(before))):
        call, parameters = differentiated(layer)
        with differentiable(runner.model):
            _, (change, *gradients) = mx.vjp(call, [before.pop(), *parameters], [change])
            mx.async_eval(change, gradients)
            mx.eval(later)
        later = change
        yield layer, gradients


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, recurrent layers take mlx-lm's plain operations: their kernels have no reverse pass."""
    training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(training)
