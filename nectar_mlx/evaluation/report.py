"""A result of `evaluate` as one page: HTML with its style and charts inside, without network or scripts."""

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..core import plotting
from ..core.files import write_atomically
from ..core.types import JsonObject
from . import charts
from .charts import FILE, is_file
from .questions import OFF, ON

_EXAMPLES = 8  # answers that are shown side by side
_SAME_SIZE = 0.9  # a file of more than this share of a larger one counts as its size


def write(result: JsonObject, path: Path) -> None:
    """Writes the page; NectarError if it cannot be written."""
    write_atomically(path, lambda file: file.write(page(result).encode()))


def page(result: JsonObject) -> str:
    """The page for what `evaluate` returns (or printed with --json)."""
    template = Template(resources.files("nectar_mlx.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    name, nectar = next(iter(result["files"].items()))
    best = result["methods"][0]
    return template.substitute(
        title=html.escape(Path(name).name),
        lead=_lead(result, best),
        tiles=_tiles(result, best),
        curve=charts.curve(result["methods"], result["cache_bytes"]),
        table=_table(result),
        times=_times(result["methods"]),
        heads=_heads(result, nectar),
        kinds=_kinds(result["methods"]),
        scatter=_correlation(result),
        facts=_facts(result),
        answers=_answers(result),
        provenance=_provenance(result, nectar),
    )


def _lead(result: JsonObject, best: JsonObject) -> str:
    asked = [q for q in result["questions"] if q["kind"] == ON]
    return (
        f"{html.escape(Path(result['model']).name)} read {result['context_tokens']:,} tokens once. The file keeps "
        f"{charts.size(best['bytes'])} in place of a {charts.size(result['cache_bytes'])} KV cache, "
        f"<b>{result['cache_bytes'] / best['bytes']:.0f}&thinsp;×</b> less. On {len(asked)} held-out questions, "
        f"answered with the full cache and compared token by token, it closes <b>{best['gap_closed']:.1%}</b> of "
        "the gap between no context and the full cache."
    )


def _tiles(result: JsonObject, best: JsonObject) -> str:
    low, high = best["gap_closed_interval"]
    saved = "what the file saves before every first answer"
    tiles = [
        ("Gap closed", f"{best['gap_closed']:.1%}", f"95% interval {low:.1%} to {high:.1%}"),
        ("Divergence", f"{best['kl']:.4f}", f"nats a token; {best['tokens']:,} answer tokens"),
        ("Same next token", f"{best['agree']:.1%}", "as the full cache's first choice"),
        ("Bytes", charts.size(best["bytes"]), f"{best['bytes'] / result['cache_bytes']:.2%} of the bf16 KV cache"),
        ("Reading the context", f"{result['seconds']['read']:.1f} s", saved),
    ]
    if answers := result["answers"]:
        note = f"cosine to full-cache answers; those among each other: {answers['again']:.2f}"
        ours = next(iter(answers["files"].values()))
        tiles.append(("Same meaning", f"{ours['similarity']:.2f}", note))
    rows = "".join(f"<div class=tile><h3>{a}</h3><p class=big>{b}</p><p>{c}</p></div>" for a, b, c in tiles)
    return f"<div class=tiles>{rows}</div>"


def _table(result: JsonObject) -> str:
    heads = ["method", "bytes", "of cache", "KL", "agree", "gap closed", "accuracy lost", "KL off-context", "s to make"]
    groups = _by_size(result["methods"])
    rows = []
    for title, group in groups.items():
        if len(groups) > 1:
            rows.append(f"<tr class=size><td colspan={len(heads)}>{title}</td></tr>")
        rows += [_row(m, result) for m in sorted(group, key=lambda m: float(m["kl"]))]
    note = (
        "Sized methods have the bytes of a file. Intervals: 95%, bootstrap over questions. A baseline's seconds do not "
        "include its self-study conversations; a file's do."
    )
    head = "".join(f"<th>{h}</th>" for h in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=wide>{table}</div><p class=note>{note}</p>"


def _times(methods: Sequence[JsonObject]) -> str:
    if not (drawing := charts.times(methods)):
        return ""
    return (
        "<section><h2>Fidelity against time</h2><p>What a longer fit buys at the first file's size: seconds from text "
        f"to file, from the report of each fit.</p><figure>{drawing}</figure></section>"
    )


def _by_size(methods: Sequence[JsonObject]) -> dict[str, list[JsonObject]]:
    """The methods by the largest file that is no smaller, those of several files by size, the others by themselves."""
    own = [m for m in methods if is_file(m["method"])]
    tops: list[int] = []
    for nbytes in sorted((m["bytes"] for m in own), reverse=True):
        if not tops or nbytes < _SAME_SIZE * tops[-1]:
            tops.append(nbytes)
    groups: dict[str, list[JsonObject]] = {f"At most {charts.size(top)}": [] for top in reversed(tops)}
    for m in methods:
        above = [top for top in tops if m["bytes"] <= top]
        if m["bytes"] and above:
            groups[f"At most {charts.size(min(above))}"].append(m)
    placed = {id(m) for group in groups.values() for m in group}
    groups["Other sizes"] = [m for m in methods if id(m) not in placed]
    return groups if len(tops) > 1 else {"": list(methods)}


def _row(m: JsonObject, result: JsonObject) -> str:
    name, own = m["method"], is_file(m["method"])
    if own:  # the file's name in place of the kind; the share of exact keys stays
        kind = (result["files"].get(m["file"], {}).get("layout") or {}).get("kind")
        name = ", ".join([Path(m["file"]).name, *(word for word in name.split(", ")[1:] if word != kind)])
    sized = f" <small>{html.escape(m['detail'])}</small>" if m["detail"] else ""
    off = m["kinds"].get(OFF)
    cells = [
        f"{html.escape(name)}{sized}",
        f"{m['bytes']:,}",
        f"{m['bytes'] / result['cache_bytes']:.2%}",
        f"{m['kl']:.4f} <small>{m['kl_interval'][0]:.4f}–{m['kl_interval'][1]:.4f}</small>",
        f"{m['agree']:.1%}",
        f"{m['gap_closed']:.1%}",
        f"{m['accuracy_gap']:.1%}",
        f"{off['kl']:.4f}" if off else "–",
        f"{m['seconds']:.1f}" if m["seconds"] else "–",
    ]
    return f"<tr{' class=own' if own else ''}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _heads(result: JsonObject, nectar: JsonObject) -> str:
    heads = result["geometry"]["n_kv_heads"]
    parts = []
    if result["heads"]:
        title = "Error of each head's merged output, relative to its variance"
        parts.append(charts.heat(result["heads"], heads, unit=lambda v: f"{v:.2g}", title=title))
    if sizes := nectar["report"].get("sizes"):
        counts = [float(size[0]) for size in sizes]
        parts.append(charts.heat(counts, heads, unit=lambda v: f"{v:.0f}", title="Nodes or hidden units of each head"))
    return "".join(parts) or "<p>The file's heads are exact.</p>"


def _kinds(methods: Sequence[JsonObject]) -> str:
    """Divergence by kind of question, as bars, for the methods of the first file's size."""
    shown = [m for m in methods if m["file"] == methods[0]["file"]]
    kinds = list(methods[0]["kinds"])
    parts = []
    for kind in kinds:
        rows, top = [], max(m["kinds"][kind]["kl"] for m in shown) or 1.0
        for m in sorted(shown, key=lambda m: float(m["kinds"][kind]["kl"])):
            own = is_file(m["method"])
            kl, name = m["kinds"][kind]["kl"], "this file" if m is methods[0] else html.escape(m["method"])
            bar = f'<i style="width:{100 * kl / top:.1f}%"></i>'
            rows.append(f"<tr{' class=own' if own else ''}><td>{name}<td class=bars>{bar}<td>{kl:.4f}")
        parts.append(f"<div><h3>{kind}</h3><table class=mini>{''.join(rows)}</table></div>")
    return f"<div class=kinds>{''.join(parts)}</div>"


def _correlation(result: JsonObject) -> str:
    points = [m for m in result["methods"] if m["error"]]
    if len(points) < 3 or result["correlation"].get("error, accuracy gap") is None:
        return ""
    coefficients = result["correlation"].items()
    others = "".join(f"<li>{html.escape(n)}: <b>{v:.2f}</b>" for n, v in coefficients if v is not None)
    return (
        f"<section><h2>Error and accuracy</h2><div class=pair><figure>{charts.scatter(points)}</figure><div>"
        "<p>Next-token accuracy lost against the heads' mean merged error, one mark a method and size. "
        f"Rank correlations over {len(points)} of them:</p><ul>{others}</ul></div></div></section>"
    )


def _facts(result: JsonObject) -> str:
    if not result["facts"]:
        return ""
    rows = []
    for fact in result["facts"]:
        name, _, file = str(fact["method"]).partition(" @ ")
        name = html.escape(Path(file).name if is_file(name) and len(result["files"]) > 1 else name)
        low, high = fact["found_interval"]
        right = sorted(fact["right"], key=lambda r: r[0] or 0)
        hits = "".join(f"<i class={'hit' if hit else 'miss'}></i>" for _, hit in right)
        share = f"{fact['found']:.0%}<td><small>{low:.0%}–{high:.0%}</small>"
        rows.append(f"<tr><td>{name}<td>{share}<td class=hits>{hits}")
    return (
        "<section><h2>Facts found</h2><p>Questions with one right answer; the text's beginning left, its end right. "
        "Intervals: 95%, over questions.</p>"
        f"<table class=mini>{''.join(rows)}</table></section>"
    )


def _answers(result: JsonObject) -> str:
    if not result["examples"]:
        return ""
    answers, articles = result["answers"], []
    names = (("full", "full cache"), ("file", "this file"), ("nothing", "no context"))
    first = {e["question"]: e for e in reversed(result["examples"])}
    for example in [first[q] for q in dict.fromkeys(e["question"] for e in result["examples"])][:_EXAMPLES]:
        shown = {**example, "file": next(iter(example["files"].values()))}
        columns = "".join(f"<div class={k}><h4>{n}</h4><p>{html.escape(shown[k])}</p></div>" for k, n in names)
        articles.append(
            f"<article><h3>{html.escape(example['question'])}</h3><div class=sides>{columns}</div></article>"
        )
    called = ["this file"] if len(answers["files"]) == 1 else [Path(name).name for name in answers["files"]]
    rows = [
        (n, f["similarity"], f["similarity_interval"]) for n, f in zip(called, answers["files"].values(), strict=True)
    ]
    rows.append(("the full cache's to each other", answers["again"], answers["again_interval"]))
    rows.append(("no context", answers["nothing"], answers["nothing_interval"]))
    meaning = "".join(
        f"<tr{' class=own' if n in called else ''}><td>{html.escape(n)}<td class=bars>"
        f'<i style="width:{100 * max(0.0, v):.1f}%"></i><td>{v:.3f}<td><small>{a:.3f}–{b:.3f}</small>'
        for n, v, (a, b) in rows
    )
    return (
        "<section><h2>Answers side by side</h2><p>Sampled at the same temperature. Mean similarity to the full cache's "
        f"answers to the same question, by {html.escape(answers['by'])}, {answers['answers']} answers; intervals over "
        f"questions.</p><table class=mini>{meaning}</table>{''.join(articles)}</section>"
    )


def _provenance(result: JsonObject, nectar: JsonObject) -> str:
    config, layout = nectar.get("config") or {}, nectar.get("layout") or {}
    fitted = nectar["report"].get("seconds") or {}
    entries = {
        "model": Path(result["model"]).name,
        "text": nectar.get("source") or "unknown",
        "kind": f"{layout.get('kind', '?')}, {layout.get('bits', '?')} bits",
        "fitted": ", ".join(f"{k} {v:g} s" for k, v in fitted.items()) or "unknown",
        "budget": config.get("budget", "unknown"),
        "queries a head": nectar["report"].get("queries", config.get("queries", "unknown")),
        "seeds": f"fit {config.get('seed', '?')}",
        "evaluation": ", ".join(f"{k} {v:g} s" for k, v in result["seconds"].items()),
        "peak memory of the evaluation": charts.size(result["peak_bytes"]),
        "nectar_mlx": nectar.get("nectar_mlx", "?"),
    }
    return "<dl>" + "".join(f"<dt>{k}<dd>{html.escape(str(v))}" for k, v in entries.items()) + "</dl>"


def plot(result: JsonObject, path: Path) -> None:
    """Divergence against bytes as a PNG (or what else the name's ending says); NectarError without matplotlib."""
    plotting.check(path)
    methods = result["methods"]
    files, best = charts.of_one_size(methods)
    timed = len({m["seconds"] for m in files}) > 1
    figure, panels = plotting.subplots(1, 2 if timed else 1, figsize=(17 if timed else 9, 5.5), dpi=150, squeeze=False)
    _panel(panels[0, 0], [m for m in methods if m["bytes"] > 0], "bytes", "bytes kept")
    panels[0, 0].axvline(result["cache_bytes"], color="grey", linestyle=":", label="full cache")
    if timed:
        _panel(panels[0, 1], files, "seconds", "seconds from text to file, of the files of the first one's size")
        for m in files:
            place = m["seconds"], m["kl"]
            panels[0, 1].annotate(Path(m["file"]).stem, place, (6, 6), textcoords="offset points", fontsize=8)
        if best is not None:
            panels[0, 1].axhline(best["kl"], color="grey", linestyle=":", label=best["method"])
    for axes, unit in zip(panels[0], (charts.size, "{:g}".format), strict=False):
        low, high = axes.get_xlim()
        ticks = charts.Axis(low, high, 0, 1).ticks()
        axes.set_xticks(ticks, [unit(t) for t in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25, which="both")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    plotting.save(figure, path)


def _panel(axes: Any, placed: Sequence[JsonObject], x: str, below: str) -> None:
    """Divergence with its intervals, a colour a method, on log axes."""
    names = list(dict.fromkeys(m["method"] for m in placed))
    for number, name in enumerate(names):
        points = sorted((m for m in placed if m["method"] == name), key=lambda m: float(m[x]))
        own, label = is_file(name), "this file" if name == FILE else name
        line = charts.lowest(points, x)
        colour = "black" if own and name == names[0] else f"C{number % 10}"
        axes.plot([m[x] for m in line], [m["kl"] for m in line], color=colour, linewidth=2.5 if own else 1)
        spread = [[m["kl"] - m["kl_interval"][0] for m in points], [m["kl_interval"][1] - m["kl"] for m in points]]
        place, marker = ([m[x] for m in points], [m["kl"] for m in points]), "osD^vP"[number // 10 % 6]
        axes.errorbar(*place, yerr=spread, fmt=marker, color=colour, label=label, elinewidth=1, zorder=5 if own else 2)
    axes.set(xscale="log", yscale="log", xlabel=below, ylabel="KL from the full cache, nats a token")
    axes.margins(x=0.15)
