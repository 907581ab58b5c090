"""`nectar update book.nectar --context book-v2.txt`: brings one file up to date with its text, for less than a fit."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, store
from .errors import NectarError

if TYPE_CHECKING:
    from .core.types import Tokenizer
    from .documents import Reading
    from .nectar import Nectar

_MOST = 0.75  # of a text: where more has changed, it is most likely the wrong one


def names_file(argv: Sequence[str]) -> bool:
    """Whether these arguments of `nectar update` are of one file: the library's update takes no file and no context."""
    return bool(argv) and (argv[0].endswith(".nectar") or any(a.partition("=")[0] == "--context" for a in argv))


def main(argv: Sequence[str]) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "update", "Brings a .nectar up to date with its text. Only what changed is fitted, where that is good enough."
    )
    parser.add_argument("file", type=Path, metavar="FILE.nectar", help="the file to bring up to date")
    parser.add_argument("--context", required=True, nargs="+", metavar="FILE", help="the files and folders as they are")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="of a folder read only these: '*.md'"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="of a folder leave these aside")
    parser.add_argument("--strict", action="store_true", help="refuse if a file, or a part of one, cannot be read")
    parser.add_argument("--output", type=Path, help="the file to write (default: the same one)")
    parser.add_argument("--force", action="store_true", help="replace the file, though most of the text has changed")
    cli.add_model(parser)
    parser.add_argument("--fresh", action="store_true", help="start anew (default: continue an interrupted update)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _work(args: argparse.Namespace) -> None:
    file: Path = args.file.resolve() if args.file.is_symlink() else args.file  # its keys lie beside it, not the link
    output: Path = args.output or file
    tensors, metadata = store.read(file)
    store.check_writable(output)
    from . import documents
    from .fitting.checkpoint import Checkpoint
    from .fitting.distributed import World
    from .fitting.updating import update
    from .nectar import Nectar
    from .store import load

    if World.here().size > 1:
        raise NectarError("an update is the work of one process: start it without mlx.launch")
    reading = documents.read(args.context, include=args.include, exclude=args.exclude, strict=args.strict)
    folder = output.with_name(output.name + ".partial")
    checkpoint = Checkpoint(folder, log=cli.say)
    source = ", ".join(Path(c).name for c in args.context)
    with checkpoint.held():
        if args.fresh:
            checkpoint.empty()
        model, tokenizer = cli.load_model(metadata["model"], args)
        load.check_adapter(file, metadata, model)
        try:
            with cli.overall() as progress:
                outcome = update(
                    model,
                    tokenizer,
                    reading.text,
                    tensors=tensors,
                    metadata=metadata,
                    source=source,
                    progress=progress,
                    checkpoint=checkpoint,
                    log=cli.say,
                    most=_MOST if _same_file(output, file) and not args.force else 1.0,
                )
        except (KeyboardInterrupt, NectarError):
            if checkpoint.continues():
                cli.say(f"the finished work is kept in {folder}: the same command continues")
            raise
        if outcome.tensors is not None and outcome.metadata is not None:
            nectar = Nectar(outcome.tensors, outcome.metadata, outcome.keys)
            nectar.keep(reading, tokenizer)
            nectar.save(output)
            done = {"fit": "fitted anew", "append": "text added", "edit": "changes fitted"}[outcome.way]
        else:
            nectar = Nectar.load(file, model)  # with the keys beside it
            is_new = _described_anew(nectar, tokenizer, reading, source)
            done = "is up to date" + (", and names its text anew" if is_new else "")
            if not _same_file(output, file):
                nectar.save(output)
            elif is_new:  # its keys stay beside it as they are, also where they cannot be read just now
                store.write(output, nectar.tensors, nectar.metadata | {"report": nectar.report})
        checkpoint.clear()
    _report(output, nectar, outcome.way, done, reason=outcome.reason, as_json=args.json)
    cli.say(nectar.text(tokenizer).summary())


def _described_anew(nectar: "Nectar", tokenizer: "Tokenizer", reading: "Reading", source: str) -> bool:
    """Brings up to date what the file of an equal text says of its documents, such as their names, if it tells of them;
    whether that was to be done."""
    from .store import text

    told = {name: nectar.report[name] for name in text.KEYS if name in nectar.report}
    today = text.keep(reading, tokenizer, nectar.prefix)
    if not told or (told, nectar.metadata.get("source", "")) == (today, source):
        return False
    for name in told:
        del nectar.report[name]
    nectar.report |= today
    nectar.metadata["source"] = source
    return True


def _same_file(first: Path, second: Path) -> bool:
    return first.exists() and os.path.samefile(first, second)


def _report(output: Path, nectar: "Nectar", way: str, done: str, *, reason: str, as_json: bool) -> None:
    size, tokens = output.stat().st_size, len(nectar.prefix)
    seconds = sum(nectar.report.get("seconds", {}).values())
    took = f"; {seconds:.0f} s" if way != "same" else ""
    cli.say(f"{output}: {done}: {size / 1e6:.2f} MB for {tokens:,} tokens{took}")
    if nectar.verdict:
        cli.say(nectar.verdict)
    if way == "append" and nectar.report["updated"]["grown"] > 1:
        from .fitting.updating.plan import MOST_GROWN

        grown = nectar.report["updated"]["grown"]
        cli.say(f"appends made it {grown:.2f} times as large as a fit would; beyond {MOST_GROWN} it is fitted anew")
    if as_json:
        facts = {"output": str(output), "way": way, "reason": reason, "bytes": size, "tokens": tokens}
        print(json.dumps(facts | nectar.report))
