"""The methods under test: files, with and without exact keys, and baselines of the same size."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mlx.core as mx
import numpy as np

from .. import baselines
from ..baselines import NO_CONTEXT, EvalContext, View
from ..core.progress import Log, Progress, Update, no_log, silent
from ..errors import NectarError
from ..fitting import fidelity
from ..fitting.fidelity import Divergence
from ..fitting.samples.conversation import Conversation
from ..nectar import Nectar
from .charts import FILE, SAME
from .questions import LATER, Question


@dataclass(frozen=True, kw_only=True)
class Method:
    """A view of the context under test. file: the file whose bytes it may take. divergence: set by `measure`; its
    `conversation` is the number of the question, so that a question's answers are resampled together."""

    name: str
    file: str
    view: View
    seconds: float
    divergence: Divergence | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.name} @ {self.file}"


def build(
    ctx: EvalContext,
    files: Mapping[str, Nectar],
    chosen: Sequence[baselines.Baseline],
    *,
    exact: Sequence[float] = (),
    progress: Progress = silent,
    log: Log = no_log,
) -> list[Method]:
    """The files themselves; no context, the reference of every gap; and the baselines: sized ones at the size of each
    file."""
    kinds = {n.layout.kind for n in files.values()}
    methods = []
    for name, nectar in files.items():
        called = FILE if len(kinds) == 1 else f"{FILE}, {nectar.layout.kind}"
        methods += of_file(name, nectar, exact, called=called)
    wanted = {b.name: b for b in (baselines.BASELINES[NO_CONTEXT], *chosen)}
    sizes = distinct_sizes(files)
    if any(b.sized for b in wanted.values()):
        with progress("sampling self-study answers for the baselines", 1):
            _ = ctx.samples  # here, so that the time does not count for the first method
    with progress("building baselines", len(wanted)) as update:
        for index, baseline in enumerate(wanted.values()):
            for name, nbytes in list(sizes.items())[: None if baseline.sized else 1]:
                started = time.perf_counter()
                try:
                    view = baseline.build(ctx, nbytes)
                except NectarError as error:
                    log(f"{baseline.name} is left out: {error}")
                    continue
                mx.eval([b.parameters for b in view.banks])
                seconds = time.perf_counter() - started
                methods.append(Method(name=baseline.name, file=name, view=view, seconds=seconds))
            update(index + 1)
    return methods


def distinct_sizes(files: Mapping[str, Nectar]) -> dict[str, int]:
    """The sizes in bytes at which baselines are built, by the first file of each size. Of files of nearly equal size,
    the smallest counts."""
    sizes: dict[str, int] = {}
    for name, nectar in files.items():
        like = next((n for n, nbytes in sizes.items() if abs(nectar.nbytes / nbytes - 1) < SAME), name)
        sizes[like] = min(nectar.nbytes, sizes.get(like, nectar.nbytes))
    return sizes


def of_file(name: str, nectar: Nectar, exact: Sequence[float], *, called: str = FILE) -> list[Method]:
    """The file without exact keys; with recall, if that helps it; and at each fraction of exact keys, if it has a file
    of keys."""
    seconds = float(sum(nectar.report.get("seconds", {}).values()))

    def method(fraction: float | None) -> Method:
        banks = nectar.hybrid_banks(fraction)
        router = sum(b.selector.nbytes for b in banks)
        view = View(
            banks=banks or nectar.banks,
            windows=nectar.windows,
            start=nectar.start,
            nbytes=nectar.nbytes + router,
            detail=f"{sum(b.step_bytes for b in banks):,} bytes read a token" if banks else "",
        )
        label = called if fraction is None else f"{called}, {fraction:.1%} read"
        return Method(name=label, file=name, view=view, seconds=seconds)

    plain, *reading = [method(fraction) for fraction in (None, *(exact if nectar.keys is not None else ()))]
    if not nectar.recall.weight:
        return [plain, *reading]
    recalling = replace(plain.view, change=partial(_recalled, nectar))
    return [plain, replace(plain, name=f"{called}, recall", view=recalling), *reading]


def _recalled(nectar: Nectar, conversation: Conversation, logits: mx.array) -> mx.array:
    return nectar.recall.applied(nectar.prefix, conversation.prompt, conversation.answer, logits)


def measure(
    ctx: EvalContext, methods: Sequence[Method], questions: Sequence[Question], *, progress: Progress = silent
) -> list[Method]:
    """The methods with their divergence from the full cache. Later turns are in batches of their own: beside them a
    short prompt would be padded to the length of a talk."""
    parts = [list(group) for _, group in itertools.groupby(questions, key=lambda q: q.kind == LATER)]
    divergences, done = list[dict[str, Divergence]](), 0
    with progress("comparing", len(questions)) as update:
        for part in parts:
            divergences.append(_compared(ctx, methods, part, before=done, update=update))
            done += len(part)
    return [replace(m, divergence=fidelity.joined([part[m.label] for part in divergences])) for m in methods]


def _compared(
    ctx: EvalContext, methods: Sequence[Method], questions: Sequence[Question], *, before: int, update: Update
) -> dict[str, Divergence]:
    """The divergence of each method, by its label. before: how many questions were compared before these."""
    divergences = fidelity.compare(
        ctx.model,
        ctx.context.make_cache,
        {m.label: m.view.make_cache for m in methods},
        [q.conversation for q in questions],
        prompts={m.label: m.view.prompt for m in methods},
        change={m.label: m.view.change for m in methods if m.view.change},
        progress=lambda seen: update(before + seen),
    )
    numbers = np.array([q.number for q in questions])
    return {label: d._replace(conversation=numbers[d.conversation]) for label, d in divergences.items()}
