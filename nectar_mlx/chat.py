"""`nectar chat book.nectar`: a conversation about what a .nectar holds, at a terminal or over a pipe."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from . import cli
from .errors import NectarError
from .mlxlm.prompts import Message
from .mlxlm.window import answer_tokens
from .nectar import Nectar

_COMMANDS = "/reset forgets the conversation, /history shows it, /quit ends"


class Conversation:
    """The turns so far and the caches that hold them. Of a new prompt only what the caches do not hold is read.

    Of a text that was read in parts, a question is answered from the part nearest to it; one that tells none, from the
    part before.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, nectar: Nectar, args: argparse.Namespace):
        self._model, self._tokenizer, self._nectar, self._args = model, tokenizer, nectar, args
        self._whole = nectar
        self._part: int | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.cache = self._fresh()
        self._read: list[int] = []

    def _fresh(self) -> list[Any]:
        return self._nectar.make_cache(kv_bits=self._args.kv_bits, exact_fraction=self._args.exact)

    def answer(self, question: str) -> Any:
        """Yields mlx-lm's responses for the next turn, and keeps the turn once it is complete (or was interrupted)."""
        self._turn_to(question)
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt = self._nectar.prompt(self._tokenizer, messages, enable_thinking=self._args.think)
        max_tokens = answer_tokens(
            self._model, start=self._nectar.start, prompt=len(prompt), chosen=self._args.max_tokens
        )
        pieces = [self._thoughts(prompt)]
        rest = prompt[self._resume(prompt) :]
        self._read = list(prompt)
        self._nectar.hybrid.forget(self.cache)
        try:
            options = {"max_tokens": max_tokens}
            for response in cli.generate(self._model, self._tokenizer, rest, self.cache, self._args, **options):
                self._read.append(response.token)
                pieces.append(response.text)
                yield response
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _thoughts(self, prompt: Sequence[int]) -> str:
        """What opens the thoughts of an answer whose template has done so: the next prompt's looks for it."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or tokenizer.rfind_think_start(prompt) <= tokenizer.rfind_think_end(prompt):
            return ""
        return f"{tokenizer.think_start}\n"

    def _turn_to(self, question: str) -> None:
        """Where the question is about another part, the conversation goes on behind that one, and is read again."""
        part = cli.chunk_for(self._whole, self._tokenizer, question, self._args)
        if part is not None and part != self._part:
            self._part, self._nectar = part, self._whole.chunk(part)
            self.cache, self._read = self._fresh(), []

    def _resume(self, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt the caches hold, once what differs is trimmed; one at least is left."""
        held = self.cache[self._nectar.geometry.fitted[0]].size() if self._read else 0
        limit = min(held, len(prompt) - 1, len(self._read))
        common = next((i for i in range(limit) if prompt[i] != self._read[i]), limit)
        if held > common:
            if not can_trim_prompt_cache(self.cache):
                self.cache = self._fresh()
                return 0
            trim_prompt_cache(self.cache, held - common)
        return common

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.cache)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("chat", f"Talks about what a .nectar holds. {_COMMANDS}.")
    cli.add_nectar(parser)
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    return parser


def _work(args: argparse.Namespace) -> None:
    model, tokenizer, nectar = cli.load(args.nectar, args.model)
    cli.check_sources(nectar, args)
    conversation = Conversation(model, tokenizer, nectar, args)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  (line editing and history)

        cli.say(f"{len(nectar.prefix):,} tokens are read. {_COMMANDS}.")
    while (line := _next_line(at_terminal)) is not None:
        command = line.strip()
        if command in ("/quit", "/exit"):
            break
        elif command == "/reset":
            conversation.reset()
            cli.say("the conversation is forgotten, the text is not")
        elif command == "/history":
            for message in conversation.messages:
                print(f"{message['role']}: {message['content']}", flush=True)
        elif command.startswith("/"):
            cli.say(f"there is no {command.split()[0]}: {_COMMANDS}")
        elif command:
            _turn(conversation, command, at_terminal)
            for source in nectar.sources(conversation.cache) if args.sources else ():
                cli.say(source.quoted())


def _next_line(at_terminal: bool) -> str | None:
    if not at_terminal:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _turn(conversation: Conversation, question: str, at_terminal: bool) -> None:
    """Streams one answer to stdout, then its figures to stderr. At a terminal Ctrl-C ends the answer, not the chat."""
    last = None
    try:
        for last in conversation.answer(question):
            print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        if not at_terminal:
            raise
    except NectarError as error:
        cli.say(str(error))
    print(flush=True)
    if last is not None:
        live, peak = conversation.nbytes / 2**20, mx.get_peak_memory() / 2**30
        speed = f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s"
        cli.say(f"[{speed}, conversation {live:.1f} MiB, peak {peak:.2f} GiB]")


if __name__ == "__main__":
    sys.exit(main())
