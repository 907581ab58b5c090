"""What an update starts from, and what the two ways of updating share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from ... import store
from ...core.clock import Clock
from ...core.progress import Stage
from ...core.types import JsonObject
from ...heads import Bank, HeadArrays, Size
from ...retrieval.recall import Recall
from ...store import Layout, load
from .. import finite, verdict
from ..check import check
from ..estimate import update_stages
from ..kinds import KindFit
from ..prefill import Context, read_text
from ..run import FitRun
from ..samples import kept_study
from ..samples.ahead import FURTHEST, furthest, spaced
from ..samples.capture import Collected
from ..samples.conversation import Conversation, answered_checks, without
from ..samples.recording import collect
from ..samples.sampling import Recorder
from ..samples.self_study import answer, answered_before
from ..samples.study_cache import allow_half
from ..train import merged_errors, train_heads
from ..work import Machine, Shape
from . import questions
from .revision import Revision

_ANSWER = 24  # tokens of new answers, at most, where others are kept
_CHECK_ANSWER = 16  # tokens of answers to the check's questions about what is new, at most
_MOST_GROWN = 100.0  # times the nodes of a fit: more than any file has


@dataclass(frozen=True, kw_only=True)
class FileContents:
    """A .nectar's tensors and metadata."""

    tensors: store.Tensors
    metadata: store.Metadata

    @cached_property
    def prefix(self) -> list[int]:
        ids: Any = self.tensors["prefix"].tolist()
        return list(ids)

    @cached_property
    def layout(self) -> Layout:
        return Layout(**self.metadata["layout"])

    @cached_property
    def banks(self) -> list[Bank]:
        """As they are stored, in float32: packing them again loses nothing."""
        return store.unpack(self.layout, self.tensors)

    @property
    def heads(self) -> list[HeadArrays]:
        """Layer by layer."""
        return [head for bank in self.banks for head in bank.unstack()]

    @property
    def offsets(self) -> list[mx.array | None]:
        return [None if bank.offset is None else bank.offset.astype(mx.bfloat16) for bank in self.banks]

    @property
    def sizes(self) -> list[Size]:
        return [size for bank in self.banks for size in bank.sizes]

    @property
    def grown(self) -> float:
        """How many times as many nodes as a fit gave it, for its text's length, it has after appends."""
        updated = self.metadata["report"].get("updated")
        grown = updated.get("grown", 1.0) if isinstance(updated, dict) else 1.0
        return float(max(1.0, min(grown, _MOST_GROWN))) if isinstance(grown, int | float) else 1.0

    @property
    def nodes_a_token(self) -> float:
        """How many nodes of all heads a fit gave to each token of the text."""
        return sum(m for (m,) in self.sizes) / len(self.prefix) / self.grown

    @property
    def ahead(self) -> int:
        """How many positions further on than right behind the text a conversation may stand that heads were fitted
        for."""
        ahead = self.metadata["report"].get("ahead")
        return max(0, min(ahead, FURTHEST)) if isinstance(ahead, int) else 0

    @property
    def bits(self) -> float:
        """What a number of a node gets: as many as it got in the file."""
        whole = all(size[0] >= len(self.prefix) for size in self.sizes)
        return store.mean_bits(self.layout, self.tensors) - (0.0 if whole else store.MOVED_BITS)

    @property
    def errors(self) -> list[float]:
        """Of every head on held-out samples, as the report has them."""
        errors = self.metadata["report"].get("error", [])
        fits = isinstance(errors, list) and len(errors) == self.layout.n_layers * self.layout.n_kv_heads
        return [float(x) for x in errors] if fits else []

    @property
    def no_context(self) -> float | None:
        """The divergence without the text, as the report has it: questions about most of it are asked again."""
        known = self.metadata["report"].get("kl_no_context")
        return float(known) if isinstance(known, int | float) else None

    def study(self, run: FitRun) -> list[Conversation]:
        """The conversations that were kept; none where none were."""
        kept = self.tensors.get(kept_study.TENSOR)
        if kept is None:
            return []
        logits = run.model(mx.array([[0]]))  # never evaluated
        return kept_study.unpacked(kept, vocabulary=logits.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What an update makes: heads, layer by layer, of the kind that fitted them. new: the check's conversations about
    what is new. errors: of every head on held-out samples. before: the figures of what the file is compared with, where
    that is itself not the full cache."""

    kind: KindFit
    new: Sequence[Conversation]
    heads: Sequence[HeadArrays]
    errors: Sequence[float]
    report: JsonObject
    before: JsonObject | None = None


def read(run: FitRun, file: FileContents, prefix: Sequence[int]) -> Context:
    """The new text, its keys relative to what the file's are relative to."""
    with run.progress("reading", len(prefix)) as done:
        context = read_text(
            run.model, prefix, run.geometry, prefill=run.config.prefill, offsets=file.offsets, progress=done
        )
    finite.check_banks("reading", context.banks, run.geometry)
    return context


def collected(
    run: FitRun, context: Context, revision: Revision, study: Sequence[Conversation], *, kept: int, new: int
) -> tuple[Collected, list[Conversation]]:
    """What heads are trained on: about so many samples a head of conversations that were kept, and of new ones. And of
    its conversations those of the check that are about what is new."""
    run, most = answering(run, study), furthest(run, context, start=context.start)
    batch = questions.about_the_new(run, revision, study, samples=new)
    spaced(run, batch, furthest=most, first=len(study))
    for conversation in study:  # behind a longer text there may be less room
        conversation.ahead = min(conversation.ahead, most)
    checking = questions.checking_the_new(run, revision)
    ask = partial(_answered, batch, checking)
    return collect(run, context, ask, kept=questions.some(study, run, samples=kept), whole=True), checking


def expected_stages(
    run: FitRun,
    study: Sequence[Conversation],
    *,
    tokens: int,
    kept: int,
    new: int,
    steps: float,
    shape: Shape,
    machine: Machine,
) -> list[Stage]:
    """What an update is expected to take. tokens: that its conversations attend to. kept, new: samples a head of
    conversations that are replayed and sampled. steps: of a fit's. shape: of the model."""
    config = answering(run, study).config
    config = replace(
        config,
        steps=math.ceil(steps * config.steps),
        checks=questions.count_checks(config) if study else config.checks,
    )
    checks = questions.count_new_checks(config)
    return update_stages(shape, machine, config, tokens, kept=kept, new=new, checks=checks)


def answering(run: FitRun, study: Sequence[Conversation]) -> FitRun:
    """The run as it samples new answers: short ones where there are others, which are of full length."""
    if not study:
        return run
    return replace(run, config=replace(run.config, answer_tokens=min(_ANSWER, run.config.answer_tokens)))


def _answered(
    batch: list[Conversation],
    checking: list[Conversation],
    run: FitRun,
    context: Context,
    recorder: Recorder | None,
) -> list[Conversation]:
    """Both, their answers sampled, or those that an interrupted update has sampled. The check's by themselves: beside
    longer prompts, which are read token by token, short ones take as many steps more."""
    allow_half(run.model, context)
    known, asked = run.kept_conversations(), list[Conversation]()
    short = replace(run, config=replace(run.config, answer_tokens=min(_CHECK_ANSWER, run.config.answer_tokens)))
    parts = [(run, batch), (short, checking)]
    lengths = [max(len(c.prompt) for c in part) + of.config.answer_tokens for of, part in parts]
    with run.progress("sampling answers", sum(lengths)) as done:
        for number, (of, part) in enumerate(parts):
            first = len(asked)
            answered = answered_before(part, known[first:])
            answer(
                of,
                context,
                part,
                seed=run.config.seed + number,
                progress=partial(_further, done, sum(lengths[:number])),
                recorder=recorder,
                answered=answered,
                first=first,
            )
            asked += part
            if not answered:
                run.checkpoint.save_conversations(asked)
    return asked


def _further(done: Callable[[int], None], before: int, tokens: int) -> None:
    done(before + tokens)


def retrained(
    kind: KindFit, file: FileContents, sizes: Sequence[Size], *, new: Sequence[Conversation], clock: Clock
) -> Updated:
    """Heads of these sizes, trained from where the kind starts them. new: as in `Updated`."""
    heads = train_heads(kind, sizes, bits=file.bits)
    clock.lap("regression")
    report = {"samples": kind.data.train.count, "touched": kind.n_heads - len(kind.settled)}
    return Updated(kind=kind, new=new, heads=heads, errors=errors_of(kind, heads), report=report)


def errors_of(kind: KindFit, heads: Sequence[HeadArrays], *, whole: Sequence[Bank] = ()) -> list[float]:
    """Of every head on held-out samples; whole: as for `merged_errors`."""
    K, scale = kind.run.geometry.n_kv_heads, kind.run.geometry.scale
    rows = [heads[start : start + K] for start in range(0, len(heads), K)]
    return merged_errors(kind, [kind.run.layout.bank.stack(row, scale=scale) for row in rows], whole=whole)


def stored(run: FitRun, file: FileContents, updated: Updated, *, clock: Clock) -> tuple[store.Tensors, JsonObject]:
    """The file's tensors, and its report: checked against the full cache, by questions about the whole text and, apart,
    by those about what is new."""
    data = updated.kind.data
    context = data.context
    tensors = store.contents(
        run.layout, updated.heads, prefix=context.prefix, windows=context.windows, offsets=context.offsets
    )
    banks = load.banks(run.layout, tensors, trusted=True)
    finite.check_banks("rounding", banks, run.geometry)
    report: JsonObject = {
        "budget": sum(x.nbytes for name, x in tensors.items() if name != "prefix")
        / run.geometry.cache_bytes(len(context.prefix)),
        "sizes": [list(size) for bank in banks for size in bank.sizes],
        "queries": data.train.count,
        "error": [float(f"{x:.3g}") for x in updated.errors],
    }
    new = answered_checks(updated.new)
    whole = without(answered_checks(data.conversations), new)
    floor = file.no_context if whole else None  # a study may hold none of a check
    figures = [
        check(run, data, banks, asked=whole or new, no_context=floor),
        check(run, data, banks, asked=new, stage="checking what is new"),
    ]
    if updated.before is not None:
        figures = [of | verdict.added(of, updated.before) for of in figures]
    report |= figures[0] | updated.report
    if updated.before is not None:  # what it is compared with quotes no better than the file did
        recall = Recall.of(updated.before)
        report["recall"] = {"weight": recall.weight, "exponent": recall.exponent}
    report["new"] = {"questions": len(new)} | {name: x for name, x in figures[1].items() if name != "recall"}
    clock.lap("check")
    return tensors, report
