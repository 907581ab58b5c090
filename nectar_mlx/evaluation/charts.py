"""The report's charts as SVG text. Colours come from the page's style: `--c0` … `--c7`, `--accent` for the file."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.types import JsonObject

FILE = "nectar"  # files of several kinds are "nectar, mlp" and so on
SAME = 0.05  # files whose sizes differ by a smaller share count as equal
_HUES = 8


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high` over pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        """With a margin on both sides of the positive values; 0.1 … 1 if there are none."""
        positive = [v for v in values if v > 0] or [0.1, 1.0]
        return cls(min(positive) / 1.25, max(positive) * 1.25, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside, the roundest that are enough."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            ticks = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            if len(ticks) >= 4:
                break
        return ticks


def curve(methods: Sequence[JsonObject], full: int) -> str:
    """Divergence against bytes of every method, log axes; a method with several sizes is a line."""
    placed = [m for m in methods if m["bytes"] > 0 and m["kl"] > 0]
    floors = [(f"no context {m['kl']:.3f}", m["kl"]) for m in methods if m["method"] == "no context" and m["kl"] > 0]
    chart = _Chart(x="bytes", unit=size, edge=(f"full cache {size(full)}", full), floors=floors)
    return chart.draw(placed, "bytes kept", "Divergence from the full cache against bytes kept, for every method")


def times(methods: Sequence[JsonObject]) -> str:
    """Divergence against the seconds from text to file, log axes, of the files as large as the first one, with the best
    baseline of that size; "" if all took the same time."""
    files, best = of_one_size(methods)
    if len({m["seconds"] for m in files}) < 2:
        return ""
    floors = [] if best is None else [(f"{best['method']} {best['kl']:.3f}", best["kl"])]
    chart = _Chart(x="seconds", unit=lambda s: f"{s:g} s", floors=floors, named=True)
    return chart.draw(files, "from text to file", "Divergence from the full cache against the seconds a fit took")


def of_one_size(
    methods: Sequence[JsonObject],
) -> tuple[list[JsonObject], JsonObject | None]:
    """The files as large as the first one whose fitting time is known, and the best baseline of that size."""
    alike = [m for m in methods if abs(m["bytes"] / methods[0]["bytes"] - 1) < SAME and m["kl"] > 0]
    files = [m for m in alike if is_file(m["method"]) and m["seconds"] > 0]
    baselines = [m for m in alike if not is_file(m["method"])]
    return files, min(baselines, key=lambda m: float(m["kl"]), default=None)


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """Divergence against a figure of the methods. edge, floors: labels and positions of lines across the chart. named:
    whether every mark shows its file's name."""

    x: str
    unit: Callable[[float], str]
    edge: tuple[str, float] | None = None
    floors: Sequence[tuple[str, float]] = ()
    named: bool = False

    def draw(self, placed: Sequence[JsonObject], below: str, title: str) -> str:
        width, height, left, right, top, bottom = 944, 470, 64, 680, 14, 418
        names = list(dict.fromkeys(m["method"] for m in placed))
        x = Axis.around([*(m[self.x] for m in placed), *([self.edge[1]] if self.edge else [])], left, right)
        y = Axis.around([*(m["kl"] for m in placed), *(kl for _, kl in self.floors)], bottom, top)
        elements = [_grid(x, y, right, bottom, self.unit)]
        if self.edge:
            elements.append(_line("floor", x(self.edge[1]), top, x(self.edge[1]), bottom))
            elements.append(_text(x(self.edge[1]), bottom + 34, self.edge[0], "note", "middle"))
        for note, kl in self.floors:
            elements.append(_line("floor", left, y(kl), right, y(kl)))
            elements.append(_text(left + 6, y(kl) - 6, note, "note"))
        labels = []
        for name in names:
            points = sorted((m for m in placed if m["method"] == name), key=lambda m: float(m[self.x]))
            path = [(x(m[self.x]), y(m["kl"])) for m in lowest(points, self.x)]
            drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in path)
            elements.append(f'<polyline class=curve points="{drawn}" {_style(name, names)}/>')
            elements += [self._point(m, x, y, names) for m in points]
            labels.append((path[-1][1], path[-1][0], name))
        elements += _labels(labels, names, right + 14, top, bottom)
        elements.append(_text((left + right) / 2, height - 8, below, "axis", "middle"))
        up = f'transform="rotate(-90 14 {(top + bottom) / 2})"'
        elements.append(_text(14, (top + bottom) / 2, "KL from the full cache, nats a token", "axis", "middle", up))
        return svg(width, height, elements, title)

    def _point(self, m: JsonObject, x: Axis, y: Axis, names: Sequence[str]) -> str:
        """A mark with its interval."""
        name, a, b = m["method"], x(m[self.x]), y(m["kl"])
        low, high = [y(min(max(v, y.low), y.high)) for v in m["kl_interval"]]
        title = Path(m["file"]).name if is_file(name) else name
        time = f", {m['seconds']:.3g} s" if m["seconds"] else ""
        note = f"{title}: {size(m['bytes'])}{time}, KL {m['kl']:.4f}, agree {m['agree']:.1%}"
        bar = _line("bar", a, high, a, low, _style(name, names))
        label = _text(a + 10, b - 8, Path(m["file"]).stem, "tick") if self.named else ""
        return bar + _mark(a, b, name, names, note) + label


