"""`--shard`: a command that several processes run together, each with a part of the model."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from .errors import NectarError

if TYPE_CHECKING:
    import mlx.core as mx


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--shard`."""
    parser.add_argument(
        "--shard", action="store_true", help="under mlx.launch: divide the model's heads and networks among the ranks"
    )


def group(args: argparse.Namespace) -> "mx.distributed.Group | None":
    """The ranks among which the model is divided; None without --shard. All but the first are silent from now on.

    NectarError for a process by itself.
    """
    if not args.shard:
        return None
    import mlx.core as mx

    ranks = mx.distributed.init()
    if ranks.size() == 1:
        raise NectarError("--shard divides the model among several processes: start them with mlx.launch -n 2 …")
    if ranks.rank():
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return ranks
