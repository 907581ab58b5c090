"""One evaluation: files and baselines against the full cache, on held-out questions, as one JSON object.

A file has the ids of its prefix, so the context is read again here and its text is not needed. Held-out questions are
answered with the full cache, then a few more that stand behind the first ones and their answers, as later turns. Every
method then sees those answers token by token, and its next-token distributions are compared with the full cache's.
gap closed = 1 - KL(method) / KL(no context). The main figures and the heads' errors are those of first turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .. import baselines
from ..baselines import NO_CONTEXT, EvalConfig, EvalContext, View
from ..core.clock import Clock
from ..core.progress import Log, Progress, no_log, silent
from ..core.types import JsonObject, Tokenizer
from ..errors import NectarError
from ..fitting import chunks
from ..mlxlm import attention_patch, prompts
from ..nectar import Nectar
from . import answers, questions, similarity
from .charts import is_file
from .methods import Method, build, measure
from .questions import ON, Question
from .summary import by_entropy, correlations, entropies, head_errors, summaries

_SELF_STUDY_SEED = 7_919  # of the conversations that methods learn from, beside the evaluation's seed


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """count: held-out questions about the text. samples: answers to each. seed: of questions and answers. file: the
    user's own questions, in place of the held-out ones."""

    count: int = 8
    samples: int = 1
    seed: int = 2024
    file: Path | None = None

    @property
    def later(self) -> int:
        """Held-out questions that stand behind a talk."""
        return 0 if self.file else max(1, self.count // 4)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen. baselines: names, as for `baselines.choose`. exact: the fractions of exact keys to read, for
    files that have them. answers: whether answers are sampled and compared by meaning. samples: captured queries a head
    for the baselines. answer_tokens: the longest answer. fetch: whether the model that compares answers may be fetched
    (84 MB)."""

    baselines: str = "all"
    exact: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.04)
    answers: bool = True
    samples: int = 4096
    answer_tokens: int = 96
    fetch: bool = True
    questions: QuestionOptions = field(default_factory=QuestionOptions)


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    files: Mapping[str, Nectar],
    *,
    options: Options,
    progress: Progress = silent,
    log: Log = no_log,
) -> JsonObject:
    """Everything that the report shows, as one JSON object. files: Nectars of one text, by name."""
    first = next(iter(files.values()))
    if any((n.prefix, n.chunks) != (first.prefix, first.chunks) for n in files.values()):
        raise NectarError("the files are of different texts: evaluate them one by one")
    sparse = (
        first.metadata.get("config", {}).get("prefill") == "fixed"
    )  # then the cost of that prefill alone counts too
    chosen = baselines.choose(options.baselines + (",sparse-prefill" if sparse else ""))
    asking = options.questions
    own = questions.from_file(asking.file, partial(prompts.prompt, tokenizer)) if asking.file else []
    clock = Clock()
    ctx = _read_again(model, tokenizer, first, options, progress)
    clock.lap("read")
    asked = own or questions.held_out(ctx, count=asking.count, seed=asking.seed)
    asked = questions.numbered(asked, samples=asking.samples)
    if mx.default_device() == mx.cpu:
        advice = " (--baselines none --no-answers is quickest)" if chosen or options.answers else ""
        total = len(asked) + asking.later * asking.samples
        log(f"{total} answers, {len(chosen)} baselines: this takes minutes on a CPU{advice}")
    questions.sample_answers(ctx, asked, seed=asking.seed, progress=progress)
    asked = [q for q in asked if q.conversation.answer]
    samples = ctx.replay([q.conversation for q in asked])
    if asking.later:
        asked += _later_turns(ctx, asked, asking, progress, log)
    clock.lap("answer")
    methods = build(ctx, files, chosen, exact=options.exact, progress=progress, log=log)
    clock.lap("build")
    methods = measure(ctx, methods, asked, progress=progress)
    clock.lap("compare")
    errors = head_errors(ctx, methods, samples, progress=progress)
    clock.lap("errors")
    results = summaries(methods, asked, errors, questions.recited(first.prefix, asked))
    result: JsonObject = {
        "files": {name: _described(nectar) for name, nectar in files.items()},
        "model": first.metadata.get("model", ""),
        "context_tokens": len(first.prefix),
        "cache_bytes": first.cache_nbytes,
        "geometry": ctx.geometry.to_dict(),
        "questions": [{"question": q.text, "kind": q.kind, "tokens": len(q.conversation.answer)} for q in asked],
        "methods": results,
        "heads": errors[methods[0].label],
        "entropy": by_entropy(entropies(ctx, samples), errors),
        "correlation": correlations(results),
        "answers": {},
        "examples": [],
        "facts": answers.facts(ctx, asked, _views(ctx, methods), seed=asking.seed, progress=progress),
        "seconds": clock.laps,
    }
    if options.answers and any(q.kind == ON for q in asked):
        by_file = {m.file: m.view for m in reversed(methods) if is_file(m.name)}  # the first: without exact keys
        views = {name: by_file[name] for name in files}
        no_context = next(m.view for m in methods if m.name == NO_CONTEXT)
        sampled = answers.sample(ctx, asked, views, no_context, seed=asking.seed + 1, progress=progress)
        by, embed = similarity.load(ctx.model, ctx.tokenizer, fetch=options.fetch, log=log)
        result["answers"] = answers.meaning(sampled, by=by, embed=embed)
        result["examples"] = [s.to_json() for s in sampled]
        clock.lap("answers")
    result["peak_bytes"] = int(mx.get_peak_memory())
    return result


def _read_again(
    model: nn.Module, tokenizer: Tokenizer, nectar: Nectar, options: Options, progress: Progress
) -> EvalContext:
    """The full cache of the text that a file was fitted on."""
    geometry = attention_patch.route(model)
    with progress("reading the context", len(nectar.prefix)) as update:
        context = chunks.read_chunks(model, nectar.prefix, geometry, chunks=nectar.chunks, progress=update)
    config = EvalConfig(
        samples=options.samples,
        seed=options.questions.seed + _SELF_STUDY_SEED,
        answer_tokens=options.answer_tokens,
    )
    return EvalContext(model=model, tokenizer=tokenizer, geometry=geometry, context=context, config=config)


def _later_turns(
    ctx: EvalContext, asked: Sequence[Question], asking: QuestionOptions, progress: Progress, log: Log
) -> list[Question]:
    """Answered questions behind some of the first turns; none where the model cannot have them."""
    try:
        later = questions.later_turns(ctx, asked, count=asking.later, samples=asking.samples, seed=asking.seed)
    except NectarError as error:
        log(f"later turns are left out: {error}")
        return []
    questions.sample_answers(ctx, later, seed=asking.seed, progress=progress)
    return [q for q in later if q.conversation.answer]


def _views(ctx: EvalContext, methods: Sequence[Method]) -> dict[str, View]:
    return {"full cache": ctx.full_cache} | {m.label if m.view.nbytes else m.name: m.view for m in methods}


def _described(nectar: Nectar) -> JsonObject:
    metadata = {k: nectar.metadata.get(k) for k in ("source", "config", "layout", "nectar_mlx")}
    return {**metadata, "bytes": nectar.nbytes, "report": nectar.report}
