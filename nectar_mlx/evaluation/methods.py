"""What is compared: files, with and without exact keys, and baselines of the same size."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .. import baselines, cli
from ..baselines import NO_CONTEXT, EvalContext, View
from ..errors import NectarError
from ..fitting import fidelity
from ..fitting.fidelity import Divergence
from ..nectar import Nectar
from .charts import FILE, SAME
from .questions import Asked


@dataclass(kw_only=True)
class Method:
    """A view of the context under test. file: which file's bytes it was given. divergence: its `conversation` is the
    number of the question, whose answers are resampled together."""

    name: str
    file: str
    view: View
    seconds: float
    divergence: Divergence | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.name} @ {self.file}"


def build(
    task: EvalContext, files: Mapping[str, Nectar], chosen: Sequence[baselines.Baseline], *, exact: Sequence[float] = ()
) -> list[Method]:
    """The files themselves; no context, which every gap is measured against; the baselines, those that have a size
    at the size of each file."""
    kinds = {n.layout.kind for n in files.values()}
    methods = []
    for name, nectar in files.items():
        called = FILE if len(kinds) == 1 else f"{FILE}, {nectar.layout.kind}"
        methods += of_file(name, nectar, exact, called=called)
    wanted = {b.name: b for b in (baselines.BASELINES[NO_CONTEXT], *chosen)}
    sizes = different(files)
    if any(b.sized for b in wanted.values()):
        with cli.progress("conversing for the baselines", 1):
            _ = task.studied  # so that its time is not the first method's
    with cli.progress("building baselines", len(wanted)) as done:
        for number, baseline in enumerate(wanted.values()):
            for name, nbytes in list(sizes.items())[: None if baseline.sized else 1]:
                started = time.perf_counter()
                try:
                    view = baseline.build(task, nbytes)
                except NectarError as error:
                    cli.say(f"{baseline.name} is left out: {error}")
                    continue
                mx.eval([b.parameters for b in view.banks])
                seconds = time.perf_counter() - started
                methods.append(Method(name=baseline.name, file=name, view=view, seconds=seconds))
            done(number + 1)
    return methods


def different(files: Mapping[str, Nectar]) -> dict[str, int]:
    """The sizes in bytes that baselines are built at, by the first file of each: of nearly equal files the least."""
    found: dict[str, int] = {}
    for name, nectar in files.items():
        like = next((n for n, nbytes in found.items() if abs(nectar.nbytes / nbytes - 1) < SAME), name)
        found[like] = min(nectar.nbytes, found.get(like, nectar.nbytes))
    return found


def of_file(name: str, nectar: Nectar, exact: Sequence[float], *, called: str = FILE) -> list[Method]:
    """The file as it answers by itself, and at each share of its keys, if there are any beside it."""
    seconds = float(sum(nectar.report.get("seconds", {}).values()))

    def method(share: float | None) -> Method:
        banks = nectar.hybrid_banks(share)
        router, read = (sum(b.selector.nbytes for b in banks), sum(b.step_bytes for b in banks)) if banks else (0, 0)
        view = View(
            banks=banks or nectar.banks,
            windows=nectar.windows,
            start=nectar.start,
            nbytes=nectar.nbytes + router,
            detail=f"{read:,} bytes read a token" if banks else "",
        )
        return Method(
            name=called if share is None else f"{called}, {share:.1%} read", file=name, view=view, seconds=seconds
        )

    return [method(share) for share in (None, *(exact if nectar.keys is not None else ()))]


def measure(task: EvalContext, methods: Sequence[Method], asked: Sequence[Asked]) -> None:
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
    numbers = np.array([a.number for a in asked])
    for method in methods:
        divergence = found[method.label]
        method.divergence = divergence._replace(conversation=numbers[divergence.conversation])
