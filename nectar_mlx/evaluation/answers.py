"""Answers of the full cache, of files and of other views: how similar they are, and whether they have the facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..baselines import EvalContext, View
from ..core.device import device
from ..core.progress import Progress, silent
from ..core.types import DoubleArray, JsonObject
from ..fitting import fidelity
from ..fitting.samples.conversation import Conversation
from ..mlxlm import prompts
from .bootstrap import Bootstrap, interval
from .questions import ON, TEMPERATURE, Expected, Question, contains, text
from .similarity import Embed

_GREEDY = 1e-3  # a temperature that leaves only ties to chance
_FACT_TOKENS = 32  # the longest answer to a question about a fact


@dataclass(frozen=True, kw_only=True)
class SampledAnswers:
    """Answers to one question as text: two of the full cache (different seeds), one without context, and one of each
    file, by its name."""

    question: str
    full: str
    again: str
    no_context: str
    files: dict[str, str]

    def to_json(self) -> JsonObject:
        return {
            "question": self.question,
            "full": self.full,
            "again": self.again,
            "nothing": self.no_context,
            "files": self.files,
        }


def sample(
    ctx: EvalContext,
    questions: Sequence[Question],
    files: Mapping[str, View],
    no_context: View,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[SampledAnswers]:
    """Answers to the questions about the text, all at the same temperature. The full cache's first answers are those of
    the questions."""
    about = [q for q in questions if q.kind == ON]
    by_view = []
    with progress("answering with the files", len(files) + 2) as update:
        for index, view in enumerate((ctx.full_cache, no_context, *files.values())):
            by_view.append(generate(ctx, view, about, seed=seed + index, temperature=TEMPERATURE))
            update(index + 1)
    return [
        SampledAnswers(
            question=question.text,
            full=text(ctx, question.conversation.answer),
            again=again,
            no_context=without,
            files=dict(zip(files, of_files, strict=True)),
        )
        for question, again, without, *of_files in zip(about, *by_view, strict=True)
    ]


def generate(
    ctx: EvalContext,
    view: View,
    questions: Sequence[Question],
    *,
    seed: int,
    temperature: float,
    max_tokens: int | None = None,
) -> list[str]:
    """A view's answers, in the order of the questions."""
    prompt = view.prompt or (lambda conversation: conversation.prompt)
    conversations = [Conversation(prompt(q.conversation)) for q in questions]
    by_length, size = sorted(conversations, key=lambda c: len(c.prompt)), device().baseline_batch
    for start in range(0, len(by_length), size):
        batch = by_length[start : start + size]
        ctx.sample_answers(view, batch, seed=seed + start, temperature=temperature, max_tokens=max_tokens)
    return [text(ctx, c.answer) for c in conversations]


def meaning(samples: Sequence[SampledAnswers], *, by: str, embed: Embed) -> JsonObject:
    """Embedding similarity, the mean over all pairs of answers to a question: of the full cache's answers to each
    other, and of those to the answers without context and of every file. With intervals over questions, and each
    file's similarity less that of the full cache. by: the name of the embedding.
    """
    names, count = list(samples[0].files), len(samples)
    texts = [getattr(s, name) for name in ("full", "again", "no_context") for s in samples]
    texts += [s.files[name] for name in names for s in samples]
    vectors = embed(texts).reshape(3 + len(names), count, -1)
    questions, index = np.unique([s.question for s in samples], return_inverse=True)
    of_question = np.eye(len(questions))[:, index]  # [questions, answers]
    answers = of_question.sum(1)  # of each view; the full cache has twice as many
    whole, squares = of_question @ (vectors[0] + vectors[1]), of_question @ np.square(vectors[:2]).sum((0, 2))
    bootstrap, once = Bootstrap(range(len(questions))), np.arange(len(questions))
    again = bootstrap.means((np.square(whole).sum(-1) - squares) / (2 * answers * (2 * answers - 1)), once)
    no_context, *of_files = [
        bootstrap.means((whole * (of_question @ other)).sum(-1) / (2 * answers * answers), once)
        for other in vectors[2:]
    ]
    result: JsonObject = {"by": by, "answers": count, "questions": len(questions), "files": {}}
    result |= _estimate("again", again) | _estimate("nothing", no_context)
    for name, means in zip(names, of_files, strict=True):
        result["files"][name] = _estimate("similarity", means) | _estimate("less", means - again)
    return result


