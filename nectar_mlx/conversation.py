"""A conversation with a .nectar by the model here: what was read of it stays in caches."""

import argparse
from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import cli, writing
from .core.types import LayerCache, Tokenizer
from .from_library import Questions
from .mlxlm.cache import NectarCache
from .mlxlm.prompts import Message
from .mlxlm.window import answer_tokens
from .nectar import Nectar
from .writing import Ended, Written


class LocalConversation:
    """The turns so far and the caches with their keys and values. A new prompt is read from where the caches end.

    If the text was read in chunks, a question is answered from the chunk nearest to it, or else from the chunk of the
    question before. With a library it is answered from the document that it is about, or else from the one before.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        nectar: Nectar,
        args: argparse.Namespace,
        library: Questions | None = None,
    ):
        self._model, self._tokenizer, self._nectar, self.args = model, tokenizer, nectar, args
        self._library = library
        self._whole = nectar
        self._chunk: int | None = None
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.cache = self._new_cache()
        self._read: list[int] = []  # the tokens in the caches

    def _new_cache(self) -> list[LayerCache]:
        return self._nectar.make_cache(kv_bits=self.args.kv_bits, exact_fraction=self.args.exact)

    def answer(self, question: str) -> Iterator[Written]:
        """The answer of the next turn as it is written; the turn is added when it is complete or interrupted."""
        if self._library is not None and not self._turn_to(self._library, question):
            yield Written(self._library.none())
            return
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
            for piece in writing.write(
                self._model, self._tokenizer, self._nectar, rest, self.cache, self.args, max_tokens=max_tokens
            ):
                self._read += piece.tokens
                pieces.append(piece.text)
                yield piece
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
        chunk = cli.chunk_for(self._whole, self._model, self._tokenizer, question, self.args, before=self._chunk)
        if chunk is not None and chunk != self._chunk:
            self._chunk, self._nectar = chunk, self._whole.chunk(chunk)
            self.cache, self._read = self._new_cache(), []

    def _turn_to(self, library: Questions, question: str) -> bool:
        """Goes on with the document of the library that a question is about; where none is told, with the one before.
        Whether there is one.
        """
        found = library.find(question)
        if found is None:
            if self.messages and library.document is not None:
                cli.say(f"the question names no document: still from {library.document.name}")
            return bool(self.messages)
        if found[2] is not self._whole:
            self._model, self._tokenizer, self._nectar = found
            self._whole, self._chunk = self._nectar, None
            self.cache, self._read = self._new_cache(), []
        return True

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

    def sources(self) -> list[str]:
        """The passages that say what the last answer says, a line each."""
        if not self.messages:
            return []
        question, answer = (message["content"] for message in self.messages[-2:])
        found = self._whole.sources(self._tokenizer, question, answer, caches=self.cache, chunk=self._chunk)
        return cli.source_lines(found)

    def describe(self) -> str:
        """One line about the text and the file."""
        whole = self._whole
        source, model = whole.metadata.get("source") or "a text", whole.metadata["model"]
        chunks = f" in {len(whole.chunks)} chunks" if whole.chunks else ""
        verdict = whole.verdict or "How close it is to the text has not been measured."
        return f"{source}: {len(whole.prefix):,} tokens{chunks}, read by {model}. {verdict}"

    def figures(self, ended: Ended) -> str:
        """One line about the last answer."""
        live, peak = self.nbytes / 1e6, mx.get_peak_memory() / 1e9
        speed = f"{ended.tokens} tokens, {ended.tokens_per_second:.1f} tokens/s"
        return f"[{speed}, conversation {live:.1f} MB, peak {peak:.2f} GB]"
