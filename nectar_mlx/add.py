"""`nectar add FOLDER`: reads what is new or changed in files and folders, and fits it for the library."""

import argparse
import sys
from collections.abc import Sequence

from . import cli, from_library
from .core import environment


def main(argv: Sequence[str] | None = None) -> int:
    environment.launch_singly()
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("add", "Adds documents to the library: reads and fits what is new or changed.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and folders")
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="of a folder only these: '*.md'")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="of a folder leave these aside")
    from_library.add_model(parser)
    cli.add_library(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")
    return parser


def _work(args: argparse.Namespace) -> None:
    library = from_library.open_library(args, make=True)
    fitter = from_library.fitter(library, args)
    with cli.overall() as progress:
        added = library.add(
            args.paths, fitter, include=args.include, exclude=args.exclude, progress=progress, log=cli.say
        )
    from_library.report(added, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
