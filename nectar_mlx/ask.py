"""`nectar ask book.nectar Who is Filby`: an answer from the file, without reading the text again."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import cli, remote, writing
from .core import terminal
from .errors import NectarError
from .writing import Written

if TYPE_CHECKING:
    from .core.types import JsonObject


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
    remote.add_options(parser)
    cli.add_quiet(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    return parser


def _work(args: argparse.Namespace) -> None:
    question = _question(args.question)
    started = time.perf_counter()
    reply = remote.reply(args, [{"role": "user", "content": question}]) or _Here(args, question)
    if not args.json:
        ended = writing.show(iter(reply))
        writing.say_how_it_ended(ended, args)
        for source in reply.sources() if args.sources else ():
            cli.say(source)
        return
    answer, thoughts, first, ended = "", "", 0.0, None
    for piece in reply:
        first = first or time.perf_counter()
        answer, thoughts, ended = answer + piece.answer, thoughts + piece.thoughts, piece.ended
    said = {"question": question, "answer": answer, **({"thoughts": thoughts} if thoughts else {})}
    facts = reply.facts()
    seconds = round((first or time.perf_counter()) - started - facts["seconds_to_load"], 3)
    print(json.dumps(said | writing.as_json(ended) | facts | {"seconds_to_first_token": seconds}))


class _Here:
    """An answer by the model loaded here. NectarError for a question that has no place in its window."""

    def __init__(self, args: argparse.Namespace, question: str):
        from .mlxlm.window import answer_tokens

        start = time.perf_counter()
        model, tokenizer, self._nectar = cli.load(args.nectar, args.model, fetch=args.fetch)
        cli.check_sources(self._nectar, args)
        self._seconds = time.perf_counter() - start
        self._chunk = cli.chunk_for(self._nectar, tokenizer, question, args)
        if self._chunk is not None:
            self._nectar = self._nectar.chunk(self._chunk)
        self._prompt = self._nectar.prompt(tokenizer, question, enable_thinking=args.think)
        size = answer_tokens(model, start=self._nectar.start, prompt=len(self._prompt), chosen=args.max_tokens)
        self._cache = self._nectar.make_cache(kv_bits=args.kv_bits, exact_fraction=args.exact)
        self._pieces = writing.write(model, tokenizer, self._prompt, self._cache, args, max_tokens=size)

    def __iter__(self) -> Iterator[Written]:
        return self._pieces

    def sources(self) -> list[str]:
        return [source.quoted() for source in self._nectar.sources(self._cache)]

    def facts(self) -> "JsonObject":
        """For `--json`, once the answer has ended."""
        return {
            "model": self._nectar.metadata["model"],
            "context_tokens": len(self._nectar.prefix),
            "chunk": self._chunk,
            "prompt_tokens": len(self._prompt),
            "seconds_to_load": round(self._seconds, 3),
            **self._nectar.hybrid.reading(self._cache),
        }


def _question(words: Sequence[str]) -> str:
    """The words as one question, or what stdin has; NectarError where that is no text."""
    question = terminal.standard_input() if list(words) == ["-"] else terminal.typed(" ".join(words), "the question")
    if not question.strip():
        raise NectarError("the question is empty")
    return question.strip()


if __name__ == "__main__":
    sys.exit(main())