def _estimate(name: str, means: DoubleArray) -> JsonObject:
    value, *ends = interval(means)
    return {name: round(value, 4), f"{name}_interval": [round(x, 4) for x in ends]}


def facts(
    ctx: EvalContext,
    questions: Sequence[Question],
    views: Mapping[str, View],
    *,
    seed: int,
    progress: Progress = silent,
) -> list[JsonObject]:
    """Which views give the right answers to the questions that have one. Of a question with choices the answer is the
    likeliest choice, of another one the greedy answer.

    One object a view: found, the share of right answers with its interval; `quarters`, that share in each quarter of
    the text; and `right`, each question's depth and outcome.
    """
    expected = {q.number: q.expected for q in questions if q.expected is not None}
    asked = list({q.number: q for q in questions if q.expected is not None}.values())
    if not asked:
        return []
    results = []
    bootstrap, once = Bootstrap(range(len(asked))), np.arange(len(asked))
    with progress("looking for facts", len(views) * len(asked)) as update:
        for name, view in views.items():
            answers = _fact_answers(ctx, view, asked, seed=seed)
            right = [contains(answers[q.number], expected[q.number].answer) for q in asked]
            outcomes = [(expected[q.number].depth, hit) for q, hit in zip(asked, right, strict=True)]
            share = _estimate("found", bootstrap.means(np.array(right, dtype=float), once))
            results.append(
                {"method": name, **share, "quarters": _quarters(outcomes), "right": list(map(list, outcomes))}
            )
            update(len(results) * len(asked))
    return results


def _fact_answers(ctx: EvalContext, view: View, questions: Sequence[Question], *, seed: int) -> dict[int, str]:
    """The view's answer to each question, by its number."""
    free = [q for q in questions if not _choices(q)]
    limited = [q for q in questions if _choices(q)]
    answers = {}
    if free:
        written = generate(ctx, view, free, seed=seed, temperature=_GREEDY, max_tokens=_FACT_TOKENS)
        answers = {q.number: answer for q, answer in zip(free, written, strict=True)}
    size = device().choices_batch
    for start in range(0, len(limited), size):
        batch = limited[start : start + size]
        answers |= {q.number: answer for q, answer in zip(batch, _likeliest(ctx, view, batch), strict=True)}
    return answers


def _choices(question: Question) -> tuple[str, ...]:
    return question.expected.choices if isinstance(question.expected, Expected) else ()


def _likeliest(ctx: EvalContext, view: View, questions: Sequence[Question]) -> list[str]:
    """The choice of each question that is likeliest under the view, without the token that ends an answer."""
    continued = [
        Conversation(q.conversation.prompt, prompts.encode(ctx.tokenizer, choice, specials=False))
        for q in questions
        for choice in _choices(q)
    ]
    logits = fidelity.answer_logits(ctx.model, view.make_cache(), continued, view.prompt)
    scores = iter([_log_probability(x, c.answer) for x, c in zip(logits, continued, strict=True)])
    return [_choices(q)[int(mx.stack([next(scores) for _ in _choices(q)]).argmax())] for q in questions]


def _log_probability(logits: mx.array, answer: list[int]) -> mx.array:
    """Of a whole answer; logits [answer, vocabulary]."""
    return mx.take_along_axis(fidelity.log_probabilities(logits), mx.array(answer)[:, None], axis=-1).sum()


def _quarters(outcomes: Sequence[tuple[float | None, bool]]) -> list[float | None]:
    """The share of right answers in each quarter of the text; None where no question stands."""
    quarters: list[list[bool]] = [[], [], [], []]
    for depth, hit in outcomes:
        if depth is not None:
            quarters[min(3, max(0, int(4 * depth)))].append(hit)
    return [round(sum(hits) / len(hits), 4) if hits else None for hits in quarters]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's, ties share their mean rank; None for fewer than three pairs or a constant side."""
    if len(x) < 3:
        return None
    a, b = _ranks(np.asarray(x, dtype=np.float64)), _ranks(np.asarray(y, dtype=np.float64))
    if min(a.std(), b.std()) == 0:
        return None
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def _ranks(values: DoubleArray) -> DoubleArray:
    return np.asarray([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])
