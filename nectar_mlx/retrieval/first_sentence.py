"""The first sentence of an answer: enough to see what a text has to say about a question."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..core.types import LayerCache, Tokenizer
from .passages import sentences
from .sources import without_thoughts

LONGEST = 24  # tokens


def first_sentence(model: nn.Module, tokenizer: Tokenizer, cache: Sequence[LayerCache], prompt: Sequence[int]) -> str:
    """The first sentence of the likeliest answer to a prompt, or its first 24 tokens where it is longer; "" where there
    is none.

    cache: as `Nectar.make_cache` makes it; it holds prompt and answer then.
    """
    said, answer, tokens = "", list[int](), list(prompt)
    for _ in range(LONGEST):
        token: int = model(mx.array([tokens]), cache=cache)[0, -1].argmax().item()
        if token in tokenizer.eos_token_ids:
            break
        tokens = [token]
        answer.append(token)
        said = tokenizer.decode(answer)
        if len(list(sentences(said))) > 1 or said.lstrip().endswith("\n"):
            break
    return cut(said)


def cut(answer: str) -> str:
    """The first sentence of a text without its thoughts."""
    answer = without_thoughts(answer)
    return next((answer[start:end] for start, end in sentences(answer)), "")
