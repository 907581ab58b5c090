"""`nectar fit --model Qwen3-1.7B --context book.txt`: reads a text and writes a .nectar."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, ranks, settings, store
from .core import environment
from .core.clock import duration
from .core.progress import no_log, silent
from .core.types import JsonObject
from .errors import NectarError
from .heads import KINDS
from .output import check as check_output

if TYPE_CHECKING:
    from .documents import Reading
    from .fitting.config import FitConfig
    from .nectar import Nectar


def main(argv: Sequence[str] | None = None) -> int:
    environment.launch_singly()
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("fit", "Reads a text once and writes a small file from which a model answers.")
    parser.add_argument(
        "--model", help="a name (Qwen3-1.7B), a folder, a .gguf file or a hub id (default: what is here)"
    )
    cli.add_adapter(parser)
    parser.add_argument("--context", required=True, nargs="+", metavar="FILE", help="files and folders to read")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="of a folder read only these: '*.md'"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="of a folder leave these aside")
    parser.add_argument("--strict", action="store_true", help="refuse if a file, or a part of one, cannot be read")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read, and stop")
    parser.add_argument("--output", type=Path, help="the file to write (default: the context's name with .nectar)")
    parser.add_argument("--force", action="store_true", help="replace the file, though it holds another fit")
    parser.add_argument("--context-tokens", type=int, metavar="N", help="read the first N tokens only")
    parser.add_argument(
        "--budget",
        metavar="SHARE",
        help="bytes to keep / bytes of the bf16 KV cache: 0.02 or 2%%; a size: 20M; or auto, the smallest at which "
        "answers are expected to be close to those of the full text (auto)",
    )
    parser.add_argument("--size", metavar="SIZE", help="size of the file: 20M, 500K or 5000B")
    parser.add_argument(
        "--kind",
        default="auto",
        help=f"of head function: auto, {', '.join(KINDS)} (hybrid, completion and retrieval also keep a file of exact "
        "keys)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        help="bits of a stored matrix entry: 16, or 4 to 8 (default: a step for each node, 4 bits on average; with "
        "exact keys 6; networks 8)",
    )
    parser.add_argument("--queries", type=int, metavar="N", help="captured queries a head (14000; GPU: 150000 or more)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the regression (750 on a GPU, 250 on a CPU)")
    parser.add_argument(
        "--effort",
        default="normal",
        help="quick, normal or best: how many answers are sampled, and steps; best also trains files below 1%% through "
        "the whole model, on a GPU (normal)",
    )
    parser.add_argument(
        "--memory",
        type=cli.size,
        metavar="SIZE",
        help="memory limit, e.g. 4G (half of what is free): a larger fit goes layer by layer, with its samples on disk",
    )
    parser.add_argument(
        "--layerwise",
        action=argparse.BooleanOptionalAction,
        help="fit layer by layer whatever the memory: only one layer's keys and values exist at a time",
    )
    parser.add_argument(
        "--prefill",
        default="dense",
        help="how the text is read: dense, or fixed (sparse attention, for texts too long for dense)",
    )
    parser.add_argument(
        "--keep-study", action="store_true", help="keep the questions and answers in the file: for `nectar update`"
    )
    parser.add_argument(
        "--with",
        dest="others",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="another .nectar that is in view, too: for answers from both, put together; may be given again",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and initialization (0)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="continue an interrupted fit; fail if it was another one")
    kept.add_argument("--fresh", action="store_true", help="start anew (default: continue an interrupted fit)")
    ranks.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    if arguments.budget and arguments.size:
        raise NectarError("--budget and --size both set how much to keep: give one of them")
    if arguments.others and arguments.shard:
        raise NectarError("a model that is divided among ranks fits one text alone: leave out --with or --shard")
    config = _config(arguments)
    output = arguments.output or _default_output(arguments.context)
    if not arguments.dry_run:
        store.check_writable(output)  # before hours of work
    from . import documents

    reading = documents.read(
        arguments.context, include=arguments.include, exclude=arguments.exclude, strict=arguments.strict
    )
    if arguments.dry_run:
        _show(reading, arguments)
        return
    from . import models
    from .fitting import pipeline, sharded
    from .fitting.checkpoint import Checkpoint
    from .fitting.distributed import World
    from .fitting.samples import kept_study
    from .installed import choose
    from .nectar import Nectar

    choose(arguments, log=cli.say)
    models.resolve(arguments.model, log=cli.say, progress=cli.progress)  # one that there is, before anything is asked
    wanted = {"model": arguments.model, "adapter": arguments.adapter or "", "config": asdict(config)}
    wanted["with"] = [Nectar.read(path).digest for path in arguments.others]
    check_output(output, arguments.force, wanted, reading.as_list())
    group, world = ranks.group(arguments), World.here()
    folder = output.with_name(output.name + (".partial" if world.first else f".rank-{world.rank}.partial"))
    checkpoint = Checkpoint(folder, must_match=arguments.resume, log=cli.say)
    with checkpoint.held():
        if arguments.fresh:
            checkpoint.empty()
        model, tokenizer = models.load(
            arguments.model, adapter=arguments.adapter, log=cli.say, progress=cli.progress, group=group
        )
        others = [Nectar.load(path, model, tokenizer) for path in arguments.others]
        fit = sharded.fit if group else partial(pipeline.fit, checkpoint=checkpoint, others=others)
        try:
            with cli.overall() if world.first else nullcontext(silent) as progress:
                fitted = fit(
                    model,
                    tokenizer,
                    reading.text,
                    config=config,
                    name=arguments.model,
                    source=", ".join(Path(c).name for c in arguments.context),
                    progress=progress,
                    log=cli.say if world.first else no_log,
                    world=world,
                )
                nectar = Nectar(*fitted)
                if not world.first:  # the first one writes what all have
                    checkpoint.clear()
                    return
                nectar.keep(reading, tokenizer)
                nectar.save(output)
        except (KeyboardInterrupt, NectarError):
            if checkpoint.continues():
                cli.say(f"the finished work is kept in {folder}: the same command continues")
            raise
        checkpoint.clear()
    _report(output, nectar, as_json=arguments.json)
    cli.say(nectar.text(tokenizer).summary())
    if config.keep_study and kept_study.TENSOR not in nectar.tensors:  # of a text in parts, and of kinds without any
        cli.say("--keep-study: this fit has no conversations to keep, so `nectar update` will fit a changed text anew")


def _config(arguments: argparse.Namespace) -> "FitConfig":
    """The settings; NectarError for a wrong one, before documents are read."""
    from .fitting.config import FitConfig, effort, parse_budget, parse_size

    names = ("kind", "bits", "queries", "steps", "seed", "context_tokens", "memory", "layerwise", "prefill")
    options = effort(arguments.effort)
    options |= {name: value for name in names if (value := getattr(arguments, name)) is not None}
    options["keep_study"] = arguments.keep_study
    if arguments.size is None:
        options |= parse_budget(arguments.budget or settings.read().budget or "auto")
    else:
        options["size"] = parse_size(arguments.size)
    return FitConfig(**options)


def _show(reading: "Reading", arguments: argparse.Namespace) -> None:
    """What would be read, and what the fit would take."""
    from .installed import choose

    for report in reading.files:
        cli.say(report.describe())
    without_model = ""
    try:
        choose(arguments, log=cli.say)
    except NectarError as error:
        without_model = str(error)
    tokens, counted = _tokens(reading.text, arguments.model)
    cli.say(f"{reading.counts()}; {'' if counted else 'about '}{tokens:,} tokens")
    facts: JsonObject = {"files": reading.as_list(), "characters": len(reading.text), "tokens": tokens}
    try:
        if without_model:
            raise NectarError(without_model)
        facts |= _estimate(arguments, tokens)
    except NectarError as error:
        cli.say(f"time and size are not estimated: {error}")
    else:
        seconds, size = facts["seconds"], facts["file_bytes"]
        cli.say(f"estimated: {duration(seconds)} here, which may be off by half, and a file of {size / 1e6:,.2f} MB")
        for line in filter(None, (facts["undistilled"], facts["exceeded"])):
            cli.say(line)
    if arguments.json:
        print(json.dumps(facts))


def _tokens(text: str, model: str | None) -> tuple[int, bool]:
    """How many tokens a text has; counted where the model is a folder, else four characters each."""
    if model is None or not (file := Path(model).expanduser() / "tokenizer.json").is_file():
        return len(text) // 4, False
    from tokenizers import Tokenizer

    try:
        return len(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False)), True
    except Exception:  # the library raises nothing more special for a damaged file
        return len(text) // 4, False


def _estimate(arguments: argparse.Namespace, tokens: int) -> JsonObject:
    """Seconds and bytes of a fit on this machine, as `nectar plan` estimates them."""
    from .fitting.estimate import estimate
    from .fitting.machines import here, named_shape, settings

    machine = here()
    budget = arguments.size or arguments.budget or "auto"
    options = settings(machine, budget=budget, kind=arguments.kind, effort=arguments.effort)
    count = min(tokens, arguments.context_tokens or tokens)
    shape = named_shape(arguments.model)
    expected = estimate(shape, machine, options, max(1, count), others=bool(arguments.others))
    return {
        "seconds": round(expected.seconds, 1),
        "file_bytes": int(expected.size),
        "basis": machine.basis,
        "undistilled": expected.undistilled,
        "exceeded": expected.exceeded,
    }


def _report(output: Path, nectar: "Nectar", *, as_json: bool) -> None:
    from .retrieval import EXACT_FRACTION, kv_path

    size, whole, tokens = output.stat().st_size, nectar.cache_nbytes, len(nectar.prefix)
    cli.say(
        f"{output}: {size / 1e6:.2f} MB for {tokens:,} tokens: {nectar.nbytes / whole:.1%} of the KV cache's "
        f"{whole / 1e6:.1f} MB, {size / tokens:,.0f} bytes a token; "
        f"{sum(nectar.report['seconds'].values()):.0f} s{_mode(nectar)}"
    )
    if nectar.keys is not None:
        keys = kv_path(output, nectar.digest)
        cli.say(f"{keys}: {keys.stat().st_size / 1e6:.2f} MB of exact keys and values, of which a step reads a few")
        if not nectar.hybrid_banks():
            cli.say(f"the text is so short that {EXACT_FRACTION:.0%} of its keys are none: ask with a larger --exact")
    if left_out := nectar.report.get("left_out_tokens"):
        cli.say(f"{left_out:,} more tokens of the text were left out, because of --context-tokens")
    if nectar.verdict:
        cli.say(nectar.verdict)
    if names := nectar.report.get("with"):
        report = nectar.report
        cli.say(
            f"with {', '.join(names)} in view: KL {report['kl_with']:.4f}, the same token {report['agree_with']:.1%}"
        )
    if as_json:
        facts = {"output": str(output), "bytes": size, "cache_bytes": whole, "tokens": tokens}
        print(json.dumps(facts | nectar.report))


def _mode(nectar: "Nectar") -> str:
    """How it was fitted, if not in the usual way."""
    layerwise = ", layer by layer" if nectar.report.get("layerwise") else ""
    return layerwise + (f", in {len(nectar.chunks)} chunks" if nectar.chunks else "")


def _default_output(context: Sequence[str]) -> Path:
    name = os.path.basename(os.path.abspath(context[0])) or "context"  # the disk's root has no name
    return Path(name).with_suffix(".nectar")


if __name__ == "__main__":
    sys.exit(main())
