"""`nectar chat book.nectar`: a conversation with a .nectar, at a terminal or over a pipe."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import cli
from .core import terminal
from .core.files import write_atomically
from .core.types import LayerCache, Tokenizer
from .errors import NectarError
from .mlxlm.cache import NectarCache
from .mlxlm.prompts import Message
from .mlxlm.window import answer_tokens
from .nectar import Nectar
from .retrieval.sources import Source

_COMMANDS = {
    "/help": "shows this",
    "/sources": "shows the passages that the last answer used most",
    "/doc": "says what the text is and how close the file is to it",
    "/history": "shows the conversation",
    "/save": "FILE writes the conversation as Markdown",
    "/reset": "clears the conversation; the text is kept",
    "/quit": "ends, as Ctrl-D does",
}


class Conversation:
    """The turns so far and the caches with their keys and values. A new prompt is read from where the caches end.

    If the text was read in chunks, a question is answered from the chunk nearest to it, or else from the chunk of the
    question before.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, nectar: Nectar, args: argparse.Namespace):
        self._model, self._tokenizer, self._nectar, self.args = model, tokenizer, nectar, args
        self._whole = nectar
        self._chunk: int | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.cache = self._new_cache()
        self._read: list[int] = []  # the tokens in the caches

    def _new_cache(self) -> list[LayerCache]:
        return self._nectar.make_cache(kv_bits=self.args.kv_bits, exact_fraction=self.args.exact)

    def answer(self, question: str) -> Iterator[GenerationResponse]:
        """Yields mlx-lm's responses for the next turn, and adds the turn when it is complete or interrupted."""
        self._select_chunk(question)
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt = self._nectar.prompt(self._tokenizer, messages, enable_thinking=self.args.think)
        max_tokens = answer_tokens(
            self._model, start=self._nectar.start, prompt=len(prompt), chosen=self.args.max_tokens
        )
        pieces = [self._thinking_start(prompt)]
        rest = prompt[self._resume(prompt) :]
        self._read = list(prompt)
        self._nectar.hybrid.forget(self.cache)
        try:
            for response in cli.generate(
                self._model, self._tokenizer, rest, self.cache, self.args, max_tokens=max_tokens
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
        chunk = cli.chunk_for(self._whole, self._tokenizer, question, self.args)
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

    def sources(self) -> list[Source]:
        """The passages that the last answer used most; none without exact keys."""
        return self._nectar.sources(self.cache) if self._nectar.keys is not None and self.messages else []

    def describe(self) -> str:
        """One line about the text and the file."""
        whole = self._whole
        source, model = whole.metadata.get("source") or "a text", whole.metadata["model"]
        chunks = f" in {len(whole.chunks)} chunks" if whole.chunks else ""
        verdict = whole.verdict or "How close it is to the text has not been measured."
        return f"{source}: {len(whole.prefix):,} tokens{chunks}, read by {model}. {verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("chat", f"A conversation with a .nectar. In it: {', '.join(_COMMANDS)}.")
    cli.add_nectar(parser)
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser)
    cli.add_chunks(parser)
    cli.add_quiet(parser)
    return parser


def _work(args: argparse.Namespace) -> None:
    model, tokenizer, nectar = cli.load(args.nectar, args.model)
    cli.check_sources(nectar, args)
    conversation = Conversation(model, tokenizer, nectar, args)
    at_terminal = terminal.at_terminal()
    if at_terminal:
        cli.say(
            f"{len(nectar.prefix):,} tokens are read. Enter asks, Alt-Enter starts a new line, /help shows the rest."
        )
    for text in _typed(at_terminal):
        try:
            name, argument = _command(text)
            if name == "/quit":
                break
            elif name:
                _obey(name, argument, conversation)
            else:
                _turn(conversation, text, at_terminal)
                if args.sources:
                    _show_sources(conversation)
        except NectarError as error:
            cli.say(str(error))


def _typed(at_terminal: bool) -> Iterator[str]:
    """What is typed, without blanks around it: at a terminal a text of several lines, else each line."""
    if at_terminal:
        from .editor import Editor

        editor = Editor(_COMMANDS)
        read = editor.question
    else:
        read = _line
    while (text := read()) is not None:
        if text.strip():
            yield text.strip()


def _line() -> str | None:
    return terminal.standard_input(line=True) or None


def _command(text: str) -> tuple[str, str]:
    """The command that a text is, and its argument; ("", "") for a question, which may begin with a path.

    NectarError for a single word that looks like a command and is none.
    """
    name, _, argument = text.partition(" ")
    name = {"/exit": "/quit", "/?": "/help"}.get(name, name)
    if name == "/save" or (name in _COMMANDS and not argument):
        return name, argument.strip()
    if re.fullmatch(r"/[a-z]+", text):
        raise NectarError(f"there is no {text}: /help shows the commands; put a blank in front to ask about it")
    return "", ""


def _obey(name: str, argument: str, conversation: Conversation) -> None:
    if name == "/help":
        for command, what in _COMMANDS.items():
            cli.say(f"  {command:<10}{what}")
    elif name == "/reset":
        conversation.reset()
        cli.say("the conversation is cleared, the text is kept")
    elif name == "/history":
        for message in conversation.messages:
            cli.show(f"{message['role']}: {message['content']}")
    elif name == "/sources":
        _show_sources(conversation)
    elif name == "/doc":
        cli.say(conversation.describe())
    elif name == "/save":
        _save(argument, conversation)


def _show_sources(conversation: Conversation) -> None:
    sources = conversation.sources()
    for source in sources:
        cli.say(source.quoted())
    if not sources:
        cli.say("no passages are known: they take an answer, and a file of --kind hybrid")


def _save(name: str, conversation: Conversation) -> None:
    """Writes the conversation as Markdown. NectarError where there is a file already, or none can be written."""
    path = Path(name).expanduser()
    if not name:
        raise NectarError("/save takes the name of a file: /save notes.md")
    if path.exists():
        raise NectarError(f"{path} exists: take another name")
    titles = {"user": "## ", "assistant": ""}
    text = "\n\n".join(titles.get(m["role"], "") + m["content"] for m in conversation.messages)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    cli.say(f"{path}: {len(conversation.messages) // 2} questions with their answers")


def _turn(conversation: Conversation, question: str, at_terminal: bool) -> None:
    """Streams one answer to stdout, then its figures to stderr. At a terminal Ctrl-C ends only the answer."""
    last = None
    try:
        for last in conversation.answer(question):
            cli.show(last.text, end="")
    except KeyboardInterrupt:
        if not at_terminal:
            raise
    print(flush=True)
    if last is not None:
        cli.say_how_it_ended(last.finish_reason, last.generation_tokens, conversation.args)
        live, peak = conversation.nbytes / 2**20, mx.get_peak_memory() / 2**30
        speed = f"{last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s"
        cli.say(f"[{speed}, conversation {live:.1f} MiB, peak {peak:.2f} GiB]")


if __name__ == "__main__":
    sys.exit(main())
