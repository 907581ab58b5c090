"""`nectar ask book.nectar Who is Filby`: an answer from the file, without reading the text again."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import cli, ranks, remote, writing
from .core import terminal
from .errors import NectarError
from .writing import Written

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .core.types import JsonObject, Tokenizer
    from .from_library import Questions
    from .nectar import Nectar
    from .retrieval.sources import Source


class _Parser(cli.Parser):
    """Options may stand between the words of a question."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("ask", "Answers a question from a .nectar.")
    cli.add_nectar(parser, what=cli.ASKED)
    parser.add_argument("question", nargs="+", help="the question, in quotes or not, or - to read it from stdin")
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    cli.add_library(parser)
    remote.add_options(parser)
    cli.add_quiet(parser)
    ranks.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer's text")
    return parser


def _work(args: argparse.Namespace) -> None:
    question = _question(args.question)
    started = time.perf_counter()
    group = ranks.group(args)
    served = None if group else remote.reply(args, [{"role": "user", "content": question}])
    reply = served or _Here(args, question, group)
    if not args.json:
        ended = writing.show(iter(reply), quiet=args.cite)
        if args.cite:
            cli.show_answer(reply.cited())
        writing.say_how_it_ended(ended, args)
        sources = reply.sources() if args.sources or args.cite else []
        if not sources and ended and (args.sources or args.cite):
            cli.say(cli.NO_SOURCE)
        for number, source in enumerate(sources, 1):
            if number <= reply.named:  # what the marks mean belongs to the answer
                cli.show_answer(source)
            elif args.sources or not reply.named:
                cli.say(source)
        return
    answer, thoughts, first, ended = "", "", 0.0, None
    for piece in reply:
        first = first or time.perf_counter()
        answer, thoughts, ended = answer + piece.answer, thoughts + piece.thoughts, piece.ended
    said = {"question": question, "answer": answer or None, **({"thoughts": thoughts} if thoughts else {})}
    facts = reply.facts()
    seconds = round((first or time.perf_counter()) - started - facts["seconds_to_load"], 3)
    print(json.dumps(said | writing.as_json(ended) | facts | {"seconds_to_first_token": seconds}))


class _Here:
    """An answer by the model loaded here. NectarError for a question that has no place in its window."""

    def __init__(self, args: argparse.Namespace, question: str, group: "mx.distributed.Group | None" = None):
        """group: of ranks among which the model is divided."""
        self._args, self._question, self._answer = args, question, ""
        self._none = ""  # said where no document of the library answers
        start = time.perf_counter()
        self._library = _library(args)
        if self._library and group:
            raise NectarError("--shard takes a .nectar, not a library")
        found = self._library.find(question) if self._library else cli.load(args.nectar, args, group=group)
        self._seconds = time.perf_counter() - start
        self._sources: list[Source] | None = None
        self.named = 0  # of the sources, by the marks in the answer
        if found is None:
            self._none = self._library.none() if self._library else ""
        else:
            self._begin(*found)

    def _begin(self, model: "nn.Module", tokenizer: "Tokenizer", nectar: "Nectar") -> None:
        from .mlxlm.window import answer_tokens

        args = self._args
        self._tokenizer, self._whole, self._nectar = tokenizer, nectar, nectar
        self._chunk = cli.chunk_for(nectar, model, tokenizer, self._question, args)
        if self._chunk is not None:
            self._nectar = nectar.chunk(self._chunk)
        self._prompt = self._nectar.prompt(tokenizer, self._question, enable_thinking=args.think)
        size = answer_tokens(model, start=self._nectar.start, prompt=len(self._prompt), chosen=args.max_tokens)
        self._cache = self._nectar.make_cache(kv_bits=args.kv_bits, exact_fraction=args.exact)
        self._pieces = writing.write(model, tokenizer, self._nectar, self._prompt, self._cache, args, max_tokens=size)

    def __iter__(self) -> Iterator[Written]:
        if self._none:
            if not self._args.json:
                yield Written(self._none)
            return
        if self._args.cite and not self._args.json:  # a long answer would else look like a program that hangs
            cli.say("writing the answer: with --cite it is shown whole")
        for piece in self._pieces:
            self._answer += piece.answer
            yield piece

    def sources(self) -> list[str]:
        return [] if self._none else cli.source_lines(self._found())

    def cited(self) -> str:
        """The answer with a mark behind each sentence, once it has ended."""
        if self._none:
            return self._none
        cited = self._whole.cite(self._tokenizer, self._question, self._answer, self._found())
        self._sources, self.named = cited.sources, cited.named
        return cited.text

    def _found(self) -> "list[Source]":
        if self._sources is None:
            self._sources = [] if self._none else self._whole.sources(
                self._tokenizer, self._question, self._answer, caches=self._cache, chunk=self._chunk
            )  # fmt: skip
        return self._sources

    def facts(self) -> "JsonObject":
        """For `--json`, once the answer has ended."""
        from .retrieval.sources import sources_as_json

        library = self._library.facts() if self._library else {}
        if self._none:
            return {"seconds_to_load": round(self._seconds, 3), **library}
        cited = {"cited": self.cited()} if self._args.cite else {}
        return {
            "model": self._nectar.metadata["model"],
            "context_tokens": len(self._nectar.prefix),
            "chunk": self._chunk,
            "prompt_tokens": len(self._prompt),
            "seconds_to_load": round(self._seconds, 3),
            **self._nectar.hybrid.reading(self._cache),
            "sources": sources_as_json(self._found()),
            **cited,
            **library,
        }


def _library(args: argparse.Namespace) -> "Questions | None":
    """The library, if it is asked; its module is imported only then."""
    if args.nectar != cli.LIBRARY and args.library is None:
        return None
    from .from_library import Questions

    return Questions.open(args)


def _question(words: Sequence[str]) -> str:
    """The words as one question, or what stdin has; NectarError where that is no text."""
    question = terminal.standard_input() if list(words) == ["-"] else terminal.typed(" ".join(words), "the question")
    if not question.strip():
        raise NectarError("the question is empty")
    return question.strip()


if __name__ == "__main__":
    sys.exit(main())
