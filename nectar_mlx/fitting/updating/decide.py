"""Deciding how a file is brought up to date, and doing it."""

from dataclasses import dataclass
from typing import Literal

import mlx.nn as nn

from ... import __version__, store
from ...core import json_text
from ...core.clock import Clock, duration
from ...core.device import device
from ...core.progress import Log, Overall, Progress, no_log, silent
from ...core.types import Tokenizer
from ...errors import NectarError
from ...heads import Quadrature
from ...mlxlm import attention_patch, prompts
from ...mlxlm.geometry import LATENT, SHARED, STATE
from ...models.encoder import Span
from ...store.kv_file import KeyFile
from .. import finite, pipeline, verdict
from ..budget import distills
from ..checkpoint import Checkpoint
from ..config import FitConfig
from ..estimate import estimate
from ..machines import here, shape_of
from ..run import FitRun, identity
from ..samples import kept_study
from ..samples.conversation import Conversation, spread, without
from . import append, edit
from .base import FileContents, stored
from .revision import Revision

Way = Literal["same", "append", "edit", "fit"]

MOST_APPENDED, MOST_EDITED = 0.5, 0.25  # of the text: beyond, a fit does better for about as much
MOST_GROWN = 1.45  # times the nodes of a fit: beyond, appends have cost more bytes than they are worth
_SEAM = 4  # tokens at the end of the old text that more text may have merged with its own
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
    for `pipeline.fit`. NectarError for a text that cannot be fitted, and for one of which more is another.
    """
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
    way, reason, revision, study = _way(run, file, text)
    if revision.new != revision.old and not revision.appended and revision.share > most:
        raise NectarError(
            f"{revision.share:.0%} of the text is another: if it is the right one, say so by --force, or give another "
            "--output"
        )
    if way == "same":
        return Outcome(way="same")
    if way in ("append", "edit"):
        way, reason = _cheaper(run, file, revision, study, way)
    if way in ("append", "edit"):
        run.claim(list(revision.new))
        checkpoint = run.checkpoint.part("fit")  # of its own, so that the fit continues where it was interrupted
        if not checkpoint.holds_work():  # else the update was given up before
            log(f"{_described(way, revision)}: fitting what that changes")
            outcome = _updated(run, file, revision, study, way=way, source=source)
            if outcome is not None:
                return outcome
        reason = "the update answers worse than the file did when it was fitted"
    log(f"fitting anew: {reason}")
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
    return Outcome(way="fit", reason=reason, tensors=fitted[0], metadata=fitted[1], keys=fitted[2])


def config_of(metadata: store.Metadata) -> FitConfig:
    """The settings that a file was fitted with, as far as this version has them."""
    try:
        return json_text.typed(metadata.get("config", {}), FitConfig)
    except (ValueError, NectarError):
        return FitConfig()


def _way(run: FitRun, file: FileContents, text: str) -> tuple[Way, str, Revision, list[Conversation]]:
    """How to go about it, why not in a cheaper way, what changed, and the conversations that were kept."""
    nothing = Revision(file.prefix, file.prefix, [])
    metadata = file.metadata
    if not text.strip():
        raise NectarError("the text is empty")
    same = (metadata["model_sha256"], metadata["tokenizer_sha256"]) == (run.facts["model"], run.facts["tokenizer"])
    if not same:
        return "fit", "the file was fitted on another model or tokenizer", nothing, []
    if metadata["nectar_mlx"] != __version__:
        return "fit", f"the file was written by version {metadata['nectar_mlx']}", nothing, []
    prefix = _prefix(run, file, text)
    # What is empty at a text's ends changes no answer: commands leave it out, and callers of `Nectar.fit` may not.
    if prefix == file.prefix or prompts.document(run.tokenizer, file.prefix).strip() == text.strip():
        return "same", "", nothing, []
    if file.layout.bank is not Quadrature or file.layout != run.layout:
        return "fit", f"heads of kind {file.layout.kind} cannot be updated", nothing, []
    if any(layer.states or layer.kind in (STATE, LATENT, SHARED) for layer in run.geometry.layers):
        return "fit", "layers of other kinds than attention of their own cannot be updated", nothing, []
    if metadata["chunks"] or pipeline.in_parts(run, prefix):
        return "fit", "a text that is fitted in parts cannot be updated", nothing, []
    revision, study = Revision.of(file.prefix, prefix), file.study(run)
    if revision.appended:
        reason = _not_appended(file, revision.appended, behind=_behind(run, file, study))
        return "fit" if reason else "append", reason, revision, study
    if _distilled(run, file):
        return "fit", "heads that were trained through the whole model cannot be edited", revision, study
    if revision.share > MOST_EDITED:
        return "fit", f"{revision.share:.0%} of the text is another", revision, study
    if not study:
        return "fit", "the file keeps no conversations (nectar fit --keep-study)", revision, study
    return "edit", "", revision, study


def _distilled(run: FitRun, file: FileContents) -> bool:
    return distills(run.config, run.layout, file.metadata["report"].get("budget"))


def _behind(run: FitRun, file: FileContents, study: list[Conversation]) -> bool:
    """Whether more text is read and fitted behind the file's heads, which stay as they are. Where all heads are trained
    on many samples that would lose a third of the closeness, and to read the text and train them on takes little of a
    fit (docs/log/update.md)."""
    return device().trained_share < 1 or not study or _distilled(run, file)


def _not_appended(file: FileContents, tokens: int, *, behind: bool) -> str:
    """Why so many tokens more are no append; "" where they are."""
    old = len(file.prefix)
    if tokens > MOST_APPENDED * old:
        return f"{tokens:,} more tokens behind {old:,} are too many for an update"
    if not behind:
        return ""
    if not verdict.can_be_added(file.metadata["report"]):
        return "the file does not say how closely it answers"
    if tokens > file.ahead:
        return f"the heads were fitted for questions at most {file.ahead:,} tokens behind their text"
    if (grown := append.grown(file, tokens=tokens)) > MOST_GROWN:
        return f"with one more append the file would have {grown:.1f} times the nodes that a fit gives it"
    return ""


def _cheaper(
    run: FitRun, file: FileContents, revision: Revision, study: list[Conversation], way: Way
) -> tuple[Way, str]:
    """An update where it is expected to take less than a fit; else a fit, and why. Tells progress what to expect."""
    shape, machine = shape_of(run.model, run.geometry, ""), here()
    if way == "append" and _behind(run, file, study):
        stages = append.expected_stages(run, file, revision, study, shape=shape, machine=machine)
    else:
        stages = edit.expected_stages(run, revision, study, shape=shape, machine=machine)
    ours, fit = sum(stage.seconds for stage in stages), estimate(shape, machine, run.config, len(revision.new)).seconds
    if ours >= fit:
        return "fit", f"an update is expected to take {duration(ours)}, a fit {duration(fit)}"
    if isinstance(run.progress, Overall):
        run.progress.expect(stages)
    return way, ""


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


def _described(way: Way, revision: Revision) -> str:
    if way == "append":
        return f"{revision.appended:,} tokens were added to {len(revision.old):,}"
    return f"{revision.share:.1%} of the text is another"


def _updated(
    run: FitRun, file: FileContents, revision: Revision, study: list[Conversation], *, way: Way, source: str
) -> Outcome | None:
    """The result of an update; None where it is worse than the file was for its text."""
    clock, prefix = Clock(), list(revision.new)
    behind = way == "append" and _behind(run, file, study)
    made = (append.append if behind else edit.edit)(run, file, revision, study, clock=clock)
    tensors, report = stored(run, file, made, clock=clock)
    fitted = _fitted(file.metadata["report"])
    if _worse(report, fitted):
        return None
    report["updated"] = {
        "way": way,
        "tokens": len(prefix) - len(revision.old),
        "from": store.digest(file.tensors),
        "grown": round(append.grown(file, tokens=revision.appended), 3) if behind else file.grown,
        "fitted": {name: fitted[name] for name in ("kl", "gap_closed") if name in fitted},
    }
    report["ahead"] = file.ahead - revision.appended if behind else made.kind.data.furthest
    if kept_study.TENSOR in file.tensors:
        # Without those that ask about what is new: the next check is of the whole text, as this file's own was.
        fresh = without(made.kind.data.conversations, [*study, *made.new])
        # And without those that quote what was left out: whoever takes it out of a text wants it out of the file.
        still = [c for c in study if not revision.quotes_left_out(c.prompt + c.answer)]
        tensors[kept_study.TENSOR] = kept_study.packed(_further_study(still, fresh))
    kept = sum(x.nbytes for name, x in tensors.items() if name not in ("prefix", kept_study.TENSOR))
    if sentence := verdict.sentence(report, share=kept / run.geometry.cache_bytes(len(prefix))):
        report["verdict"] = sentence
    report["seconds"] = clock.laps
    metadata = store.description(
        tensors,
        run.layout,
        run.geometry,
        provenance=run.provenance(model=file.metadata["model"], source=source),
        report=report,
    )
    return Outcome(way=way, tensors=tensors, metadata=metadata)


def _further_study(study: list[Conversation], fresh: list[Conversation]) -> list[Conversation]:
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
