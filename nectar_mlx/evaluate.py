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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import adapter, answers, baselines, chunks, cli, fidelity, matching, questions, regression, report
from .baselines import NO_CONTEXT, Task, View
from .clock import Clock
from .errors import NectarError
from .fidelity import Bootstrap, Divergence, Estimate
from .nectar import Nectar
from .queries import Study
from .questions import ON, Asked

FILE = "nectar"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen: names of baselines, how many questions about the text, how long their answers get, how many
    rows a head the baselines may learn from, the seed of questions and answers, and the shares of keys that files with
    keys beside them are to read exactly."""

    baselines: str = "all"
    questions: int = 8
    answer_tokens: int = 96
    rows: int = 4096
    seed: int = 2024
    slow: bool = False
    answers: bool = True
    exact: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.04)


@dataclass(kw_only=True)
class Method:
    """A view of the context under test. file: which file's bytes it was given."""

    name: str
    file: str
    view: View
    seconds: float
    divergence: Divergence | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.name} @ {self.file}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("evaluate", __doc__.split("\n\n")[0])
    parser.add_argument("nectar", nargs="+", help="a .nectar file; several of one text make a curve")
    parser.add_argument("--model", help="the model to use (default: the name of the one it was fitted on)")
    parser.add_argument("--questions", metavar="FILE", help="your own, one a line, or JSON lines")
    names = ", ".join(b.slug for b in baselines.BASELINES.values())
    parser.add_argument("--baselines", default="all", metavar="NAMES", help=f"all, none, or some of: {names}")
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="held-out questions about the text (default 8)"
    )
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
    for name in ("count", "answer_tokens", "rows"):
        if getattr(arguments, name) < 1:
            raise NectarError(f"--{name.replace('_', '-')} must be positive")
    options = Options(
        baselines=arguments.baselines,
        questions=arguments.count,
        answer_tokens=arguments.answer_tokens,
        rows=arguments.rows,
        seed=arguments.seed,
        slow=mx.default_device() != mx.cpu,
        answers=not arguments.no_answers,
        exact=arguments.exact,
    )
    for path in (arguments.report, arguments.plot):
        if path and not Path(path).resolve().parent.is_dir():
            raise NectarError(f"{path}: there is no such folder")
    started = time.perf_counter()
    model, tokenizer, first = cli.load(arguments.nectar[0], arguments.model)
    loaded = time.perf_counter() - started
    files = {arguments.nectar[0]: first}
    files |= {p: cli.load_nectar(Path(p), model, tokenizer) for p in arguments.nectar[1:]}
    own = Path(arguments.questions) if arguments.questions else None
    result = evaluate(model, tokenizer, files, options=options, own=own)
    result["seconds"]["load"] = round(loaded, 2)
    if arguments.report:
        report.write(result, Path(arguments.report))
    if arguments.plot:
        report.plot(result, Path(arguments.plot))
    print(json.dumps(result) if arguments.json else table(result))


