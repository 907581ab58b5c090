"""`decode`: a decode step against other ways to keep a context; `fit`: time and memory of a fit's stages; `selftest`:
whether each kernel is right, and its speed."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import cli
from .benchmarks import report, run
from .benchmarks.cache_variants import VARIANTS
from .benchmarks.measure import CACHE_STEP, SHAPES
from .core import environment, plotting
from .core.progress import no_log
from .errors import NectarError
from .fitting.config import FitConfig, effort
from .fitting.distributed import World

_CONTEXTS = {"decode": "1k,8k,32k,128k,512k,1m", "fit": "8k,32k,128k", "selftest": "1k"}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("what", choices=("decode", "fit", "selftest"), metavar="WHAT", help="decode, fit or selftest")
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-1.7b", help="the model's sizes; its weights are random"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the model (default: the shape's)")
    defaults = ", ".join(f"{what}: {_CONTEXTS[what]}" for what in ("decode", "fit"))
    parser.add_argument("--contexts", help=f"context lengths (default for {defaults})")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw tokens/s, or a fit's seconds, over the context length"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    of_decode = parser.add_argument_group("decode")
    of_decode.add_argument("--methods", default=",".join(VARIANTS), help=f"default {','.join(VARIANTS)}")
    of_decode.add_argument("--live", type=int, default=64, help="tokens after the context (default 64)")
    of_decode.add_argument("--batch", type=int, default=1, help="sequences that share the context (default 1)")
    of_decode.add_argument("--rounds", type=int, default=5, help="each measures everything once (default 5)")
    of_decode.add_argument("--attention-only", action="store_true", help="do not run the rest of the model")
    of_selftest = parser.add_argument_group("selftest")
    of_selftest.add_argument(
        "--tune",
        action="store_true",
        help="measure the decode kernel with other numbers of rows in flight, query rows and blocks, and nothing else",
    )
    of_fit = parser.add_argument_group("fit")
    of_fit.add_argument("--queries", type=int, metavar="N", help="captured queries a head (default: as a fit)")
    of_fit.add_argument("--steps", type=int, metavar="N", help="steps of the regression (default: as a fit)")
    of_fit.add_argument("--effort", default="normal", help="quick, normal or best (normal)")
    of_fit.add_argument("--budget", type=float, default=0.02, help="bytes to keep / bytes of the KV cache (0.02)")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    for name in ("live", "batch", "rounds", "layers", "queries", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise NectarError(f"--{name} {value}: at least 1")
    if arguments.plot:
        plotting.check(arguments.plot)
    shape = replace(SHAPES[arguments.shape], batch=arguments.batch)
    shape = replace(shape, layers=arguments.layers or shape.layers)
    contexts = _tokens(arguments.contexts or _CONTEXTS[arguments.what])
    if arguments.what == "selftest":
        result = run.tune(shape, log=cli.say) if arguments.tune else run.selftest()
    elif arguments.what == "fit":
        environment.launch_singly()
        given = {"queries": arguments.queries, "steps": arguments.steps}
        options = effort(arguments.effort) | {name: value for name, value in given.items() if value is not None}
        config = FitConfig(budget=arguments.budget, **options)
        first = World.here().first
        result = run.fit(shape, contexts, config, log=cli.say if first else no_log)
        if not first:  # one rank reports
            return
    else:
        methods = [m.strip() for m in arguments.methods.split(",")]
        if unknown := set(methods) - set(VARIANTS):
            raise NectarError(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
        if arguments.live >= CACHE_STEP:
            raise NectarError(f"--live {arguments.live}: at most {CACHE_STEP - 1}")
        result = run.decode(
            shape,
            contexts,
            methods,
            live=arguments.live,
            whole=not arguments.attention_only,
            rounds=arguments.rounds,
            log=cli.say,
        )
    if arguments.plot and "rows" in result:
        report.plot(result, arguments.plot)
    print(json.dumps(result) if arguments.json else report.text(result))
    if not all(row["ok"] for row in result.get("checks", ())):
        raise NectarError("some kernels are wrong on this machine: set NECTAR_KERNEL=ops and report the table above")


def _tokens(text: str) -> list[int]:
    """ "1k,8k,1m" -> [1024, 8192, 1048576]."""
    units = {"k": 1 << 10, "m": 1 << 20}
    try:
        counts = [int(float(t.rstrip("km")) * units.get(t[-1:], 1)) for t in text.lower().split(",")]
    except (ValueError, OverflowError):
        counts = []
    if not counts or min(counts) < 1:
        raise NectarError(f"--contexts {text}: numbers such as 8k,128k,1m, with commas between them")
    return counts


if __name__ == "__main__":
    sys.exit(main())
