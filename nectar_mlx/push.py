"""`nectar push book.nectar user/name`: shares a .nectar on the Hugging Face hub, with a card that says what it is."""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cli, store
from .core import terminal
from .core.types import JsonObject
from .errors import NectarError
from .inspect import describe
from .models import hub
from .retrieval import find_keys


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("push", "Shares a .nectar on the Hugging Face hub; every command then takes user/name for it.")
    parser.add_argument("nectar", type=Path, metavar="FILE", help="the .nectar file")
    parser.add_argument("repository", help="user/name")
    parser.add_argument("--public", action="store_true", help="everybody can see it (default: you alone)")
    parser.add_argument("--yes", action="store_true", help="do not ask before a text is made public")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and stop")
    return parser


def _work(args: argparse.Namespace) -> None:
    facts = describe(args.nectar)
    paths: list[Path] = [args.nectar]
    if facts["keys_file_bytes"]:
        paths.append(find_keys(args.nectar, store.tensors_digest(args.nectar)))
    sums = {path.name: _sha256(path) for path in paths}
    files: dict[str, bytes | Path] = {path.name: path for path in paths}
    files["README.md"] = card(facts, args.repository, sums).encode()
    size = facts["file_bytes"] + facts["keys_file_bytes"]
    if args.dry_run:
        _list(files, sums)
        cli.say(f"nothing is uploaded; it would go to {args.repository}, {'public' if args.public else 'private'}")
        return
    public = hub.is_public(args.repository)
    if public and not args.public:
        raise NectarError(f"{args.repository} is public: --public if everybody may read this, else another name")
    if args.public and not args.yes and not _confirmed(facts, args.repository):
        raise NectarError("nothing is uploaded")
    if args.public and public is False:
        cli.say(f"{args.repository} is private and stays so; its page on the hub can change that")
    cli.say(f"uploading {', '.join(map(str, paths))} ({size / 1e6:.1f} MB) to {args.repository}")
    print(hub.upload(args.repository, files, private=not args.public))


def _confirmed(facts: JsonObject, repository: str) -> bool:
    """Whether the person means it: whoever has the file can read the text."""
    what = f"{facts['context_tokens']:,} tokens of {facts['source'] or 'a text'}"
    return terminal.confirm(
        f"{repository} will be public, and the text can be read from the file ({what}). Publish it?",
        otherwise="--yes publishes it, without --public it is private",
    )


def _list(files: Mapping[str, bytes | Path], sums: Mapping[str, str]) -> None:
    """Name, bytes and sha256 of each file, on stdout."""
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sums[name]
        cli.show(f"{digest}  {size:>13,}  {name}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def card(facts: JsonObject, repository: str, sums: Mapping[str, str]) -> str:
    """The repository's README.md: what was fitted, on what, and how faithful it is. facts: of `inspect.describe`. sums:
    the sha256 of each file.
    """
    name = Path(facts["file"]).name
    rows = {
        "model": f"`{facts['model']}` (fingerprint `{facts['model_sha256'][:16]}`)",
        "context": f"{facts['context_tokens']:,} tokens of {facts['source'] or 'an unnamed text'}",
        "kind": f"{facts['kind']}, {facts['bits']} bits",
        "size": f"{facts['parameter_bytes'] / 1e6:.2f} MB, {facts['share_of_kv_cache']:.2%} of the KV cache in bf16",
        **_fidelity(facts["report"]),
    }
    if digest := facts["adapter_sha256"]:
        rows["adapter"] = f"`{facts['adapter']}` (fingerprint `{digest[:16]}`)"
    if keys := facts["keys_file_bytes"]:
        rows["exact keys"] = f"{keys / 1e6:.1f} MB beside it, of which each step reads a little"
    rows |= {f"sha256 of {name}": f"`{digest}`" for name, digest in sums.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    base = f"base_model: {facts['model']}\n" if facts["model"].count("/") == 1 and facts["model"][0] != "/" else ""
    return f"""---
library_name: nectar_mlx
tags: [mlx, nectar]
{base}---
# {name.removesuffix(".nectar")}

A long context, read once and kept as small functions of the query that stand for its keys and values (a
[Nectar](https://arxiv.org/abs/2605.09778)). The model named below answers about the text from this file.

| | |
|---|---|
{table}

    nectar ask {repository} "..."
    nectar chat {repository}

From Python: `Nectar.load("{repository}", model)`. The file holds the text's token ids, and what
is needed to answer about it: share it only where you may share the text.
"""


def _fidelity(report: JsonObject) -> dict[str, str]:
    """What the fit measured on answers that it was not fitted on; of an updated file also about what was new."""
    titles = {
        "kl": "divergence from full attention, held out (nats a token)",
        "agree": "same most likely token as full attention, held out",
        "gap_closed": "share of the gap between no context and full attention that it closes",
    }
    rows = dict[str, str]()
    for figures, about in ((report, ""), (report.get("new") or {}, ", about what its last update changed")):
        known = {title: figures[key] for key, title in titles.items() if isinstance(figures.get(key), int | float)}
        rows |= {f"{title}{about}": f"{value:.3g}" for title, value in known.items()}
    return rows or {"fidelity": "not measured"}


if __name__ == "__main__":
    sys.exit(main())
