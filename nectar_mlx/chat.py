"""`nectar chat book.nectar`: a conversation with a .nectar, at a terminal or over a pipe."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import cli
from .core.types import LayerCache, Tokenizer
from .errors import NectarError
from .mlxlm.cache import NectarCache
from .mlxlm.prompts import Message
from .mlxlm.window import answer_tokens
from .nectar import Nectar

_COMMANDS = "/reset clears the conversation, /history shows it, /quit ends"


class Conversation:
    """The turns so far and the caches with their keys and values. A new prompt is read from where the caches end.

    If the text was read in chunks, a question is answered from the chunk nearest to it, or else from the chunk of the
    question before.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, nectar: Nectar, args: argparse.Namespace):
        self._model, self._tokenizer, self._nectar, self._args = model, tokenizer, nectar, args
        self._whole = nectar
        self._chunk: int | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.cache = self._new_cache()
        self._read: list[int] = []  # the tokens in the caches

    def _new_cache(self) -> list[LayerCache]:
        return self._nectar.make_cache(kv_bits=self._args.kv_bits, exact_fraction=self._args.exact)

    def answer(self, question: str) -> Iterator[GenerationResponse]:
        """Yields mlx-lm's responses for the next turn, and adds the turn when it is complete or interrupted."""
        self._select_chunk(question)
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt = self._nectar.prompt(self._tokenizer, messages, enable_thinking=self._args.think)
        max_tokens = answer_tokens(
            self._model, start=self._nectar.start, prompt=len(prompt), chosen=self._args.max_tokens
        )
        pieces = [self._thinking_start(prompt)]
        rest = prompt[self._resume(prompt) :]
        self._read = list(prompt)
        self._nectar.hybrid.forget(self.cache)
        try:
            for response in cli.generate(
                self._model, self._tokenizer, rest, self.cache, self._args, max_tokens=max_tokens
            ):
                self._read.append(response.token)
                pieces.append(response.text)
                yield response
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _thinking_start(self, prompt: Sequence[int]) -> str:
        """The start tag of the answer's thoughts, if it is in the prompt: templates look for it in earlier answers."""
        tokenizer = cast("TokenizerWrapper", self._tokenizer)
        if not tokenizer.has_thinking or tokenizer.rfind_think_start(prompt) <= tokenizer.rfind_think_end(prompt):
            return ""
        return f"{tokenizer.think_start}\n"

    def _select_chunk(self, question: str) -> None:
        """If the question is about another chunk, continues behind that one: the conversation is read again."""
        chunk = cli.chunk_for(self._whole, self._tokenizer, question, self._args)
        if chunk is not None and chunk != self._chunk:
            self._chunk, self._nectar = chunk, self._whole.chunk(chunk)
            self.cache, self._read = self._new_cache(), []

    def _resume(self, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt are in the caches, after trimming the rest; at least one is left to read."""
        held = cast("NectarCache", self.cache[self._nectar.geometry.fitted[0]]).size() if self._read else 0
        limit = min(held, len(prompt) - 1, len(self._read))
        common = next((i for i in range(limit) if prompt[i] != self._read[i]), limit)
        if held > common:
            if not can_trim_prompt_cache(self.cache):
                self.cache = self._new_cache()
                return 0
            trim_prompt_cache(self.cache, held - common)
        return common

    @property
    def nbytes(self) -> int:
        return sum(cast("NectarCache", cache).nbytes for cache in self.cache)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("chat", f"A conversation with a .nectar. {_COMMANDS}.")
    cli.add_nectar(parser)
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    return parser


def _work(args: argparse.Namespace) -> None:
    model, tokenizer, nectar = cli.load(args.nectar, args.model, fetch=args.fetch)
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
            cli.say("the conversation is cleared, the text is kept")
        elif command == "/history":
            for message in conversation.messages:
                cli.show(f"{message['role']}: {message['content']}")
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
    """Streams one answer to stdout, then its figures to stderr. At a terminal Ctrl-C ends only the answer."""
    last = None
    try:
        for last in conversation.answer(question):
            cli.show(last.text, end="")
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
