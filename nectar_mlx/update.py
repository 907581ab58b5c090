"""`nectar update`: looks again at all that was added, and fits what is new, changed, or of an older model.

Where the first argument is a .nectar: `update_file`.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from . import cli, from_library, update_file
from .core import environment
from .errors import NectarError


def main(argv: Sequence[str] | None = None) -> int:
    environment.launch_singly()
    argv = sys.argv[1:] if argv is None else argv
    return update_file.main(argv) if update_file.names_file(argv) else cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "update",
        "Looks again at all that was added to the library, and fits what is new, changed, or of another model. "
        "`nectar update FILE.nectar --context FILE ...` brings one file up to date (see `nectar update x.nectar "
        "--help`).",
    )
    from_library.add_model(parser)
    cli.add_library(parser)
    parser.add_argument("--watch", action="store_true", help="go on until interrupted")
    parser.add_argument("--every", type=_seconds, default=10.0, metavar="SECONDS", help="between two looks (10)")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object (a line a look)")
    return parser


def _work(args: argparse.Namespace) -> None:
    library = from_library.open_library(args)
    if library.is_empty:
        raise NectarError(f"the library {library.folder.path} is empty: `nectar add FOLDER` fills it")
    fitter = from_library.fitter(library, args)
    with cli.overall() as progress:
        added = library.update(fitter, progress=progress, log=cli.say)
    from_library.report(added, as_json=args.json)
    while args.watch:
        time.sleep(args.every)
        with cli.overall() as progress:
            added = library.update(fitter, progress=progress, log=cli.say, retry=False)
        if added.scan.read or added.work.fitted or added.work.failed:
            from_library.report(added, as_json=args.json)


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
