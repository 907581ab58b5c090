"""Answers of the full cache, of files and of other views, side by side: alike in meaning, and do they find the
facts?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .. import cli
from ..baselines import EvalContext, View
from ..core.device import device
from ..fitting import fidelity
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .bootstrap import Bootstrap, interval
from .questions import ON, TEMPERATURE, Asked, contains
from .similarity import Embed

_GREEDY = 1e-3  # a temperature at which only ties are left to chance
_FACT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One question with answers as text: two of the full cache (different seeds), one without context, and one of each
    file, by its name."""

    question: str
    full: str
    again: str
    nothing: str
    files: dict[str, str]


def sample(
    task: EvalContext, asked: Sequence[Asked], files: Mapping[str, View], nothing: View, *, seed: int
) -> list[Sampled]:
    """Answers to the questions about the text, all at the same temperature; the full cache's first ones are those that
    were compared."""
    chosen = [a for a in asked if a.kind == ON]
    full = View(banks=task.context.banks, windows=task.context.windows, start=task.context.start, nbytes=0)
    found = []
    with cli.progress("answering with the files", len(files) + 2) as done:
        for number, view in enumerate((full, nothing, *files.values())):
            found.append(generate(task, view, chosen, seed=seed + number, temperature=TEMPERATURE))
            done(number + 1)
    return [
        Sampled(
            question=a.question,
            full=text(task, a.conversation.answer),
            again=again,
            nothing=none,
            files=dict(zip(files, ours, strict=True)),
        )
        for a, again, none, *ours in zip(chosen, *found, strict=True)
    ]


def generate(
    task: EvalContext,
    view: View,
    asked: Sequence[Asked],
    *,
    seed: int,
    temperature: float,
    max_tokens: int | None = None,
) -> list[str]:
    """What a view answers, in the order of the questions."""
    conversations = [Conversation(view.prompt(a.conversation) if view.prompt else a.conversation.prompt) for a in asked]
    order, batch = sorted(conversations, key=lambda c: len(c.prompt)), device().baseline_batch
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        task.converse(view, part, seed=seed + start, temperature=temperature, max_tokens=max_tokens)
    return [text(task, c.answer) for c in conversations]


def text(task: EvalContext, tokens: Sequence[int]) -> str:
    return str(task.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def meaning(sampled: Sequence[Sampled], *, by: str, embed: Embed) -> dict[str, Any]:
    """Embedding similarity, the mean over all pairs of answers to a question: of the full cache's answers to each
    other, and of those to the answers without context and of every file; with intervals over questions, and each
    file's less that of the full cache. by: what embeds.
    """
    names, count = list(sampled[0].files), len(sampled)
    texts = [getattr(s, name) for name in ("full", "again", "nothing") for s in sampled]
    texts += [s.files[name] for name in names for s in sampled]
    vectors = embed(texts).reshape(3 + len(names), count, -1)
    found, question = np.unique([s.question for s in sampled], return_inverse=True)
    of_question = np.eye(len(found))[:, question]  # [questions, answers]
    answers = of_question.sum(1)  # of each view; the full cache has twice as many
    whole, squares = of_question @ (vectors[0] + vectors[1]), of_question @ np.square(vectors[:2]).sum((0, 2))
    draws, each = Bootstrap(range(len(found))), np.arange(len(found))
    again = draws.means((np.square(whole).sum(-1) - squares) / (2 * answers * (2 * answers - 1)), each)
    nothing, *ours = (
        draws.means((whole * (of_question @ other)).sum(-1) / (2 * answers * answers), each) for other in vectors[2:]
    )
    told: dict[str, Any] = {"by": by, "answers": count, "questions": len(found), "files": {}}
    told |= _told("again", again) | _told("nothing", nothing)
    for name, means in zip(names, ours, strict=True):
        told["files"][name] = _told("similarity", means) | _told("less", means - again)
    return told


def _told(name: str, means: np.ndarray) -> dict[str, Any]:
    value, *ends = interval(means)
    return {name: round(value, 4), f"{name}_interval": [round(x, 4) for x in ends]}


def facts(task: EvalContext, asked: Sequence[Asked], views: dict[str, View], *, seed: int) -> list[dict[str, Any]]:
    """For the questions that say what a right answer contains: who knows it. A question with choices is answered by the
    likeliest of them, another one greedily in the view's own words.

    One object a view: found, the share of right answers with its interval; `quarters`, that share in each quarter of
    the text; and `right`, each question's depth and outcome.
    """
    expecting = list({a.number: a for a in asked if a.expected is not None}.values())
    if not expecting:
        return []
    told = []
    draws, each = Bootstrap(range(len(expecting))), np.arange(len(expecting))
    with cli.progress("looking for facts", len(views) * len(expecting)) as done:
        for name, view in views.items():
            right = [contains(answer, a.expected or "") for a, answer in _answered(task, view, expecting, seed=seed)]
            outcomes = [[a.depth, hit] for a, hit in zip(expecting, right, strict=True)]
            means = draws.means(np.array(right, dtype=float), each)
            told.append({"method": name, **_told("found", means), "quarters": _quarters(outcomes), "right": outcomes})
            done(len(told) * len(expecting))
    return told


def _answered(task: EvalContext, view: View, asked: Sequence[Asked], *, seed: int) -> list[tuple[Asked, str]]:
    """Each question with what the view answers."""
    free, choosing = ([a for a in asked if bool(a.choices) == some] for some in (False, True))
    said = generate(task, view, free, seed=seed, temperature=_GREEDY, max_tokens=_FACT_TOKENS) if free else []
    for start in range(0, len(choosing), device().choices_batch):
        said += _likeliest(task, view, choosing[start : start + device().choices_batch])
    by_number = {a.number: answer for a, answer in zip([*free, *choosing], said, strict=True)}
    return [(a, by_number[a.number]) for a in asked]


def _likeliest(task: EvalContext, view: View, asked: Sequence[Asked]) -> list[str]:
    """Of each question the choice to which the view gives the highest probability, its end left open."""
    choices = [
        Conversation(a.conversation.prompt, prompts.encode(task.tokenizer, choice, specials=False))
        for a in asked
        for choice in a.choices
    ]
    rows = fidelity.answer_logits(task.model, view.make_cache(), choices, view.prompt)
    scores = iter([_log_probability(row, c.answer) for row, c in zip(rows, choices, strict=True)])
    return [a.choices[int(mx.stack([next(scores) for _ in a.choices]).argmax())] for a in asked]


def _log_probability(logits: mx.array, answer: list[int]) -> mx.array:
    """Of all tokens of an answer together; logits [answer, vocabulary]."""
    return mx.take_along_axis(fidelity.log_probabilities(logits), mx.array(answer)[:, None], axis=-1).sum()


def _quarters(outcomes: Sequence[Sequence[Any]]) -> list[float | None]:
    found: list[list[bool]] = [[], [], [], []]
    for depth, hit in outcomes:
        if depth is not None:
            found[min(3, max(0, int(4 * depth)))].append(hit)
    return [round(sum(part) / len(part), 4) if part else None for part in found]


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