def lowest(points: Sequence[JsonObject], x: str) -> list[JsonObject]:
    """The points of a line: of points with nearly the same x the one of the least divergence. points: in order of x."""
    line: list[JsonObject] = []
    for m in points:
        if not line or m[x] > line[-1][x] * (1 + SAME):
            line.append(m)
        elif m["kl"] < line[-1]["kl"]:
            line[-1] = m
    return line


def _grid(x: Axis, y: Axis, right: float, bottom: float, unit: Callable[[float], str]) -> str:
    lines = []
    for value in x.ticks():
        at = x(value)
        lines.append(_line("grid", at, y.end, at, bottom))
        lines.append(_text(at, bottom + 18, unit(value), "tick", "middle"))
    for value in y.ticks():
        at = y(value)
        lines.append(_line("grid", x.start, at, right, at))
        lines.append(_text(x.start - 8, at + 4, f"{value:g}", "tick", "end"))
    return "".join(lines)


def is_file(name: str) -> bool:
    """Whether a method's name is that of a file, not of a baseline."""
    return name.split(",")[0] == FILE


def _style(name: str, names: Sequence[str]) -> str:
    """The first of the files' names has the accent."""
    first = next((n for n in names if is_file(n)), None)
    others = [n for n in names if n != first]
    colour = "--accent" if name == first else f"--c{others.index(name) % _HUES}"
    return f'style="--c:var({colour})"'


def _mark(x: float, y: float, name: str, names: Sequence[str], note: str) -> str:
    """A dot with a tooltip."""
    shape = 'class=own r="7"' if is_file(name) else 'class=mark r="5"'
    place = f'cx="{x:.1f}" cy="{y:.1f}" {_style(name, names)}'
    return f"<circle {shape} {place}><title>{html.escape(note)}</title></circle>"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    return f'<line class={kind} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", more: str = "") -> str:
    return f'<text class={kind} x="{x:.1f}" y="{y:.1f}" text-anchor={anchor} {more}>{html.escape(text)}</text>'


