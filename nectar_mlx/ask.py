"""`nectar ask book.nectar "Who is Filby?"`: an answer from the file, without reading the text again."""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from . import cli
from .errors import NectarError
from .mlxlm.window import answer_tokens


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("ask", "Answers a question from a .nectar.")
    cli.add_nectar(parser)
    parser.add_argument("question", help="the question, or - to read it from stdin")
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    return parser


def _work(args: argparse.Namespace) -> None:
    question = sys.stdin.read() if args.question == "-" else args.question
    if not question.strip():
        raise NectarError("the question is empty")
    start = time.perf_counter()
    model, tokenizer, nectar = cli.load(args.nectar, args.model, fetch=args.fetch)
    cli.check_sources(nectar, args)
    loaded = time.perf_counter()
    chunk = cli.chunk_for(nectar, tokenizer, question, args)
    if chunk is not None:
        nectar = nectar.chunk(chunk)
    prompt = nectar.prompt(tokenizer, question.strip(), enable_thinking=args.think)
    max_tokens = answer_tokens(model, start=nectar.start, prompt=len(prompt), chosen=args.max_tokens)
    pieces, last, first = [], None, 0.0
    cache = nectar.make_cache(kv_bits=args.kv_bits, exact_fraction=args.exact)
    for last in cli.generate(model, tokenizer, prompt, cache, args, max_tokens=max_tokens):
        first = first or time.perf_counter()
        pieces.append(last.text)
        if not args.json:
            cli.show(last.text, end="")
    if args.json:
        answer = {
            "question": question.strip(),
            "answer": "".join(pieces),
            "finish_reason": last.finish_reason if last else None,
            "model": nectar.metadata["model"],
            "context_tokens": len(nectar.prefix),
            "chunk": chunk,
            "prompt_tokens": len(prompt),
            "answer_tokens": last.generation_tokens if last else 0,
            "seconds_to_load": round(loaded - start, 3),
            "seconds_to_first_token": round(first - loaded, 3),
            "tokens_per_second": round(last.generation_tps, 2) if last else 0.0,
            "peak_memory_bytes": round(last.peak_memory * 1e9) if last else 0,
        }
        print(json.dumps(answer | nectar.hybrid.reading(cache)))
    else:
        cli.show()
        if args.sources:
            for source in nectar.sources(cache):
                cli.say(source.quoted())


if __name__ == "__main__":
    sys.exit(main())
