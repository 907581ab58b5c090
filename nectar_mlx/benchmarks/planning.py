"""The page of what fits would take, docs/planning.md: calculated, as `nectar plan` does.

python -m nectar_mlx.benchmarks.planning > docs/planning.md
"""

from collections.abc import Iterable, Sequence
from functools import cache

from ..core.clock import duration
from ..core.types import JsonObject
from ..fitting.machines import MACHINES, SHAPES, TOKENS, planned, settings
from ..fitting.work import Machine

MODELS = ("Qwen3-1.7B", "Qwen3-8B", "Qwen3-32B", "Llama-3.3-70B")
CLUSTERS = ("M4 Max, 128 GB", "M3 Ultra, 512 GB", "M5 Ultra, 512 GB", "H200, 141 GB")
COUNTS = (1, 2, 4, 8)
_TITLES = ("10k", "100k", "1M", "10M")
_HEAD = """# Planning on paper

**Calculated, not measured.** What `nectar plan` says of fits with default options (`--budget auto`, counted as 4%;
16-bit weights), for machines on most of which nobody has run them. `python -m nectar_mlx.benchmarks.planning` prints
this page.

- The operations of each stage follow from the model's shape and the text's length. How many a second a machine does of
  them is measured on one H200 and on two CPU cores ([log/speed.md](log/speed.md), [log/fit-time.md](log/fit-time.md)).
- An Apple machine is taken to do the share of its published float32 rate that an H100 does, 0.21. No fit has run on
  one. Times may be off by half where the rate is measured, by more elsewhere.
- A text longer than the model's window is read in chunks. "—": a fit needs more memory than one machine has.
- Several machines: each has the model. They share reading, sampling, sizes, training and the check of the first
  chunk, and take one of the other chunks each. Keys and values travel at 5 GB/s, half of what Thunderbolt 5 is
  published to carry. On GPUs answers are sampled in a multiple of two groups, so more than two machines gain little in
  one chunk ([log/distributed.md](log/distributed.md)).
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    parts.append("## A file, and a served token\n\n" + _table(_title("model", "of"), _sizes()))
    parts.append(
        "Bytes of weights and context that one decoding step reads for one conversation; those in a batch share the\n"
        "weights, and the context where it is the same. Nodes count twice their bytes in the file: the kernel\n"
        "reads 4 bits as 8. A smaller budget is in proportion.\n"
    )
    parts.append("## Time of a fit on one machine\n\n" + _table(_title("model", "machine"), _times(MACHINES)))
    parts.append("## Memory of a fit on one machine\n\n" + _table(_title("model", "machine"), _memory(MACHINES)))
    parts.append("## Time of a fit on several machines\n\n" + _table(_title("model", "machines"), _clusters()))
    return "\n".join(parts)


@cache
def _rows(model: str, machine: Machine, machines: int = 1) -> list[JsonObject]:
    config = settings(machine, budget="auto", kind="auto")
    return [planned(SHAPES[model], tokens, machine, config, machines=machines) for tokens in TOKENS]


def _sizes() -> Iterable[Sequence[str]]:
    """The same on every machine."""
    for model in MODELS:
        rows, weights = _rows(model, MACHINES[-1]), SHAPES[model].nbytes
        yield model, "file", *(_bytes(r["file_bytes"]) for r in rows)
        yield "", "step behind the file", *(_bytes(weights + r["step_bytes"]) for r in rows)
        yield "", "step behind the full cache", *(_bytes(weights + r["cache_bytes"]) for r in rows)


def _times(machines: Sequence[Machine]) -> Iterable[Sequence[str]]:
    for model in MODELS:
        for machine in machines:
            yield model, machine.name, *(_time(r) for r in _rows(model, machine))


def _memory(machines: Sequence[Machine]) -> Iterable[Sequence[str]]:
    for model in MODELS:
        for machine in machines:
            yield model, machine.name, *(_bytes(r["memory_bytes"]) if r["fits"] else "—" for r in _rows(model, machine))


def _clusters() -> Iterable[Sequence[str]]:
    for model in MODELS:
        for machine in (m for m in MACHINES if m.name in CLUSTERS):
            for count in COUNTS:
                yield model, f"{count} × {machine.name}", *(_time(r) for r in _rows(model, machine, count))


def _time(fit: JsonObject) -> str:
    return duration(fit["seconds"]) if fit["fits"] else "—"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def _title(*first: str) -> Sequence[str]:
    return *first, *(f"{tokens} tokens" for tokens in _TITLES)


def _table(title: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [title, ["---"] * len(title), *(r for r in rows if set(r[2:]) != {"—"})]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
