"""`nectar export book.nectar book.safetensors`: the fitted nodes as plain arrays, for engines other than MLX."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli, interchange
from .errors import NectarError
from .nectar import Nectar


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("export", "Writes a .nectar's nodes (keys, values, biases) for other engines.")
    parser.add_argument("nectar", metavar="FILE", help="a .nectar file, or the id of one on the hub (user/name)")
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--dtype", choices=tuple(interchange.DTYPES), default="float16", help="of the nodes (float16)")
    parser.add_argument(
        "--prompt-cache", action="store_true", help="write mlx-lm's prompt cache instead (files of --kind exact)"
    )
    return parser


def _work(args: argparse.Namespace) -> None:
    if args.output.exists() and Path(args.nectar).exists() and args.output.samefile(args.nectar):
        raise NectarError(f"{args.output} is the .nectar itself: name another file to write")
    if args.output.exists() and not interchange.is_written_here(args.output):
        raise NectarError(f"{args.output} exists and is not from `nectar export`: name another file to write")
    nectar = Nectar.read(args.nectar)
    if args.prompt_cache:
        interchange.write_prompt_cache(nectar, args.output)
    else:
        interchange.write_nodes(nectar, args.output, dtype=args.dtype)
    cli.say(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB; answers start at position {nectar.start:,}")
    if nectar.is_hybrid:
        cli.say("the exact keys that this file reads for every question are not in it: its answers are less close")


if __name__ == "__main__":
    sys.exit(main())
