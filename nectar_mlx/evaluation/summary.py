"""The results of the comparison: figures with their intervals, errors by head, rank correlations, a table."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..baselines import NO_CONTEXT, EvalContext
from ..core.progress import Progress, silent
from ..core.types import DoubleArray, JsonObject
from ..fitting import verdict
from ..fitting.fidelity import Divergence
from ..fitting.samples.sample_store import SampleStore
from ..fitting.solve import attention_matching, regression
from .answers import rank_correlation
from .bootstrap import Bootstrap, Estimate, interval
from .charts import is_file
from .methods import Method
from .questions import ON, OWN_WORDS, Question


def head_errors(
    ctx: EvalContext, methods: Sequence[Method], store: SampleStore, *, progress: Progress = silent
) -> dict[str, list[float]]:
    """The merged error of every head (layer by layer) of every method, by its label, on the samples of the evaluation's
    answers; empty for views that read another text than the context."""
    K, errors = ctx.geometry.n_kv_heads, {m.label: list[float]() for m in methods}
    with progress("measuring the heads' errors", ctx.n_layers) as update:
        for layer in range(ctx.n_layers):
            samples = store.heads(range(layer * K, layer * K + K))
            for method in methods:
                if method.view.start == ctx.context.start:
                    of_layer = np.array(regression.errors(method.view.banks[layer], samples))
                    errors[method.label] += [_rounded(x) for x in of_layer.tolist()]
            update(layer + 1)
    return errors


def entropies(ctx: EvalContext, store: SampleStore) -> DoubleArray:
    """The mean entropy of every head's exact attention to the context, in nats, [n_heads]."""
    K, means = ctx.geometry.n_kv_heads, list[float]()
    # Random samples: those of a group's query heads are side by side, and a fixed stride may hit only one of them.
    chosen = np.sort(np.random.default_rng(0).permutation(store.count)[:256])
    for layer in range(ctx.n_layers):
        samples = store.heads(range(layer * K, layer * K + K), chosen)
        keys, bias = ctx.layer(layer)[0], ctx.bias(layer)
        weights = attention_matching.attention_weights(samples, keys, bias=bias, scale=ctx.geometry.scale)
        means += np.array(-(weights * mx.log(mx.maximum(weights, 1e-30))).sum(-1).mean(1)).tolist()
    return np.array(means)


def by_entropy(entropy: DoubleArray, errors: Mapping[str, Sequence[float]]) -> list[JsonObject]:
    """The mean merged error of each method over the quarters of the heads from the most peaked to the most diffuse."""
    return [
        {
            "entropy": _rounded(float(entropy[quarter].mean())),
            "errors": {label: _rounded(float(np.take(e, quarter).mean())) for label, e in errors.items() if e},
        }
        for quarter in np.array_split(np.argsort(entropy), min(4, len(entropy)))
    ]


def correlations(methods: Sequence[JsonObject]) -> dict[str, float | None]:
    """Rank correlations of the heads' error, the divergence and the accuracy lost: over all methods with heads of the
    context, and over the files alone."""
    pairs = {
        "error, accuracy gap": ("error", "accuracy_gap"),
        "error, KL": ("error", "kl"),
        "KL, accuracy gap": ("kl", "accuracy_gap"),
    }
    fitted = [m for m in methods if m["error"] is not None]
    coefficients = {}
    for name, (a, b) in pairs.items():
        for which, among in ((name, fitted), (f"{name}, files alone", [m for m in fitted if is_file(m["method"])])):
            rho = rank_correlation([m[a] for m in among], [m[b] for m in among])
            coefficients[which] = None if rho is None else round(rho, 3)
    return coefficients


