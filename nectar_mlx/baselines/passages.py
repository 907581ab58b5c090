"""BM25 retrieval (Robertson and Zaragoza, 2009): the passages that share most with the question, in front of it.

Bytes are those of the passages' keys and values in mlx-lm's 8-bit cache; the text itself, which has to be kept on disk
and read for every question, is not counted, nor is the time to read the passages.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

from .. import prompts
from ..errors import NectarError
from ..fitting.dialogue import Conversation
from .base import Baseline, Task, View
from .nothing import no_context

_K1, _B = 1.2, 0.75
_PASSAGE = 64  # tokens, about: as many as fill the bytes evenly


@dataclass(frozen=True)
class Index:
    """Passages of token ids with their words, scored against a question."""

    passages: list[list[int]]
    words: list[Counter[str]]

    def scores(self, question: str) -> list[float]:
        """BM25 of every passage."""
        mean = sum(w.total() for w in self.words) / len(self.words)
        weights = {}
        for word in set(_words(question)):
            holding = sum(word in w for w in self.words)
            weights[word] = math.log(1 + (len(self.words) - holding + 0.5) / (holding + 0.5))
        found = []
        for words in self.words:
            length = _K1 * (1 - _B + _B * words.total() / mean)
            found.append(sum(v * words[w] * (_K1 + 1) / (words[w] + length) for w, v in weights.items()))
        return found

    def best(self, question: str, count: int) -> list[int]:
        """The ids of the best passages, in the order of the text."""
        scores = self.scores(question)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return [token for i in sorted(order) for token in self.passages[i]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def index(task: Task, passage: int = _PASSAGE) -> Index:
    ids = task.context.prefix[len(task.head) :]
    passages = [ids[i : i + passage] for i in range(0, len(ids), passage)]
    return Index(passages, [Counter(_words(task.tokenizer.decode(p))) for p in passages])


def passages(task: Task, nbytes: int) -> View:
    tokens = int((nbytes - task.window_bytes) / task.text_bytes) - len(task.head)
    introduction = prompts.encode(task.tokenizer, prompts.INTRODUCTION, specials=False)
    room = tokens - len(introduction)
    if room < 8:
        raise NectarError(f"{nbytes:,} bytes do not hold a passage")
    count = max(1, round(room / _PASSAGE))
    size = room // count
    searched = index(task, size)

    def prompt(conversation: Conversation) -> list[int]:
        question = str(task.tokenizer.decode(conversation.prompt, skip_special_tokens=True))
        return [*introduction, *searched.best(question, count), *conversation.prompt]

    head = no_context(task, 0)
    return View(
        banks=head.banks,
        windows=head.windows,
        start=head.start,
        nbytes=int((len(task.head) + len(introduction) + count * size) * task.text_bytes) + task.window_bytes,
        detail=f"{count} passage{'s' if count > 1 else ''} of {size} tokens",
        prompt=prompt,
        kv_bits=8 if task.geometry.head_dim % 32 == 0 else None,
    )


BASELINES = (Baseline(name="BM25 passages", build=passages),)