def _labels(
    labels: Sequence[tuple[float, float, str]], names: Sequence[str], x: float, top: float, bottom: float
) -> list[str]:
    """Names at the right, moved apart where they would overlap, each with a line to its last mark at (y, x)."""
    ordered, gap = sorted(labels), 19.0
    heights = [max(top + 6, y) for y, *_ in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], bottom - gap * (len(heights) - 1 - i))
    elements = []
    for at, (my, mx, name) in zip(heights, ordered, strict=True):
        path = f"{mx + 8:.1f},{my:.1f} {x - 10:.1f},{at:.1f} {x - 2:.1f},{at:.1f}"
        elements.append(f'<polyline class=lead points="{path}" {_style(name, names)}/>')
        shown = "this file" if name == FILE else name
        kind = "label-own" if is_file(name) else "label"
        elements.append(_text(x + 2, at + 4, shown, kind, more=_style(name, names)))
    return elements


def scatter(points: Sequence[JsonObject]) -> str:
    """Next-token accuracy lost against the mean error of the heads (log axis), a mark a method."""
    width, height, left, bottom = 560, 320, 64, 272
    x = Axis.around([m["error"] for m in points], left, width - 20)
    gaps = [100 * m["accuracy_gap"] for m in points]
    low, high = min(0.0, *gaps) - 1, max(1.0, *gaps) + 1

    def y(value: float) -> float:
        return float(bottom - (value - low) / (high - low) * (bottom - 16))

    names, elements = list(dict.fromkeys(m["method"] for m in points)), list[str]()
    for value in x.ticks():
        elements.append(_line("grid", x(value), 16, x(value), bottom))
        elements.append(_text(x(value), bottom + 18, f"{value:g}", "tick", "middle"))
    for step in range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5))):
        elements.append(_line("grid", left, y(step), width - 20, y(step)))
        elements.append(_text(left - 8, y(step) + 4, f"{step}%", "tick", "end"))
    for m, gap in zip(points, gaps, strict=True):
        note = f"{m['method']}: error {m['error']:.3g}, accuracy lost {gap:.1f}%"
        elements.append(_mark(x(m["error"]), y(gap), m["method"], names, note))
    elements.append(_text((left + width - 20) / 2, height - 8, "mean error of the heads", "axis", "middle"))
    return svg(width, height, elements, "Next-token accuracy lost against the heads' error")


def heat(values: Sequence[float], n_kv_heads: int, *, unit: Callable[[float], str], title: str) -> str:
    """Layers from left to right, heads from top to bottom, darker for more (log scale)."""
    columns = len(values) // n_kv_heads
    cell = max(9, min(26, 860 // max(columns, 1)))
    positive = [v for v in values if v > 0] or [1.0]
    low, high = math.log(min(positive)), math.log(max(positive))
    left, elements = 46, list[str]()
    for i, value in enumerate(values):
        layer, head = divmod(i, n_kv_heads)
        share = (math.log(max(value, min(positive))) - low) / (high - low) if high > low else 1.0
        elements.append(
            f'<rect x="{left + layer * cell}" y="{head * cell}" width="{cell - 1}" height="{cell - 1}" rx=2 '
            f'style="fill:color-mix(in oklab, var(--accent) {8 + 92 * share:.0f}%, var(--paper))">'
            f"<title>layer {layer}, head {head}: {unit(value)}</title></rect>"
        )
    for head in range(n_kv_heads):
        elements.append(_text(left - 8, head * cell + cell / 2 + 4, f"h{head}", "tick", "end"))
    bottom = n_kv_heads * cell + 14
    for layer in range(0, columns, 5 if columns > 12 else 1):
        elements.append(_text(left + layer * cell + cell / 2, bottom, str(layer), "tick", "middle"))
    scale = f"from {unit(min(positive))} (light) to {unit(max(positive))} (dark), logarithmic"
    drawing = svg(left + columns * cell + 4, bottom + 6, elements, title)
    return f"<figure>{drawing}<figcaption><b>{title}</b>, {scale}</figcaption></figure>"


def svg(width: float, height: float, elements: Sequence[str], title: str) -> str:
    shape = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    return f'<svg {shape} role=img aria-label="{html.escape(title, quote=True)}">{"".join(elements)}</svg>'


def size(nbytes: float) -> str:
    """Bytes for a person: 480 KB, 4.4 MB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"
