"""What the comparison tells: figures with their intervals, errors by head, rank correlations, a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import cli
from ..baselines import NO_CONTEXT, EvalContext
from ..fitting.fidelity import Divergence
from ..fitting.samples.sample_store import SampleStore
from ..fitting.solve import attention_matching, regression
from . import answers
from .bootstrap import Bootstrap, Estimate, interval
from .charts import is_file
from .methods import Method
from .questions import ON, OWN_WORDS, Asked


def head_errors(task: EvalContext, methods: Sequence[Method], rows: SampleStore) -> dict[str, list[float]]:
    """The merged error of every head (layer by layer) of every method, by its label, over what the evaluation's answers
    asked; none for views that read another text than the context."""
    K, found = task.geometry.n_kv_heads, {m.label: list[float]() for m in methods}
    with cli.progress("looking at the heads", task.n_layers) as done:
        for layer in range(task.n_layers):
            captured = rows.heads(range(layer * K, layer * K + K))
            for method in methods:
                if method.view.start == task.context.start:
                    errors = regression.errors(method.view.banks[layer], captured)
                    found[method.label] += [_rounded(x) for x in np.array(errors).tolist()]
            done(layer + 1)
    return found


def entropies(task: EvalContext, rows: SampleStore) -> np.ndarray:
    """The mean entropy of every head's exact attention to the context, in nats, [n_heads]."""
    K, found = task.geometry.n_kv_heads, list[float]()
    # At random: rows of a group's query heads lie side by side, and a fixed distance may find one of them alone.
    chosen = np.sort(np.random.default_rng(0).permutation(rows.count)[:256])
    for layer in range(task.n_layers):
        captured = rows.heads(range(layer * K, layer * K + K), chosen)
        keys, bias = task.layer(layer)[0], task.bias(layer)
        weights = attention_matching.attention_weights(captured, keys, bias=bias, scale=task.geometry.scale)
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
    """Rank correlations: does the heads' error, does the divergence, tell what is lost? Over all methods that have
    heads of the context, and over the files alone."""
    pairs = {
        "error, accuracy gap": ("error", "accuracy_gap"),
        "error, KL": ("error", "kl"),
        "KL, accuracy gap": ("kl", "accuracy_gap"),
    }
    fitted = [m for m in methods if m["error"] is not None]
    found = {}
    for name, (a, b) in pairs.items():
        for which, among in ((name, fitted), (f"{name}, files alone", [m for m in fitted if is_file(m["method"])])):
            rho = answers.rank_correlation([m[a] for m in among], [m[b] for m in among])
            found[which] = None if rho is None else round(rho, 3)
    return found


def summaries(
    methods: Sequence[Method], asked: Sequence[Asked], errors: Mapping[str, Sequence[float]], recited: np.ndarray
) -> list[dict[str, Any]]:
    """One object a method. Its own figures are those of questions about the text (of all, if there are none).

    recited: which answer tokens repeat the text. A file of a few nodes cannot recite, so that a few such tokens weigh
    more in a mean than all others; the kind "own words" is the answers about the text without them.
    """
    kinds = {k: sorted({a.number for a in asked if a.kind == k}) for k in dict.fromkeys(a.kind for a in asked)}
    nothing = next(m for m in methods if m.name == NO_CONTEXT)
    told = []
    for method in methods:
        assert method.divergence is not None and nothing.divergence is not None
        ours, floor = method.divergence, nothing.divergence
        by_kind = {k: _figures(ours, floor, i) for k, i in kinds.items()}
        own = ~recited & np.isin(ours.conversation, kinds.get(ON, []))
        if own.any():
            by_kind[OWN_WORDS] = _figures(ours.where(own), floor.where(own), kinds[ON])
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


def _figures(ours: Divergence, nothing: Divergence, questions: Sequence[int]) -> dict[str, Any]:
    """KL, agreement, gap closed and next-token accuracy gap over some questions, with their intervals."""
    ours, nothing = ours.of(questions), nothing.of(questions)
    draws, at = Bootstrap(questions), ours.conversation
    kl, baseline = draws.means(ours.kl, at), draws.means(nothing.kl, at)
    gap = ours.reference_correct.astype(float) - ours.correct.astype(float)
    estimates: dict[str, Estimate] = {
        "kl": interval(kl),
        "agree": draws.mean(ours.agree, at),
        "gap_closed": interval(1 - kl / np.maximum(baseline, 1e-9)),
        "accuracy_gap": draws.mean(gap, at),
    }
    figures: dict[str, Any] = {"tokens": len(at)}
    for name, estimate in estimates.items():
        figures[name] = _rounded(estimate.value)
        figures[f"{name}_interval"] = [_rounded(estimate.low), _rounded(estimate.high)]
    return figures


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal, in lines of less than 100 columns where names are not long."""
    full, several = result["cache_bytes"], len(result["files"]) > 1
    methods = sorted(result["methods"], key=lambda m: float(m["kl"]))
    names = [_name(m["method"], m["file"] if several and m["bytes"] else "") for m in methods]
    kinds, wide = list(methods[0]["kinds"]), 2 + max(map(len, [*names, "full cache, two samples"]))
    lines = [f"{result['context_tokens']:,} tokens; their bf16 KV cache takes {full:,} bytes", ""]
    lines.append(f"{'':{wide}}{'bytes':>11}{'of cache':>10}{'KL':>8}{'':17}{'agree':>7}{'gap':>7}")
    for name, m in zip(names, methods, strict=True):
        low, high = m["kl_interval"]
        lines.append(
            f"{name:{wide}}{m['bytes']:>11,}{m['bytes'] / full:>10.2%}{m['kl']:>8.4f}"
            f"{f' ({low:.4f}–{high:.4f})':17}{m['agree']:>7.1%}{m['gap_closed']:>7.1%}"
        )
    lines += ["", f"{'KL by kind':{wide}}" + "".join(f"{k:>13}" for k in kinds)]
    for name, m in zip(names, methods, strict=True):
        lines.append(f"{name:{wide}}" + "".join(f"{m['kinds'][k]['kl']:>13.4f}" for k in kinds))
    return "\n".join([*lines, *_meaning(result["answers"], several, wide), *_facts(result["facts"], several, wide)])


def _name(method: str, file: str) -> str:
    return f"{method} {Path(file).name}" if file else method


def _meaning(told: Mapping[str, Any], several: bool, wide: int) -> list[str]:
    if not told:
        return []
    ours = [(Path(n).name if several else "the file", f["similarity"]) for n, f in told["files"].items()]
    intervals = [f["similarity_interval"] for f in told["files"].values()]
    rows = zip(
        [*ours, ("full cache, two samples", told["again"]), ("no context", told["nothing"])],
        [*intervals, told["again_interval"], told["nothing_interval"]],
        strict=True,
    )
    lines = ["", f"similarity to the full cache's answers, by {told['by']}"]
    return lines + [f"{name:{wide}}{value:>7.3f} ({low:.3f}–{high:.3f})" for (name, value), (low, high) in rows]


def _facts(facts: Sequence[Mapping[str, Any]], several: bool, wide: int) -> list[str]:
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
