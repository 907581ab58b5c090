"""`nectar list`: the documents of the library, and what became of each."""

import argparse
import json
import sys
from collections.abc import Sequence

from . import cli, from_library
from .library import Document

_WIDEST = 60  # characters of a name to which the others are brought: one very long name is no column


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("list", "Shows the documents of the library.")
    cli.add_library(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _work(args: argparse.Namespace) -> None:
    library = from_library.open_library(args)
    documents, identity = [document.looked_at() for document in library.documents()], library.identity
    if args.json:
        facts = {"library": str(library.folder.path), "model": identity.name if identity else None}
        print(json.dumps(facts | {"documents": [document.as_json() for document in documents]}))
        return
    width = min(_WIDEST, max((len(document.name) for document in documents), default=0))
    for document in documents:
        print(f"{document.name:<{width}}  {_described(document)}")
    fitted = "fitted on" if any(document.file for document in documents) else "to be fitted on"
    model = f", {fitted} {identity.described}" if identity else ""
    hint = "" if documents else ": `nectar add FOLDER` fills it"
    count = f"{len(documents):,} document{'s' * (len(documents) != 1)}"
    cli.say(f"{count} in {library.folder.path}{model}{hint}")
    if any(document.state == "damaged" for document in documents):
        cli.say("`nectar update` fits again what is damaged")
    if any(document.state == "waiting" for document in documents):
        cli.say("`nectar update` fits what waits")


def _described(document: Document) -> str:
    parts = [document.state + (f": {document.reason}" if document.reason else "")]
    if document.text is not None:
        unit = document.places[0].unit if document.places else ""
        parts += [f"{len(document.places)} {unit}{'s' * (len(document.places) > 1)}"] if unit else []
        parts.append(f"{document.characters:,} characters")
    parts += [f"in a file with {document.shared} more"] if document.shared else []
    parts += [f"left out: {note}" for note in document.left_out]
    parts += ["gone from the disk"] if document.missing else []
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
