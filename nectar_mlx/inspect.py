"""`nectar inspect book.nectar`: what is in a .nectar, without its model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli
from .core.types import JsonObject
from .errors import NectarError
from .mlxlm.kept import State
from .models import hub
from .nectar import Nectar
from .retrieval import find_keys
from .store import load

_PACKED = {"verdict", "edits", "text", "packed_files"}  # shown first, or packed
_SHARES = {"share_of_kv_cache", "budget", "agree", "gap_closed", "agree_with"}
_UNCHECKED = "How close this file is to the full text has not been measured: `nectar evaluate` measures it."
_LEGEND = (
    "KL: how far answers are from those with the full text, in nats a token; 0 is no difference. Agree: share of "
    "tokens that are the same. Gap closed: 100% is an answer as with the full text, 0% as without it. Share of KV "
    "cache: size of the file without tokens and report, against what the full text takes in memory."
)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("inspect", "Shows what is in a .nectar, after checking that it is whole.")
    parser.add_argument("nectar", metavar="FILE", help="a .nectar file, or the id of one on the hub (user/name)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _work(args: argparse.Namespace) -> None:
    path = hub.nectar_file(args.nectar)
    if args.nectar == cli.LIBRARY and not path.exists():
        raise NectarError("the library is many files; `nectar list` shows what is in it")
    facts = describe(path)
    if args.json:
        print(json.dumps(facts))
        return
    cli.paragraph(facts["report"].get("verdict") or _UNCHECKED)
    cli.paragraph(_LEGEND)
    print()
    shown = {name: value for name, value in facts.items() if name != "report"} | facts["report"]
    for name, value in shown.items():
        # What is per head is for --json, and what is not there is nothing to read.
        if name not in _PACKED and not isinstance(value, list | dict) and not _is_absent(value):
            cli.row(name.replace("_", " "), _readable(name, value))
    if new := facts["report"].get("new"):
        cli.row("about what is new", ", ".join(f"{n.replace('_', ' ')} {_readable(n, x)}" for n, x in new.items()))
    if names := facts["report"].get("with"):
        cli.row("fitted with", ", ".join(map(str, names)))
    for file in facts["report"].get("files", []):
        cli.row("document", _file(file))


def _is_absent(value: object) -> bool:
    return value is None or value == "" or (type(value) is int and value == 0)


def describe(path: Path) -> JsonObject:
    """The facts of a .nectar, as `--json` prints them; NectarError if it is not a whole one."""
    nectar = Nectar.read(path)
    geometry, layout, metadata = nectar.geometry, nectar.layout, nectar.metadata
    keys = find_keys(path, nectar.digest)
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "model": metadata["model"],
        "adapter": metadata.get("adapter", {}).get("path", ""),
        "source": metadata.get("source", ""),
        "context_tokens": len(nectar.prefix),
        "chunks": max(1, len(nectar.chunks)),
        "kind": layout.kind,
        "bits": nectar.bits,
        "layers": geometry.n_layers,
        "window_layers": sum(1 for layer in geometry.layers if layer.window),
        "state_layers": sum(1 for layer in geometry.layers if layer.states),
        "state_bytes": sum(kept.nbytes for kept in nectar.windows.values() if isinstance(kept, State)),
        "decode_kernel": load.no_kernel(layout) or "yes, where there is a GPU",
        "kv_heads": geometry.n_kv_heads,
        "head_dim": geometry.head_dim,
        "parameter_bytes": nectar.nbytes,
        "kv_cache_bytes": nectar.cache_nbytes,
        "keys_file_bytes": keys.stat().st_size if nectar.is_hybrid and keys.is_file() else 0,
        "share_of_kv_cache": round(nectar.nbytes / nectar.cache_nbytes, 5),
        "model_sha256": metadata["model_sha256"],
        "adapter_sha256": metadata.get("adapter", {}).get("sha256", ""),
        "tokenizer_sha256": metadata["tokenizer_sha256"],
        "nectar_mlx": metadata["nectar_mlx"],
        "config": metadata.get("config", {}),
        "report": nectar.report,
    }


def _file(file: JsonObject) -> str:
    """One file that the text was read from: how much it gave, and what was left out."""
    if file["reason"]:
        return f"{file['name']}: not read: {file['reason']}"
    count = len(file["places"])
    counts = [f"{count} {file['unit']}{'s' * (count > 1)}"] if count else []
    left_out = [f"left out: {note}" for note in file["left_out"]]
    return f"{file['name']}: " + "; ".join([", ".join([*counts, f"{file['characters']:,} characters"]), *left_out])


def _readable(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 1e6:,.2f} MB ({value:,} bytes)"
    if name.endswith("sha256"):
        return f"{value}"[:16]
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items() if v is not None)
    if isinstance(value, float):
        return f"{100 * value:.3g}%" if name in _SHARES else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
