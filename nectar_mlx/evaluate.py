"""`nectar evaluate`: a .nectar against full attention, beside other ways to keep a context in as many bytes.

The file holds the ids of its prefix, so the context is read again here and needs no text. Held-out questions are
answered with the full cache; every method then sees those answers token by token, and its next-token distributions
are compared with the full cache's. gap closed = 1 - KL(method) / KL(no context).
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import baselines, cli
from .baselines import NO_CONTEXT, EvalContext, View
from .core import plotting
from .core.clock import Clock
from .errors import NectarError
from .evaluation import answers, questions, report, similarity
from .evaluation.charts import is_file
from .evaluation.methods import Method, build, measure
from .evaluation.questions import ON, Asked
from .evaluation.summary import by_entropy, correlations, entropies, head_errors, summaries, table
from .fitting import chunks
from .mlxlm import attention_patch, prompts
from .models import hub
from .nectar import Nectar


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen: names of baselines, how many questions about the text, how many answers to each and how long
    they get, how many rows a head the baselines may learn from, the seed of questions and answers, and the shares of
    keys that files with keys beside them are to read exactly."""

    baselines: str = "all"
    questions: int = 8
    samples: int = 1
    answer_tokens: int = 96
    rows: int = 4096
    seed: int = 2024
    answers: bool = True
    exact: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.04)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("evaluate", __doc__.split("\n\n")[0])
    parser.add_argument("nectar", nargs="+", help="a .nectar file; several of one text make a curve")
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")
    parser.add_argument("--questions", metavar="FILE", help="your own, one a line, or JSON lines")
    names = ", ".join(b.slug for b in baselines.BASELINES.values())
    extra = ", ".join(b.slug for b in baselines.BASELINES.values() if b.extra)
    parser.add_argument(
        "--baselines",
        default="all",
        metavar="NAMES",
        help=f"none, all (default; without {extra}), all,cartridge (with that one), or some of: {names}",
    )
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="held-out questions about the text (default 8)"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question (default 1)")
    parser.add_argument("--answer-tokens", type=int, default=96, metavar="N", help="the longest answer (default 96)")
    parser.add_argument(
        "--rows", type=int, default=4096, metavar="N", help="queries a head for baselines (default 4096)"
    )
    parser.add_argument("--seed", type=int, default=2024, help="of questions and answers")
    parser.add_argument(
        "--exact",
        type=_shares,
        default=Options.exact,
        metavar="SHARES",
        help="of the keys to read, for files with keys beside them (0,0.005,0.01,0.02,0.04)",
    )
    parser.add_argument("--no-answers", action="store_true", help="do not write answers to compare their meaning")
    parser.add_argument("--report", metavar="FILE.html", help="write a page to look at")
    parser.add_argument("--plot", metavar="FILE.png", help="draw divergence against bytes (needs nectar-mlx[plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return cli.run(parser, _work, argv)


def _work(arguments: argparse.Namespace) -> None:
    for name in ("count", "samples", "answer_tokens", "rows"):
        if getattr(arguments, name) < 1:
            raise NectarError(f"--{name.replace('_', '-')} must be positive")
    options = Options(
        baselines=arguments.baselines,
        questions=arguments.count,
        samples=arguments.samples,
        answer_tokens=arguments.answer_tokens,
        rows=arguments.rows,
        seed=arguments.seed,
        answers=not arguments.no_answers,
        exact=arguments.exact,
    )
    # Whatever can be wrong is better told before the work than after it.
    baselines.choose(arguments.baselines)
    if arguments.report and not Path(arguments.report).resolve().parent.is_dir():
        raise NectarError(f"{arguments.report}: there is no such folder")
    if arguments.plot:
        plotting.check(Path(arguments.plot))
    started = time.perf_counter()
    model, tokenizer, first = cli.load(arguments.nectar[0], arguments.model)
    loaded = time.perf_counter() - started
    files = {arguments.nectar[0]: first}
    files |= {p: cli.load_nectar(hub.nectar_file(p), model, tokenizer) for p in arguments.nectar[1:]}
    own = Path(arguments.questions) if arguments.questions else None
    result = evaluate(model, tokenizer, files, options=options, own=own)
    result["seconds"]["load"] = round(loaded, 2)
    print(json.dumps(result) if arguments.json else table(result), flush=True)
    if arguments.report:
        report.write(result, Path(arguments.report))
    if arguments.plot:
        report.plot(result, Path(arguments.plot))


def evaluate(
    model: Any, tokenizer: Any, files: Mapping[str, Nectar], *, options: Options, own: Path | None = None
) -> dict[str, Any]:
    """Everything that the report shows, as one JSON object. files: Nectars of one text by name. own: a file of
    questions."""
    first = next(iter(files.values()))
    if any((n.prefix, n.chunks) != (first.prefix, first.chunks) for n in files.values()):
        raise NectarError("the files are of different texts: evaluate them one by one")
    fixed = first.metadata.get("config", {}).get("prefill") == "fixed"  # what that way of reading costs on its own
    chosen = baselines.choose(options.baselines + (",sparse-prefill" if fixed else ""))
    asked = questions.from_file(own, partial(prompts.prompt, tokenizer)) if own else []
    clock = Clock()
    task = _task(model, tokenizer, first, options)
    clock.lap("read")
    asked = asked or questions.held_out(task, count=options.questions, seed=options.seed)
    asked = questions.numbered(asked, samples=options.samples)
    if mx.default_device() == mx.cpu:
        how = " (--baselines none --no-answers is quickest)" if chosen or options.answers else ""
        cli.say(f"{len(asked)} answers, {len(chosen)} baselines: this takes minutes on a CPU{how}")
    questions.sample_answers(task, asked, seed=options.seed)
    asked = [a for a in asked if a.conversation.answer]
    study = task.heard([a.conversation for a in asked])
    clock.lap("answer")
    methods = build(task, files, chosen, exact=options.exact)
    clock.lap("build")
    measure(task, methods, asked)
    clock.lap("compare")
    errors = head_errors(task, methods, study)
    clock.lap("errors")
    told = summaries(methods, asked, errors, questions.recited(first.prefix, asked))
    result = {
        "files": {name: _described(nectar) for name, nectar in files.items()},
        "model": first.metadata.get("model", ""),
        "context_tokens": len(first.prefix),
        "cache_bytes": first.cache_nbytes,
        "geometry": task.geometry.to_dict(),
        "questions": [{"question": a.question, "kind": a.kind, "tokens": len(a.conversation.answer)} for a in asked],
        "methods": told,
        "heads": errors[methods[0].label],
        "entropy": by_entropy(entropies(task, study), errors),
        "correlation": correlations(told),
        "answers": {},
        "examples": [],
        "facts": answers.facts(task, asked, _views(task, methods), seed=options.seed),
        "seconds": clock.laps,
    }
    if options.answers and any(a.kind == ON for a in asked):
        result |= _meaning(task, asked, list(files), methods, seed=options.seed + 1)
        clock.lap("answers")
    result["peak_bytes"] = int(mx.get_peak_memory())
    return result


def _task(model: Any, tokenizer: Any, nectar: Nectar, options: Options) -> EvalContext:
    """The text that a file stands for, read again."""
    geometry = attention_patch.route(model)
    with cli.progress("reading the context", len(nectar.prefix)) as done:
        context = chunks.read_chunks(model, nectar.prefix, geometry, chunks=nectar.chunks, progress=done)
    return EvalContext(
        model=model,
        tokenizer=tokenizer,
        geometry=geometry,
        context=context,
        rows=options.rows,
        seed=options.seed + 7_919,
        answer_tokens=options.answer_tokens,
    )


def _meaning(
    task: EvalContext, asked: Sequence[Asked], files: Sequence[str], methods: Sequence[Method], *, seed: int
) -> dict[str, Any]:
    """What the full cache and the files answer by themselves, and how near these answers are to each other."""
    nothing = next(m.view for m in methods if m.name == NO_CONTEXT)
    by_file = {m.file: m.view for m in reversed(methods) if is_file(m.name)}  # without exact keys: the first
    sampled = answers.sample(task, asked, {name: by_file[name] for name in files}, nothing, seed=seed)
    by, embed = similarity.load(task.model, task.tokenizer, log=cli.say)
    return {"answers": answers.meaning(sampled, by=by, embed=embed), "examples": [asdict(s) for s in sampled]}


def _views(task: EvalContext, methods: Sequence[Method]) -> dict[str, View]:
    full = View(banks=task.context.banks, windows=task.context.windows, start=task.context.start, nbytes=0)
    return {"full cache": full} | {m.label if m.view.nbytes else m.name: m.view for m in methods}


def _described(nectar: Nectar) -> dict[str, Any]:
    told = {k: nectar.metadata.get(k) for k in ("source", "config", "layout", "nectar_mlx")}
    return {**told, "bytes": nectar.nbytes, "report": nectar.report}


def _shares(text: str) -> tuple[float, ...]:
    return tuple(cli.share(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