def evaluate(
    model: Any, tokenizer: Any, files: Mapping[str, Nectar], *, options: Options, own: Path | None = None
) -> dict[str, Any]:
    """Everything that the report shows, as one JSON object. files: Nectars of one text by name. own: a file of
    questions."""
    chosen = baselines.choose(options.baselines, slow=options.slow)
    first = next(iter(files.values()))
    if any((n.prefix, n.chunks) != (first.prefix, first.chunks) for n in files.values()):
        raise NectarError("the files are of different texts: evaluate them one by one")
    if first.metadata.get("config", {}).get("prefill") == "fixed":  # what that way of reading costs on its own
        chosen = list({b.name: b for b in (*chosen, *baselines.choose("sparse-prefill", slow=True))}.values())
    clock = Clock()
    geometry = adapter.route(model)
    with cli.progress("reading the context", len(first.prefix)) as done:
        context = chunks.read(model, first.prefix, geometry, chunks=first.chunks, progress=done)
    clock.lap("read")
    task = Task(
        model=model,
        tokenizer=tokenizer,
        geometry=geometry,
        context=context,
        rows=options.rows,
        seed=options.seed + 7_919,
        answer_tokens=options.answer_tokens,
    )
    asked = (
        questions.from_file(own, task) if own else questions.held_out(task, count=options.questions, seed=options.seed)
    )
    study = Study(task.n_heads, min(options.rows, 4096), geometry.head_dim, folder=None)
    questions.sample_answers(task, asked, seed=options.seed, study=study)
    asked = [a for a in asked if a.conversation.answer]
    clock.lap("answer")
    methods = build(task, files, chosen, exact=options.exact)
    clock.lap("build")
    measure(task, methods, asked)
    clock.lap("compare")
    errors = {m.label: head_errors(task, m.view, study) for m in methods}
    clock.lap("errors")
    told = summaries(methods, asked, errors)
    result = {
        "files": {name: _described(nectar) for name, nectar in files.items()},
        "model": first.metadata.get("model", ""),
        "context_tokens": len(first.prefix),
        "cache_bytes": geometry.cache_bytes(len(first.prefix)),
        "geometry": geometry.to_dict(),
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
        nothing = next(m.view for m in methods if m.name == NO_CONTEXT)
        sampled = answers.sample(task, asked, methods[0].view, nothing, seed=options.seed + 1)
        result["answers"] = answers.meaning(task, sampled, log=cli.say)
        result["examples"] = [asdict(s) for s in sampled]
        clock.lap("answers")
    result["peak_bytes"] = int(mx.get_peak_memory())
    return result


def _views(task: Task, methods: Sequence[Method]) -> dict[str, View]:
    full = View(banks=task.context.banks, windows=task.context.windows, start=task.context.start, nbytes=0)
    return {"full cache": full} | {m.label if m.view.nbytes else m.name: m.view for m in methods}


def head_errors(task: Task, view: View, rows: Study) -> list[float]:
    """The merged error of every head (layer by layer) over what the evaluation's answers asked; none for views that
    read another text than the context."""
    if view.start != task.context.start:
        return []
    K, found = task.geometry.n_kv_heads, list[float]()
    for layer, bank in enumerate(view.banks):
        found += np.array(regression.errors(bank, rows.heads(range(layer * K, layer * K + K)))).tolist()
    return [_rounded(x) for x in found]


def entropies(task: Task, rows: Study) -> np.ndarray:
    """The mean entropy of every head's exact attention to the context, in nats, [n_heads]."""
    K, found = task.geometry.n_kv_heads, list[float]()
    for layer in range(task.n_layers):
        captured = rows.heads(range(layer * K, layer * K + K), np.arange(0, rows.rows, max(1, rows.rows // 256)))
        weights = matching.attention_weights(captured, task.layer(layer)[0], scale=task.geometry.scale)
        found += np.array(-(weights * mx.log(mx.maximum(weights, 1e-30))).sum(-1).mean(1)).tolist()
    return np.array(found)


def by_entropy(entropy: np.ndarray, errors: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The mean merged error of each method over the quarters of the heads from the most peaked to the most diffuse."""
    return [
        {
            "entropy": _rounded(float(entropy[part].mean())),
            "errors": {label: _rounded(float(np.take(found, part).mean())) for label, found in errors.items() if found},
        }
        for part in np.array_split(np.argsort(entropy), min(4, len(entropy)))
    ]


def correlations(methods: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Rank correlations over all methods and files: does the heads' error, does the divergence, tell what is lost?"""
    fitted = [m for m in methods if m["error"] is not None]
    pairs = {
        "error, accuracy gap": ("error", "accuracy_gap"),
        "error, KL": ("error", "kl"),
        "KL, accuracy gap": ("kl", "accuracy_gap"),
    }
    found = {n: answers.rank_correlation([m[a] for m in fitted], [m[b] for m in fitted]) for n, (a, b) in pairs.items()}
    return {name: None if rho is None else round(rho, 3) for name, rho in found.items()}


def _described(nectar: Nectar) -> dict[str, Any]:
    told = {k: nectar.metadata.get(k) for k in ("source", "config", "layout", "nectar_mlx")}
    return {**told, "bytes": nectar.nbytes, "report": nectar.report}


def build(
    task: Task, files: Mapping[str, Nectar], chosen: Sequence[baselines.Baseline], *, exact: Sequence[float] = ()
) -> list[Method]:
    """The files themselves; no context, which every gap is measured against; the baselines, those that have a size
    at the
    size of each file."""
    methods = [method for name, nectar in files.items() for method in of_file(name, nectar, exact)]
    wanted = {b.name: b for b in (baselines.BASELINES[NO_CONTEXT], *chosen)}
    with cli.progress("building baselines", len(wanted) * len(files)) as done:
        if any(b.sized for b in wanted.values()):
            _ = task.studied  # so that its time is not the first method's
        for number, baseline in enumerate(wanted.values()):
            for name, nectar in list(files.items())[: None if baseline.sized else 1]:
                started = time.perf_counter()
                try:
                    view = baseline.build(task, nectar.nbytes)
                except NectarError as error:
                    cli.say(f"{baseline.name} is left out: {error}")
                    continue
                mx.eval([b.parameters for b in view.banks])
                seconds = time.perf_counter() - started
                methods.append(Method(name=baseline.name, file=name, view=view, seconds=seconds))
            done((number + 1) * len(files))
    return methods


def of_file(name: str, nectar: Nectar, exact: Sequence[float]) -> list[Method]:
    """The file as it answers by itself, and at each share of its keys, if there are any beside it."""
    seconds = float(sum(nectar.report.get("seconds", {}).values()))
    start, windows = nectar.start, nectar.windows

    def method(called: str, share: float | None) -> Method:
        banks = nectar.retrieving(share)
        router, read = (sum(b.selector.nbytes for b in banks), sum(b.step_bytes for b in banks)) if banks else (0, 0)
        detail = f"{read:,} bytes read a token" if banks else ""
        view = View(
            banks=banks or nectar.banks, windows=windows, start=start, nbytes=nectar.nbytes + router, detail=detail
        )
        return Method(name=called, file=name, view=view, seconds=seconds)

    shares = exact if nectar.keys is not None else ()
    return [method(FILE, None), *(method(f"{FILE}, {share:.1%} read", share) for share in shares)]


def measure(task: Task, methods: Sequence[Method], asked: Sequence[Asked]) -> None:
    """Gives every method its divergence from the full cache."""
    conversations = [a.conversation for a in asked]
    with cli.progress("comparing", len(asked)) as done:
        found = fidelity.compare(
            task.model,
            task.context.make_cache,
            {m.label: m.view.make_cache for m in methods},
            conversations,
            prompts={m.label: m.view.prompt for m in methods},
            progress=done,
        )
    for method in methods:
        method.divergence = found[method.label]


def summaries(
    methods: Sequence[Method], asked: Sequence[Asked], errors: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """One object a method. Its own figures are those of questions about the text (of all, if there are none)."""
    kinds = {k: [i for i, a in enumerate(asked) if a.kind == k] for k in dict.fromkeys(a.kind for a in asked)}
    nothing = next(m for m in methods if m.name == NO_CONTEXT)
    told = []
    for method in methods:
        by_kind = {k: _figures(method.divergence, nothing.divergence, i) for k, i in kinds.items()}
        told.append(
            {
                "method": method.name,
                "file": method.file,
                "bytes": method.view.nbytes,
                **by_kind.get(ON, next(iter(by_kind.values()))),
                "kinds": by_kind,
                "error": _rounded(float(np.mean(errors[method.label]))) if errors[method.label] else None,
                "seconds": round(method.seconds, 2),
                "detail": method.view.detail,
            }
        )
    return told


def _figures(ours: Divergence | None, nothing: Divergence | None, conversations: Sequence[int]) -> dict[str, Any]:
    """KL, agreement, gap closed and next-token accuracy gap over some conversations, with their intervals."""
    assert ours is not None and nothing is not None
    ours, nothing = ours.of(conversations), nothing.of(conversations)
    draws, at = Bootstrap(conversations), ours.conversation
    kl, baseline = draws.means(ours.kl, at), draws.means(nothing.kl, at)
    gap = ours.reference_correct.astype(float) - ours.correct.astype(float)
    estimates: dict[str, Estimate] = {
        "kl": fidelity.interval(kl),
        "agree": draws.mean(ours.agree, at),
        "gap_closed": fidelity.interval(1 - kl / np.maximum(baseline, 1e-9)),
        "accuracy_gap": draws.mean(gap, at),
    }
    figures: dict[str, Any] = {"tokens": len(at)}
    for name, estimate in estimates.items():
        figures[name] = _rounded(estimate.value)
        figures[f"{name}_interval"] = [_rounded(estimate.low), _rounded(estimate.high)]
    return figures


def _shares(text: str) -> tuple[float, ...]:
    return tuple(cli.share(part) for part in text.split(","))


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    full = result["cache_bytes"]
    kinds = list(result["methods"][0]["kinds"])
    several = len(result["files"]) > 1
    lines = [f"{result['context_tokens']:,} tokens; their bf16 KV cache takes {full:,} bytes", ""]
    lines.append(
        f"{'':26}{'bytes':>12}{'of cache':>10}{'KL':>9}{'':17}{'agree':>8}{'gap closed':>12}"
        + "".join(f"{'KL ' + k:>18}" for k in kinds if k != ON)
    )
    for m in sorted(result["methods"], key=lambda m: m["kl"]):
        low, high = m["kl_interval"]
        name = f"{m['method']} {Path(m['file']).name}" if several and m["bytes"] else m["method"]
        lines.append(
            f"{name:26}{m['bytes']:>12,}{m['bytes'] / full:>10.2%}{m['kl']:>9.4f}{f' ({low:.4f}–{high:.4f})':17}"
            f"{m['agree']:>8.1%}{m['gap_closed']:>12.1%}"
            + "".join(f"{m['kinds'][k]['kl']:>18.4f}" for k in kinds if k != ON)
        )
    if told := result["answers"]:
        lines += ["", f"similarity to the full cache's answers, by {told['by']}: the file {told['file']:.3f}, "]
        lines[-1] += f"a second full-cache sample {told['again']:.3f}, no context {told['nothing']:.3f}"
    if result["facts"]:
        lines += ["", "facts found: " + ", ".join(f"{f['method']} {f['found']:.0%}" for f in result["facts"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
