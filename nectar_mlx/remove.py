"""`nectar remove PATH`: takes documents out of the library, with every file that holds them."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import cli, from_library
from .errors import NectarError


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("remove", "Takes documents out of the library. The documents themselves stay where they are.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files, folders, or names that `nectar list` shows")
    parser.add_argument("--missing", action="store_true", help="all documents that are gone from the disk")
    cli.add_library(parser)
    parser.add_argument("--json", action="store_true", help="print what was removed as one JSON object")
    return parser


def _work(args: argparse.Namespace) -> None:
    if not args.paths and not args.missing:
        raise NectarError("say what to remove: files, folders, names, or --missing")
    removed = from_library.open_library(args).remove(args.paths, missing=args.missing)
    cli.say(f"{(count := len(removed.documents)):,} document{'s' * (count != 1)} removed")
    if removed.waiting:
        cli.say(
            f"{', '.join(removed.waiting)}: no answers until `nectar update` has fitted "
            f"{'them' if len(removed.waiting) > 1 else 'it'} again: the file held what was removed, and is removed, too"
        )
    if args.json:
        print(json.dumps(vars(removed)))


if __name__ == "__main__":
    sys.exit(main())
