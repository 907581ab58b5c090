"""`nectar ask book.nectar Who is Filby`: an answer from the file, without reading the text again."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import cli
from .core import terminal
from .core.types import JsonObject
from .errors import NectarError

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


class _Parser(cli.Parser):
    """Options may stand between the words of a question."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("ask", "Answers a question from a .nectar.")
    cli.add_nectar(parser)
    parser.add_argument("question", nargs="+", help="the question, in quotes or not, or - to read it from stdin")
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    cli.add_quiet(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    return parser


def _work(args: argparse.Namespace) -> None:
    question = _question(args.question)
    from .mlxlm.window import answer_tokens

    start = time.perf_counter()
    model, tokenizer, nectar = cli.load(args.nectar, args.model)
    cli.check_sources(nectar, args)
    loaded = time.perf_counter()
    chunk = cli.chunk_for(nectar, tokenizer, question, args)
    if chunk is not None:
        nectar = nectar.chunk(chunk)
    prompt = nectar.prompt(tokenizer, question, enable_thinking=args.think)
    max_tokens = answer_tokens(model, start=nectar.start, prompt=len(prompt), chosen=args.max_tokens)
    pieces, last, first = [], None, 0.0
    cache = nectar.make_cache(kv_bits=args.kv_bits, exact_fraction=args.exact)
    for last in cli.generate(model, tokenizer, prompt, cache, args, max_tokens=max_tokens):
        first = first or time.perf_counter()
        pieces.append(last.text)
        if not args.json:
            cli.show(last.text, end="")
    if args.json:
        facts = {
            "question": question,
            "answer": "".join(pieces),
            "model": nectar.metadata["model"],
            "context_tokens": len(nectar.prefix),
            "chunk": chunk,
            "prompt_tokens": len(prompt),
            "seconds_to_load": round(loaded - start, 3),
            "seconds_to_first_token": round(first - loaded, 3),
        }
        print(json.dumps(facts | _figures(last) | nectar.hybrid.reading(cache)))
        return
    print()
    if last is not None:
        cli.say_how_it_ended(last.finish_reason, last.generation_tokens, args)
    for source in nectar.sources(cache) if args.sources else ():
        cli.say(source.quoted())


def _question(words: Sequence[str]) -> str:
    """The words as one question, or what stdin has; NectarError where that is no text."""
    question = terminal.standard_input() if list(words) == ["-"] else terminal.typed(" ".join(words), "the question")
    if not question.strip():
        raise NectarError("the question is empty")
    return question.strip()


def _figures(last: "GenerationResponse | None") -> JsonObject:
    """What mlx-lm measured."""
    return {
        "finish_reason": last.finish_reason if last else None,
        "answer_tokens": last.generation_tokens if last else 0,
        "tokens_per_second": round(last.generation_tps, 2) if last else 0.0,
        "peak_memory_bytes": round(last.peak_memory * 1e9) if last else 0,
    }


if __name__ == "__main__":
    sys.exit(main())
