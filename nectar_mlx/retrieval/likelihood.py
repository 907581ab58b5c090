"""How likely a question is behind a context, as the model sees it: of several contexts the one that a question is about
makes it likeliest (query likelihood; Ponte and Croft, 1998, with a language model of words)."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..core.types import LayerCache


def log_likelihood(model: nn.Module, cache: Sequence[LayerCache], prompt: Sequence[int]) -> float:
    """Nats of a prompt's tokens but the first, behind what the caches stand for. The caches hold the prompt then."""
    logits = model(mx.array([list(prompt)]), cache=cache)[0, :-1].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(list(prompt[1:]))[:, None], axis=-1)[:, 0]
    total: float = (chosen - mx.logsumexp(logits, axis=-1)).sum().item()  # type: ignore[assignment]
    return total
