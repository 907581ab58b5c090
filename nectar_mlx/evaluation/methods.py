"""What is compared: files, with and without exact keys, and baselines of the same size."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .. import baselines, cli
from ..baselines import NO_CONTEXT, Task, View
from ..errors import NectarError
from ..nectar import Nectar
from . import fidelity
from .fidelity import Divergence
from .questions import Asked

FILE = "nectar"


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
