"""`nectar push book.nectar user/name`: shares a .nectar on the Hugging Face hub, with a card that says what it is."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli, store
from .core.types import JsonObject
from .inspect import describe
from .models import hub
from .retrieval import find_keys


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("push", "Shares a .nectar on the Hugging Face hub; every command then takes user/name for it.")
    parser.add_argument("nectar", type=Path, help="the .nectar file")
    parser.add_argument("repository", help="user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is new, only you can see it")
    return parser


def _work(args: argparse.Namespace) -> None:
    facts = describe(args.nectar)
    paths: list[Path] = [args.nectar]
    if facts["keys_file_bytes"]:
        paths.append(find_keys(args.nectar, store.tensors_digest(args.nectar)))
    files: dict[str, bytes | Path] = {path.name: path for path in paths}
    files["README.md"] = card(facts, args.repository).encode()
    size = facts["file_bytes"] + facts["keys_file_bytes"]
    cli.say(f"uploading {', '.join(map(str, paths))} ({size / 2**20:.1f} MiB) to {args.repository}")
    print(hub.upload(args.repository, files, private=args.private))


def card(facts: JsonObject, repository: str) -> str:
    """The repository's README.md: what was fitted, on what, and how faithful it is. facts: of `inspect.describe`."""
    name = Path(facts["file"]).name
    rows = {
        "model": f"`{facts['model']}` (fingerprint `{facts['model_sha256'][:16]}`)",
        "context": f"{facts['context_tokens']:,} tokens of {facts['source'] or 'an unnamed text'}",
        "kind": f"{facts['kind']}, {facts['bits']} bits",
        "size": f"{facts['parameter_bytes'] / 2**20:.2f} MiB, {facts['share_of_kv_cache']:.2%} of the KV cache in bf16",
        **_fidelity(facts["report"]),
    }
    if keys := facts["keys_file_bytes"]:
        rows["exact keys"] = f"{keys / 2**20:.1f} MiB beside it, of which each step reads a little"
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
    """What the fit measured on answers that it was not fitted on."""
    titles = {
        "kl": "divergence from full attention, held out (nats a token)",
        "agree": "same most likely token as full attention, held out",
        "gap_closed": "share of the gap between no context and full attention that it closes",
    }
    figures = {title: report[key] for key, title in titles.items() if isinstance(report.get(key), int | float)}
    return {title: f"{value:.3g}" for title, value in figures.items()} or {"fidelity": "not measured"}


if __name__ == "__main__":
    sys.exit(main())
