"""What an update starts from, and what the two ways of updating share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from ... import store
from ...core.clock import Clock
from ...core.types import JsonObject
from ...heads import Bank, HeadArrays, Size
from ...store import MEAN_BITS, Layout, load
from .. import finite
from ..check import check
from ..prefill import Context, read_text
from ..run import FitRun
from ..samples import kept_study
from ..samples.capture import Collected
from ..samples.conversation import Conversation, count_samples
from ..samples.self_study import answer, check_conversations, training_conversations
from .revision import Revision

_FEWEST = 8  # conversations that are sampled: fewer take as long
_CHECKS = 0.4  # of a fit's check questions, beside those about what is new
_AROUND = 60  # tokens before a new passage that questions about it may quote


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
    def bits(self) -> float:
        """What a number of a node gets."""
        whole = all(size[0] >= len(self.prefix) for size in self.sizes)
        return store.mean_bits(self.layout, self.tensors) if whole else MEAN_BITS

    @property
    def errors(self) -> list[float]:
        """Of every head on held-out samples, as the report has them."""
        errors = self.metadata["report"].get("error", [])
        fits = isinstance(errors, list) and len(errors) == self.layout.n_layers * self.layout.n_kv_heads
        return [float(x) for x in errors] if fits else []

    def study(self, run: FitRun) -> list[Conversation]:
        """The conversations that were kept; none where none were."""
        kept = self.tensors.get(kept_study.TENSOR)
        if kept is None:
            return []
        logits = run.model(mx.array([[0]]))  # never evaluated
        return kept_study.unpacked(kept, vocabulary=logits.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What an update makes: heads as they will be stored, layer by layer, and what they were fitted to. errors: of
    every head on held-out samples. context: all exact keys and values, the truth that it is checked against."""

    heads: Sequence[HeadArrays]
    errors: Sequence[float]
    context: Context
    data: Collected
    report: JsonObject


def read(run: FitRun, file: FileContents, prefix: Sequence[int]) -> Context:
    """The new text, its keys relative to what the file's are relative to."""
    with run.progress("reading", len(prefix)) as done:
        context = read_text(
            run.model, prefix, run.geometry, prefill=run.config.prefill, offsets=file.offsets, progress=done
        )
    finite.check_banks("reading", context.banks, run.geometry)
    return context


def converse(
    run: FitRun, context: Context, revision: Revision, kept: Sequence[Conversation], *, wanted: int
) -> list[Conversation]:
    """Conversations about the new passages, and about the text as a whole, their answers sampled.

    kept: of the old text. wanted: samples a head from new conversations; where none are kept, half of them are about
    the whole text.
    """
    if found := run.checkpoint.load_conversations():
        return found
    config, whole = run.config, context.prefix
    passages = [list(whole[max(0, start - _AROUND) : end]) for start, end in revision.changed] or [whole]
    passages += [] if kept else [whole] * len(passages)
    count = _FEWEST + wanted // (run.group * config.answer_tokens)
    checks = max(2, config.checks // 8) if kept else config.checks
    batch: list[Conversation] = []
    for number, passage in enumerate(passages):
        few = count * (number + 1) // len(passages) - count * number // len(passages)
        first, asked = len(kept) + len(batch), checks * (number + 1) // len(passages) - checks * number // len(passages)
        asking = training_conversations(run.tokenizer, passage, first=first, count=few, seed=config.seed)
        batch += _enough(asking, run, samples=wanted / len(passages), least=_FEWEST // len(passages))
        batch += check_conversations(run.tokenizer, passage, first=first, count=asked, seed=config.seed)
    longest = max(len(c.prompt) for c in batch) + config.answer_tokens
    with run.progress("sampling answers", longest) as done:
        answer(run, context, batch, seed=config.seed, progress=done)
    run.checkpoint.save_conversations(batch)
    return batch


def _enough(asking: Sequence[Conversation], run: FitRun, *, samples: float, least: int) -> list[Conversation]:
    """The first conversations, as many as will give so many samples."""
    chosen, given = list[Conversation](), 0
    for conversation in asking:
        if given >= samples and len(chosen) >= least:
            break
        chosen.append(conversation)
        given += run.group * (len(conversation.prompt) + run.config.answer_tokens)
    return chosen


def some(kept: Sequence[Conversation], run: FitRun, *, samples: int) -> list[Conversation]:
    """Of the conversations that were kept those of the check, and of the others as many as give so many samples."""
    chosen = [c for c in kept if c.split == "check"][: max(2, round(_CHECKS * run.config.checks))]
    others = [c for c in kept if c.split != "check"]
    share = samples / max(1, count_samples(others, group=run.group))
    taken = 0.0
    for conversation in others:
        taken += share
        if taken >= 1 or share >= 1:
            chosen.append(conversation)
            taken -= 1
    return chosen


def stored(run: FitRun, updated: Updated, *, clock: Clock) -> tuple[store.Tensors, JsonObject]:
    """The file's tensors, and its report: checked against the full cache."""
    context = updated.context
    tensors = store.contents(
        run.layout, updated.heads, prefix=context.prefix, windows=context.windows, offsets=context.offsets
    )
    banks = load.banks(run.layout, tensors)
    finite.check_banks("rounding", banks, run.geometry)
    report: JsonObject = {
        "budget": sum(x.nbytes for name, x in tensors.items() if name != "prefix")
        / run.geometry.cache_bytes(len(context.prefix)),
        "sizes": [list(size) for bank in banks for size in bank.sizes],
        "queries": updated.data.train.count,
        "error": [float(f"{x:.3g}") for x in updated.errors],
    }
    report |= check(run, replace(updated.data, context=context), banks) | updated.report
    clock.lap("check")
    return tensors, report
