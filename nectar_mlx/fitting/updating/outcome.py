"""Bringing a file up to date."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn

from ... import store
from ...core import json_text
from ...core.clock import Clock
from ...core.progress import Log, Progress, no_log, silent
from ...core.types import Tokenizer
from ...errors import NectarError
from ...mlxlm import attention_patch
from ...store.kv_file import KeyFile
from .. import finite, pipeline, verdict
from ..checkpoint import Checkpoint
from ..config import FitConfig
from ..run import FitRun, identity
from ..samples import kept_study
from ..samples.conversation import Conversation, spread, without
from . import append, edit
from .base import FileContents, stored
from .plan import Plan, Way, planned

_WORSE, _NOTICED = 1.5, 0.01  # times the fit's divergence, and nats: a result that is worse is given up for a fit


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a file was brought up to date. way: "same" where nothing was to be done; then nothing else is set. reason:
    why it was a fit."""

    way: Way
    reason: str = ""
    tensors: store.Tensors | None = None
    metadata: store.Metadata | None = None
    keys: KeyFile | None = None


def update(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    *,
    tensors: store.Tensors,
    metadata: store.Metadata,
    config: FitConfig | None = None,
    source: str = "",
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
    log: Log = no_log,
    most: float = 1.0,
) -> Outcome:
    """Brings a file up to date with a text, in the cheapest way that does as well as a fit.

    tensors, metadata: what the file holds. config: of a fit (default: that of the file). log: is told the way that was
    taken, and why it is a fit. most: how much of the text may be another, for it could be the wrong one. The rest: as
    for `pipeline.fit`. NectarError for a text that cannot be fitted, for one of which more is another, and for a file
    that was fitted with others in view, which an update would lose.
    """
    if metadata.get("with"):
        raise NectarError("the file was fitted with other files in view: `nectar fit --with` fits it again")
    file = FileContents(tensors=tensors, metadata=metadata)
    config = config or config_of(metadata)
    checkpoint, name = checkpoint or Checkpoint(None), str(metadata["model"])
    finite.check_weights(model)
    run = FitRun(
        model=model,
        tokenizer=tokenizer,
        geometry=attention_patch.route(model),
        config=config,
        progress=progress,
        checkpoint=checkpoint,
        facts=identity(model, tokenizer, text) | {"update of": store.digest(tensors)},
    )
    plan = planned(run, file, text)
    revision = plan.revision
    if revision.new != revision.old and not revision.appended and revision.share > most:
        raise NectarError(
            f"{revision.share:.0%} of the text has changed: if it is the right one, say so by --force, or give another "
            "--output"
        )
    if plan.way == "same":
        return Outcome(way="same")
    if plan.way != "fit":
        run.claim(list(revision.new))
        checkpoint = run.checkpoint.part("fit")  # of its own, so that the fit continues where it was interrupted
        if not checkpoint.holds_work():  # else the update was given up before
            log(f"{plan.described()}: fitting what that changes")
            outcome = _updated(run, file, plan, source=source)
            if outcome is not None:
                return outcome
        plan = plan.fit("the update answers worse than the file did when it was fitted")
    log(f"fitting anew: {plan.reason}")
    fitted = pipeline.fit(
        model,
        tokenizer,
        text,
        config=config,
        name=name,
        source=source,
        progress=progress,
        checkpoint=checkpoint,
        log=log,
    )
    return Outcome(way="fit", reason=plan.reason, tensors=fitted[0], metadata=fitted[1], keys=fitted[2])


def config_of(metadata: store.Metadata) -> FitConfig:
    """The settings that a file was fitted with, as far as this version has them."""
    try:
        return json_text.typed(metadata.get("config", {}), FitConfig)
    except (ValueError, NectarError):
        return FitConfig()


def _updated(run: FitRun, file: FileContents, plan: Plan, *, source: str) -> Outcome | None:
    """The result of an update; None where it is worse than the file was for its text."""
    clock, revision, study = Clock(), plan.revision, plan.study
    prefix = list(revision.new)
    made = (append.append if plan.behind else edit.edit)(run, file, revision, study, clock=clock)
    tensors, report = stored(run, file, made, clock=clock)
    fitted = _fitted(file.metadata["report"])
    if _worse(report, fitted):
        return None
    report["updated"] = {
        "way": plan.way,
        "tokens": len(prefix) - len(revision.old),
        "from": store.digest(file.tensors),
        "grown": round(append.grown(file, tokens=revision.appended), 3) if plan.behind else file.grown,
        "fitted": {name: fitted[name] for name in ("kl", "gap_closed") if name in fitted},
    }
    report["ahead"] = file.ahead - revision.appended if plan.behind else made.kind.data.furthest
    if kept_study.TENSOR in file.tensors:
        # Without those that ask about what is new: the next check is of the whole text, as this file's own was.
        fresh = without(made.kind.data.conversations, [*study, *made.new])
        # And without those that quote what was left out: whoever takes it out of a text wants it out of the file.
        still = [c for c in study if not revision.quotes_left_out(c.prompt + c.answer)]
        tensors[kept_study.TENSOR] = kept_study.packed(_further_study(still, fresh))
    pipeline.judge(run, tensors, report, tokens=len(prefix))
    report["seconds"] = clock.laps
    metadata = store.description(
        tensors,
        run.layout,
        run.geometry,
        provenance=run.provenance(model=file.metadata["model"], source=source),
        report=report,
    )
    return Outcome(way=plan.way, tensors=tensors, metadata=metadata)


def _further_study(study: Sequence[Conversation], fresh: Sequence[Conversation]) -> list[Conversation]:
    """What is kept of both, at most twice as many as before: the check's, and of the others some from everywhere."""
    checks = [c for c in study if c.split == "check"]
    others = [*fresh, *(c for c in study if c.split != "check")]
    return checks + spread(others, min(len(others), 2 * len(study) - len(checks)))


def _fitted(report: store.Metadata) -> store.Metadata:
    """The figures of the last fit, which all updates since are compared with: each loses too little to be noticed."""
    updated = report.get("updated")
    figures = updated.get("fitted") if isinstance(updated, dict) else None
    return figures if isinstance(figures, dict) and verdict.grade(figures) is not None else report


def _worse(new: store.Metadata, fitted: store.Metadata) -> bool:
    """Whether a result is of a lower grade than the fit was, by more than a check's own chance; about the whole text,
    or about what is new."""
    before, after = verdict.grade(fitted), verdict.grade(new)
    if before is None or after is None or verdict.GRADES.index(after) <= verdict.GRADES.index(before):
        return False
    return bool(verdict.worse(new)["kl"] > _WORSE * fitted["kl"] + _NOTICED)
