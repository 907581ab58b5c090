"""From a request's messages to token ids, in a thread of its own: no prompt, however long, holds up the others."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from ..core.types import JsonObject, Tokenizer
from ..errors import NectarError
from ..mlxlm import prompts
from ..mlxlm.tools import CallFormat, call_format
from .calls import Tools
from .errors import ApiError

T = TypeVar("T")
_SLICE = 8192  # characters that are counted at a time
_SEAM = 8  # tokens that cutting a text in two may add


class Prompting:
    """tokenizer: the model's. window: the positions it supports, None where that is unknown. template: the server's
    own arguments for the chat template."""

    def __init__(self, tokenizer: Tokenizer, window: int | None, template: Mapping[str, Any]):
        self._tokenizer, self._window, self._template = tokenizer, window, dict(template)
        self._thread = ThreadPoolExecutor(1, "prompts")

    async def chat(
        self, messages: Sequence[JsonObject], template: Mapping[str, Any], tools: Tools | None = None
    ) -> list[int]:
        """The tokens of a conversation; ApiError for one that is too long, or that cannot be one."""
        return await self.run(self._chat, messages, template, tools)

    async def text(self, text: str) -> list[int]:
        """The tokens of a text that continues the document."""
        return await self.run(self._text, text)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Something that takes time but does not use MLX."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    @cached_property
    def call_format(self) -> CallFormat:
        """How the model writes calls; to be asked for in `run`."""
        return call_format(self._tokenizer)

    def _chat(self, messages: Sequence[JsonObject], template: Mapping[str, Any], tools: Tools | None) -> list[int]:
        functions = list(tools.functions) if tools else None
        called = [json.dumps(message["tool_calls"]) for message in messages if "tool_calls" in message]
        self._check_length([message["content"] for message in messages] + called + [json.dumps(functions)])
        options = {**self._template, **template, "tools": functions}
        try:
            prompt = prompts.prompt(self._tokenizer, [dict(m) for m in messages], **options)
        except NectarError as error:
            raise ApiError(400, str(error), code="invalid_value", param="messages") from None
        if tools and tools.forced and self.call_format.is_json:
            prompt += prompts.encode(self._tokenizer, f"{self.call_format.start}\n", specials=True)
        return prompt

    def _text(self, text: str) -> list[int]:
        self._check_length([text])
        return prompts.encode(self._tokenizer, text)

    def _check_length(self, texts: Sequence[str]) -> None:
        """Counts tokens until they are certainly too many, so that no more of a text is encoded than the model reads.

        Every message needs a token at least.
        """
        if self._window is None:
            return
        total = 0
        for text in texts:
            total += 1
            for start in range(0, len(text), _SLICE):
                count = len(prompts.encode(self._tokenizer, text[start : start + _SLICE]))
                total += max(0, count - _SEAM)
                if total > self._window:
                    raise ApiError(
                        400,
                        f"the prompt is longer than the model's window of {self._window:,} tokens",
                        code="context_length_exceeded",
                        param="messages",
                    )
