"""What an update costs and loses, beside a fit of the same text.

    python -m tests.fitting.update_figures MODEL TEXT --kind append [--tokens 1500] [--settings '{"budget": 0.05}'] ...

MODEL: a name, a folder or a .gguf file. TEXT: a file. Of it the first --tokens are the new text. append: the old text
lacks its last tokens, a tenth as many as it has. edit: in the old text some lines, --share of it, are others: those
behind the tokens that are taken, so TEXT must be longer. The old text is fitted, keeping its conversations, then
updated to the new text, then the new text is fitted, with --fits seeds. All are compared with the full cache, on
answers to questions of a seed that no fit uses: --questions about the whole text and --about-new about what changed.
One JSON object: seconds by stage (wall, processor), bytes, and the divergences; `ratio` is the update's divergence over
that of the fits, with the standard error over questions (of the ratio of two means, by its first-order residuals).

Nothing is downloaded where MODEL and TEXT are paths.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nectar_mlx import Nectar, models, store
from nectar_mlx.fitting import fidelity, pipeline, updating
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.prefill import read_text
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.fitting.samples import kept_study
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.samples.self_study import answer, check_conversations
from nectar_mlx.fitting.updating.revision import Revision
from nectar_mlx.mlxlm import attention_patch

SEED = 900_001  # of the questions: fits derive theirs from 0 on
ANSWER = 64  # tokens of their answers, at most
AROUND = 60  # tokens before a change that questions about it may quote


class Stages:
    """A `Progress` that adds up wall and processor seconds of each stage, [wall, processor]."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, description: str, total: int, /) -> Iterator[Any]:
        before = now()
        yield lambda done: None
        spent = self.seconds.setdefault(description, [0.0, 0.0])
        for i, (a, b) in enumerate(zip(before, now(), strict=True)):
            spent[i] += b - a


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def timed(work: Any, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The result of work(*args, progress=…), and the seconds that it took: in all, and by stage."""
    stages, before = Stages(), now()
    result = work(*args, progress=stages, **options)
    whole = [b - a for a, b in zip(before, now(), strict=True)]
    stages.seconds["other"] = [w - sum(s[i] for s in stages.seconds.values()) for i, w in enumerate(whole)]
    by_stage = {name: [round(x, 2) for x in seconds] for name, seconds in stages.seconds.items()}
    return result, {"wall": round(whole[0], 2), "processor": round(whole[1], 2), "stages": by_stage}


def appended(tokenizer: Any, text: str, *, tokens: int, share: float) -> tuple[str, str]:
    """The first tokens of a text, without and with the last of them: so much as is a share of the rest."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    new = tokenizer.decode(ids).rstrip()
    end = len(tokenizer.decode(ids[: round(len(ids) / (1 + share))]))
    space = new.rfind(" ", 0, end)
    return new[: space if space > 0 else end], new


def edited(tokenizer: Any, text: str, *, tokens: int, share: float) -> tuple[str, str]:
    """The first tokens of a text, with other lines in one place before: those behind these tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    new = tokenizer.decode(ids).rstrip()
    lines, behind = new.split("\n"), text[len(new) :].split("\n")[1:]

    def several(lines: list[str], first: int) -> slice:
        """As many lines from one on as are the share asked for."""
        for end in range(first + 1, len(lines) + 1):
            if len(tokenizer.encode("\n".join(lines[first:end]))) >= share * len(ids):
                return slice(first, end)
        return sys.exit(f"there are too few lines behind {len(ids)} tokens of the text: give fewer --tokens")

    at = several(lines, len(lines) // 3)
    return "\n".join([*lines[: at.start], *behind[several(behind, 0)], *lines[at.stop :]]), new


def questions(run: FitRun, context: Any, revision: Revision, *, about_all: int, about_new: int) -> list[Conversation]:
    """Answered by the full cache; those about what changed come last."""
    asked = check_conversations(run.tokenizer, revision.new, first=0, count=about_all, seed=SEED)
    for number, (start, end) in enumerate(revision.passages(AROUND)[:4]):
        passage = list(revision.new[start:end])
        asked += check_conversations(run.tokenizer, passage, first=0, count=about_new, seed=SEED + 1 + number)
    asked = asked[: about_all + about_new]
    answer(run, context, asked, seed=SEED)
    return asked


def ratio(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[float]:
    """The ratio of two mean divergences over the tokens of questions, and its standard error over questions."""
    a, b = (np.array([x.sum() for x in of]) for of in (ours, theirs))
    r, n = a.sum() / b.sum(), len(a)
    error = np.sqrt(n / max(1, n - 1) * np.square(a - r * b).sum()) / b.sum()
    return [round(float(r), 3), round(float(error), 3)]


def size(nectar: Nectar) -> dict[str, Any]:
    tensors = {name: x for name, x in nectar.tensors.items() if name not in ("prefix", kept_study.TENSOR)}
    nbytes = sum(x.nbytes for x in tensors.values())
    return {"bytes": nbytes, "share": round(nbytes / nectar.geometry.cache_bytes(len(nectar.prefix)), 5)}


def fit(model: Any, tokenizer: Any, text: str, *, kept: Path | None, **options: Any) -> tuple[Nectar, dict[str, Any]]:
    """A fit and its seconds, or those that an earlier call with the same arguments has kept there."""
    seconds = kept and kept.with_suffix(".json")
    if kept and seconds and seconds.exists():
        return Nectar(*store.read(kept)), json.loads(seconds.read_text())
    fitted, took = timed(pipeline.fit, model, tokenizer, text, **options)
    if kept and seconds:
        store.write(kept, fitted[0], fitted[1])
        seconds.write_text(json.dumps(took))
    return Nectar(*fitted), took


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--kind", choices=("append", "edit"), default="append")
    parser.add_argument("--tokens", type=int, default=1 << 40, help="of the text that are taken")
    parser.add_argument("--skip", type=int, default=0, help="characters at the beginning of the file")
    parser.add_argument("--share", type=float, help="of the text that is new (default: 0.1 appended, 0.05 edited)")
    parser.add_argument("--settings", type=json.loads, default={}, help="of FitConfig, as JSON")
    parser.add_argument("--fits", type=int, default=1, help="fits of the new text, of seeds 0, 1, …")
    parser.add_argument("--repeat", type=int, default=1, help="times the update is made: the last one counts")
    parser.add_argument("--folder", type=Path, help="where fits are kept, for the next call with the same arguments")
    parser.add_argument("--questions", type=int, default=48, help="about the whole text")
    parser.add_argument("--about-new", type=int, default=12, help="about what changed")
    args = parser.parse_args(argv)
    config = FitConfig(**args.settings, keep_study=True)
    model, tokenizer = models.load(args.model)
    text, make = args.text.read_text()[args.skip :], {"append": appended, "edit": edited}[args.kind]
    share = args.share or {"append": 0.1, "edit": 0.05}[args.kind]
    old_text, new_text = make(tokenizer, text, tokens=args.tokens, share=share)

    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)

    def kept(name: str) -> Path | None:
        return args.folder and args.folder / f"{name}.nectar"

    old, of_old = fit(model, tokenizer, old_text, kept=kept(f"old-{args.kind}"), config=config, name=args.model)
    updates = []
    for _ in range(args.repeat):
        outcome, seconds = timed(
            updating.update, model, tokenizer, new_text, tensors=old.tensors, metadata=old.metadata, config=config
        )
        updates.append(seconds)
    if outcome.tensors is None or outcome.metadata is None:
        sys.exit("the lines and their replacement are the same: give other --tokens")
    updated = Nectar(outcome.tensors, outcome.metadata)
    fits, of_fits = [], []
    for seed in range(args.fits):
        other = FitConfig(**args.settings | {"seed": seed}, keep_study=True)
        one, seconds = fit(model, tokenizer, new_text, kept=kept(f"new-{seed}"), config=other, name=args.model)
        fits.append(one)
        of_fits.append(seconds)
    asking = FitConfig(**args.settings | {"answer_tokens": ANSWER})
    run = FitRun(model=model, tokenizer=tokenizer, geometry=attention_patch.route(model), config=asking)
    context = read_text(model, updated.prefix, run.geometry)
    revision = Revision.of(old.prefix, updated.prefix)
    asked = questions(run, context, revision, about_all=args.questions, about_new=args.about_new)
    views = {"update": updated.make_cache} | {f"fit {i}": f.make_cache for i, f in enumerate(fits)}
    # A prefix may be tokenized otherwise at the end of the old text: a fit is asked only where it stands for the same.
    same = [f.prefix == updated.prefix for f in fits]
    compared = fidelity.compare(model, context.make_cache, views, asked)
    by_question = {name: [d.of([i]).kl for i in range(len(asked))] for name, d in compared.items()}
    fitted_kl = [np.mean(of, axis=0) for of in zip(*(by_question[f"fit {i}"] for i in range(len(fits))), strict=True)]
    parts = {"all": slice(None), "general": slice(args.questions), "about new": slice(args.questions, None)}
    result = {
        "kind": args.kind,
        "way": outcome.way,
        "reason": outcome.reason,
        "tokens": [len(revision.old), len(revision.new)],
        "changed": sum(end - start for start, end in revision.changed),
        "same prefix": all(same),
        "settings": args.settings,
        "seconds": {"old fit": of_old, "updates": updates, "fits": of_fits},
        "cost": {name: [round(updates[-1][name] / f[name], 3) for f in of_fits] for name in ("wall", "processor")},
        "size": {"old": size(old), "update": size(updated), "fits": [size(f) for f in fits]},
        "samples": {"update": updated.report.get("queries"), "fits": [f.report["queries"] for f in fits]},
        "kl": {
            n: {p: float(f"{np.concatenate(of[at]).mean():.4g}") for p, at in parts.items() if of[at]}
            for n, of in by_question.items()
        },
        "ratio": {p: ratio(by_question["update"][at], fitted_kl[at]) for p, at in parts.items() if fitted_kl[at]},
    }
    if len(fits) > 1:
        result["between fits"] = [ratio(by_question[f"fit {i}"], by_question["fit 0"]) for i in range(1, len(fits))]
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
