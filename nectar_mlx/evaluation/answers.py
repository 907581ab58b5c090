"""Answers of the full cache, of a file and of other views, side by side: alike in meaning, and do they find the
facts?"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..baselines import Task, View
from ..fitting.queries import Conversation
from . import similarity
from .fidelity import Bootstrap
from .questions import ON, TEMPERATURE, Asked

_GREEDY = 1e-3  # a temperature at which only ties are left to chance
_FACT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One question with answers as text: two of the full cache (different seeds), one of the file, one without
    context."""

    question: str
    full: str
    again: str
    file: str
    nothing: str


def sample(task: Task, asked: Sequence[Asked], file: View, nothing: View, *, seed: int) -> list[Sampled]:
    """Answers to the questions about the text, all at the same temperature; the first is the one that was
    compared."""
    chosen = [a for a in asked if a.kind == ON]
    full = View(banks=task.context.banks, windows=task.context.windows, start=task.context.start, nbytes=0)
    others = [
        generate(task, view, chosen, seed=seed + i, temperature=TEMPERATURE)
        for i, view in enumerate((full, file, nothing))
    ]
    return [
        Sampled(question=a.question, full=text(task, a.conversation.answer), again=again, file=ours, nothing=none)
        for a, again, ours, none in zip(chosen, *others, strict=True)
    ]


def generate(
    task: Task,
    view: View,
    asked: Sequence[Asked],
    *,
    seed: int,
    temperature: float,
    max_tokens: int | None = None,
    batch: int = 16,
) -> list[str]:
    """What a view answers, in the order of the questions."""
    conversations = [Conversation(view.prompt(a.conversation) if view.prompt else a.conversation.prompt) for a in asked]
    order = sorted(conversations, key=lambda c: len(c.prompt))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        task.converse(view, part, seed=seed + start, temperature=temperature, max_tokens=max_tokens)
    return [text(task, c.answer) for c in conversations]


def text(task: Task, tokens: Sequence[int]) -> str:
    return str(task.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def meaning(task: Task, sampled: Sequence[Sampled], *, log: Callable[[str], None]) -> dict[str, Any]:
    """Mean embedding similarity to the full cache's answers: of its own second sample, of the file, and without
    context."""
    by, embed = similarity.load(task.model, task.tokenizer, log=log)
    names = ("again", "file", "nothing")
    texts = [getattr(s, n) for n in ("full", *names) for s in sampled]
    full, *others = embed(texts).reshape(4, len(sampled), -1)
    draws, each = Bootstrap(range(len(sampled))), np.arange(len(sampled))
    told: dict[str, Any] = {"by": by, "answers": len(sampled)}
    for name, vectors in zip(names, others, strict=True):
        estimate = draws.mean((full * vectors).sum(-1), each)
        told[name], told[f"{name}_interval"] = round(estimate.value, 4), [round(x, 4) for x in estimate[1:]]
    return told


def facts(task: Task, asked: Sequence[Asked], views: dict[str, View], *, seed: int) -> list[dict[str, Any]]:
    """For the questions that say what a right answer contains: who finds it, answering greedily.

    One object a view: found, the share of right answers with its interval, and `right`, each question's depth and
    outcome.
    """
    expecting = [a for a in asked if a.expected is not None]
    if not expecting:
        return []
    told = []
    draws, each = Bootstrap(range(len(expecting))), np.arange(len(expecting))
    for name, view in views.items():
        found = generate(task, view, expecting, seed=seed, temperature=_GREEDY, max_tokens=_FACT_TOKENS)
        right = [contains(answer, a.expected or "") for answer, a in zip(found, expecting, strict=True)]
        estimate = draws.mean(np.array(right, dtype=float), each)
        outcomes = [[a.depth, hit] for a, hit in zip(expecting, right, strict=True)]
        interval = [round(x, 4) for x in estimate[1:]]
        told.append({"method": name, "found": round(estimate.value, 4), "found_interval": interval, "right": outcomes})
    return told


def contains(answer: str, expected: str) -> bool:
    """Whether the answer holds the expected words, as words: 18 is not in 1847; case, commas and spacing do not
    matter."""
    words = [re.findall(r"\w+", re.sub(r"(?<=\d),(?=\d)", "", t).casefold()) for t in (answer, expected)]
    given, wanted = words
    return bool(wanted) and any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's, ties sharing their mean rank; None for fewer than three pairs or a constant side."""
    if len(x) < 3:
        return None
    ranks = [_ranks(np.asarray(v, dtype=np.float64)) for v in (x, y)]
    spread = [r.std() for r in ranks]
    if min(spread) == 0:
        return None
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / (spread[0] * spread[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.asarray([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
