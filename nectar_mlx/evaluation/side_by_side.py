"""Greedy answers of the full cache and of a file to the same questions, with their agreement."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from ..core.types import LayerCache, Tokenizer
from ..fitting import fidelity
from ..fitting.prefill import Context
from ..fitting.samples.conversation import Conversation
from ..nectar import Nectar


@dataclass(frozen=True)
class Answer:
    """One question with both answers. Seconds include reading the question, but not the context. agreement: the share
    of the full cache's answer tokens that are also the file's first choice."""

    question: str
    full: str
    nectar: str
    full_seconds: float
    nectar_seconds: float
    agreement: float


def answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    nectar: Nectar,
    context: Context,
    questions: Iterable[str],
    *,
    max_tokens: int,
) -> list[Answer]:
    """Both answers to each question. context: the full cache of the file's text."""

    def greedy(prompt: Sequence[int], cache: list[LayerCache]) -> tuple[list[int], float]:
        started, tokens = time.perf_counter(), list[int]()
        for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens, prompt_cache=cache):
            tokens.append(int(token))
            if tokens[-1] in tokenizer.eos_token_ids:
                break
        return tokens, round(time.perf_counter() - started, 2)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    pairs = []
    for question in questions:
        prompt = nectar.prompt(tokenizer, question, enable_thinking=False)
        full, full_seconds = greedy(prompt, context.make_cache())
        ours, seconds = greedy(prompt, nectar.make_cache())
        forced = [Conversation(prompt, full)]
        divergence = fidelity.compare(model, context.make_cache, {"nectar": nectar.make_cache}, forced)["nectar"]
        agreement = round(float(divergence.agree.mean()), 3)
        pairs.append(Answer(question, text(full), text(ours), full_seconds, seconds, agreement))
    return pairs