def summaries(
    methods: Sequence[Method],
    questions: Sequence[Question],
    errors: Mapping[str, Sequence[float]],
    recited: npt.NDArray[np.bool_],
) -> list[JsonObject]:
    """One object a method. Its main figures are those of the questions about the text (of all, if there are none).

    recited: which answer tokens repeat the text. A file of a few nodes cannot recite, so a few such tokens dominate the
    mean; the kind "own words" is the answers about the text without them.
    """
    kinds = {k: sorted({q.number for q in questions if q.kind == k}) for k in dict.fromkeys(q.kind for q in questions)}
    floor = next(m for m in methods if m.name == NO_CONTEXT).divergence
    results = []
    for method in methods:
        ours = method.divergence
        assert ours is not None and floor is not None
        by_kind = {k: _figures(ours, floor, i) for k, i in kinds.items()}
        own = ~recited & np.isin(ours.conversation, kinds.get(ON, []))
        if own.any():
            by_kind[OWN_WORDS] = _figures(ours.where(own), floor.where(own), kinds[ON])
        results.append(
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
    return results


def _figures(ours: Divergence, floor: Divergence, questions: Sequence[int]) -> JsonObject:
    """KL, agreement, gap closed and next-token accuracy gap over some questions, with their intervals."""
    ours, floor = ours.of(questions), floor.of(questions)
    bootstrap, question = Bootstrap(questions), ours.conversation
    kl, baseline = bootstrap.means(ours.kl, question), bootstrap.means(floor.kl, question)
    gap = ours.reference_correct.astype(float) - ours.correct.astype(float)
    estimates: dict[str, Estimate] = {
        "kl": interval(kl),
        "agree": bootstrap.mean(ours.agree, question),
        "gap_closed": interval(1 - kl / np.maximum(baseline, 1e-9)),
        "accuracy_gap": bootstrap.mean(gap, question),
    }
    figures: JsonObject = {"tokens": len(question)}
    for name, estimate in estimates.items():
        figures[name] = _rounded(estimate.value)
        figures[f"{name}_interval"] = [_rounded(estimate.low), _rounded(estimate.high)]
    return figures


LEGEND = (
    "KL      how far answers are from the full text's, nats a token (95% interval)",
    "agree   share of tokens that are the same as with the full text",
    "gap     100%: answers as with the full text; 0%: as without it",
)


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")


def table(result: JsonObject) -> str:
    """The result for a terminal; lines have less than 100 columns unless names are long."""
    full, several = result["cache_bytes"], len(result["files"]) > 1
    methods = sorted(result["methods"], key=lambda m: float(m["kl"]))
    names = [_name(m["method"], m["file"] if several and m["bytes"] else "") for m in methods]
    kinds, wide = list(methods[0]["kinds"]), 2 + max(map(len, [*names, "full cache, two samples"]))
    lines = [*_verdicts(result), "", *LEGEND, ""]
    lines += [f"{result['context_tokens']:,} tokens; their bf16 KV cache takes {full:,} bytes", ""]
    lines.append(f"{'':{wide}}{'bytes':>11}{'of cache':>10}{'KL':>8}{'':17}{'agree':>7}{'gap':>7}")
    for name, m in zip(names, methods, strict=True):
        low, high = m["kl_interval"]
        lines.append(
            f"{name:{wide}}{m['bytes']:>11,}{m['bytes'] / full:>10.2%}{m['kl']:>8.4f}"
            f"{f' ({low:.4f}–{high:.4f})':17}{m['agree']:>7.1%}{m['gap_closed']:>7.1%}"
        )
    lines += ["", f"{'KL by kind':{wide - 2}}" + "".join(f"  {k}" for k in kinds)]
    for name, m in zip(names, methods, strict=True):
        lines.append(f"{name:{wide - 2}}" + "".join(f"{m['kinds'][k]['kl']:>{len(k) + 2}.4f}" for k in kinds))
    return "\n".join([*lines, *_meaning(result["answers"], several, wide), *_facts(result["facts"], several, wide)])


def _verdicts(result: JsonObject) -> list[str]:
    """How close each file is, in words: on this evaluation's questions, not those of its fit."""
    floor = next(m["kl"] for m in result["methods"] if m["method"] == NO_CONTEXT)
    lines = list[str]()
    for m in result["methods"]:
        if is_file(m["method"]):
            figures = {"kl": m["kl"], "gap_closed": m["gap_closed"], "kl_no_context": floor}
            words = verdict.sentence(figures, share=m["bytes"] / result["cache_bytes"])
            lines += textwrap.wrap(f"{_name(m['method'], m['file'])}: {words}", 78, break_on_hyphens=False)
    return lines


def _name(method: str, file: str) -> str:
    return f"{method} {Path(file).name}" if file else method


def _meaning(answers: JsonObject, several: bool, wide: int) -> list[str]:
    if not answers:
        return []
    ours = [(Path(n).name if several else "the file", f["similarity"]) for n, f in answers["files"].items()]
    intervals = [f["similarity_interval"] for f in answers["files"].values()]
    rows = zip(
        [*ours, ("full cache, two samples", answers["again"]), ("no context", answers["nothing"])],
        [*intervals, answers["again_interval"], answers["nothing_interval"]],
        strict=True,
    )
    lines = ["", f"similarity to the full cache's answers, by {answers['by']}"]
    return lines + [f"{name:{wide}}{value:>7.3f} ({low:.3f}–{high:.3f})" for (name, value), (low, high) in rows]


def _facts(facts: Sequence[JsonObject], several: bool, wide: int) -> list[str]:
    if not facts:
        return []
    lines = ["", f"{'facts found':{wide}}{'all':>5}{'':14}  by quarters of the text"]
    for f in facts:
        method, _, file = f["method"].partition(" @ ")
        low, high = f["found_interval"]
        quarters = "".join("       –" if q is None else f"{q:>8.0%}" for q in f["quarters"])
        name = _name(method, file if several else "")
        lines.append(f"{name:{wide}}{f['found']:>5.0%}{f' ({low:.0%}–{high:.0%})':14}{quarters}")
    return lines
