"""Deciding how a file is brought up to date."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ... import __version__
from ...core.clock import duration
from ...core.device import device
from ...core.progress import Overall, Stage
from ...errors import NectarError
from ...heads import Quadrature
from ...mlxlm import prompts
from ...mlxlm.geometry import LATENT, SHARED, STATE
from ...models.encoder import Span
from .. import pipeline, verdict
from ..budget import distills
from ..estimate import estimate
from ..machines import here, shape_of
from ..run import FitRun
from ..samples.conversation import Conversation
from ..work import Shape
from . import append, edit
from .base import FileContents
from .revision import Revision

Way = Literal["same", "append", "edit", "fit"]

MOST_APPENDED, MOST_EDITED = 0.5, 0.25  # of the text: beyond, a fit does better for about as much
MOST_GROWN = 1.45  # times the nodes of a fit: beyond, appends have cost more bytes than they are worth
WORTH_WAITING = 60  # seconds that training all heads on may take, where more text could be fitted behind them
_SEAM = 4  # tokens at the end of the old text that more text may have merged with its own


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a file is brought up to date.

    way: "same" where nothing is to be done. revision: what changed. study: the conversations that the file kept.
    reason: why it is a fit. behind: whether an append is made behind the file's heads, which stay as they are; else
    they are all trained on, as in an edit.
    """

    way: Way
    revision: Revision
    study: Sequence[Conversation] = ()
    reason: str = ""
    behind: bool = False

    def fit(self, reason: str) -> "Plan":
        return replace(self, way="fit", reason=reason)

    def described(self) -> str:
        if self.way == "append":
            return f"{self.revision.appended:,} tokens were added to {len(self.revision.old):,}"
        return f"{self.revision.share:.1%} of the text has changed"


def planned(run: FitRun, file: FileContents, text: str) -> Plan:
    """The cheapest way that does as well as a fit. Tells progress what to expect of an update. NectarError for an empty
    text."""
    plan, metadata = Plan(way="fit", revision=Revision(file.prefix, file.prefix, [])), file.metadata
    if not text.strip():
        raise NectarError("the text is empty")
    same = (metadata["model_sha256"], metadata["tokenizer_sha256"]) == (run.facts["model"], run.facts["tokenizer"])
    if not same:
        return plan.fit("the file was fitted on another model or tokenizer")
    if metadata["nectar_mlx"] != __version__:
        return plan.fit(f"the file was written by version {metadata['nectar_mlx']}")
    prefix = _prefix(run, file, text)
    # What is empty at a text's ends changes no answer: commands leave it out, and callers of `Nectar.fit` may not.
    if prefix == file.prefix or prompts.document(run.tokenizer, file.prefix).strip() == text.strip():
        return replace(plan, way="same")
    if file.layout.bank is not Quadrature or file.layout != run.layout:
        return plan.fit(f"heads of kind {file.layout.kind} cannot be updated")
    if any(layer.states or layer.kind in (STATE, LATENT, SHARED) for layer in run.geometry.layers):
        return plan.fit("layers of other kinds than attention of their own cannot be updated")
    if metadata["chunks"] or pipeline.in_parts(run, prefix):
        return plan.fit("a text that is fitted in parts cannot be updated")
    revision = Revision.of(file.prefix, prefix)
    plan = Plan(way="append" if revision.appended else "edit", revision=revision, study=file.study(run))
    distilled = distills(run.config, run.layout, metadata["report"].get("budget"))
    return _append(run, file, plan, distilled) if revision.appended else _edit(run, file, plan, distilled)


def _edit(run: FitRun, file: FileContents, plan: Plan, distilled: bool) -> Plan:
    """distilled: whether the file's heads were trained through the whole model."""
    if distilled:
        return plan.fit("heads that were trained through the whole model cannot be edited")
    if plan.revision.share > MOST_EDITED:
        return plan.fit(f"{plan.revision.share:.0%} of the text has changed")
    if not plan.study:
        return plan.fit("the file keeps no conversations (nectar fit --keep-study)")
    return _cheaper(run, plan, _trained_on(run, plan))


def _append(run: FitRun, file: FileContents, plan: Plan, distilled: bool) -> Plan:
    """Behind the file's heads, at a cost that follows what is new and some closeness and bytes. Where many samples are
    quick to get all heads are trained on, if that takes no time worth mentioning (docs/log/update.md)."""
    old, tokens = len(file.prefix), plan.revision.appended
    if tokens > MOST_APPENDED * old:
        return plan.fit(f"{tokens:,} more tokens behind {old:,} are too many for an update")
    if device().trained_share == 1 and plan.study and not distilled:
        stages = _trained_on(run, plan)
        if _seconds(stages) <= WORTH_WAITING:
            return _cheaper(run, plan, stages)
    if not verdict.can_be_added(file.metadata["report"]):
        return plan.fit("the file does not say how closely it answers")
    if tokens > file.ahead:
        return plan.fit(f"the heads were fitted for questions at most {file.ahead:,} tokens behind their text")
    if (grown := append.grown(file, tokens=tokens)) > MOST_GROWN:
        return plan.fit(f"with one more append the file would have {grown:.1f} times the nodes that a fit gives it")
    stages = append.expected_stages(run, file, plan.revision, plan.study, shape=_shape(run), machine=here())
    return _cheaper(run, replace(plan, behind=True), stages)


def _trained_on(run: FitRun, plan: Plan) -> list[Stage]:
    """What training all heads on is expected to take."""
    return edit.expected_stages(run, plan.revision, plan.study, shape=_shape(run), machine=here())


def _cheaper(run: FitRun, plan: Plan, stages: Sequence[Stage]) -> Plan:
    """An update of these stages where it is expected to take less than a fit; else a fit, and why."""
    ours = _seconds(stages)
    fit = estimate(_shape(run), here(), run.config, len(plan.revision.new)).seconds
    if ours >= fit:
        return plan.fit(f"an update is expected to take {duration(ours)}, a fit {duration(fit)}")
    if isinstance(run.progress, Overall):
        run.progress.expect(stages)
    return plan


def _shape(run: FitRun) -> Shape:
    return shape_of(run.model, run.geometry, "")


def _seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages)


def _prefix(run: FitRun, file: FileContents, text: str) -> list[int]:
    """The new text's prefix, as much of it as was chosen."""
    whole, most = _going_on(run, file, text), run.config.context_tokens
    return whole if most is None else prompts.cut(run.tokenizer, whole, most)


def _going_on(run: FitRun, file: FileContents, text: str) -> list[int]:
    """Where a text only goes on behind the old one its prefix begins with the old one's tokens, even if the last of
    them would be others with what follows."""
    located: tuple[list[int], list[Span]] = prompts.located(run.tokenizer, text)
    ids, spans = located
    old = file.prefix
    first = next((i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), min(len(old), len(ids)))
    if not spans or first == len(old) or len(old) - first > _SEAM or first >= len(spans) or spans[first][0] < 0:
        return ids
    tail, rest = run.tokenizer.decode(old[first:]), text[spans[first][0] :]
    if not tail or not rest.startswith(tail) or rest == tail:
        return ids
    return [*old, *prompts.encode(run.tokenizer, rest[len(tail) :])]
