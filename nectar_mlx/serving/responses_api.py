"""OpenAI's /v1/responses, in its basic form: text in, text out, streamed or not; nothing is stored."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from ..core.types import JsonObject
from .errors import ApiError
from .job import Job
from .openai_api import ALIVE, event
from .schema import ResponsesRequest, parse
from .service import Service
from .web import Json, Request, Stream


class Responses:
    def __init__(self, service: Service):
        self._service = service

    async def create(self, request: Request) -> Json | Stream:
        asked = parse(request.body, ResponsesRequest)
        if isinstance(asked.input, str):
            messages = [{"role": "user", "content": asked.input}]
        else:
            messages = [message.plain(f"input[{i}]") for i, message in enumerate(asked.input)]
        if asked.instructions:
            messages.insert(0, {"role": "system", "content": asked.instructions})
        job = await self._service.chat_job(
            asked,
            messages,
            template=asked.chat_template_kwargs.given() if asked.chat_template_kwargs else {},
            schema=asked.text.format.wanted() if asked.text and asked.text.format else None,
            max_tokens=asked.max_output_tokens or asked.max_tokens,
        )
        response = _Response(job, asked)
        if asked.stream:
            return Stream(self._stream(job, response), lambda error: response.failed(error))
        async with self._service.answer(job) as reply:
            whole = await reply.whole()
        counts = whole.prompt_tokens, whole.cached_tokens, whole.answer_tokens
        return Json(response.finished(whole.text, whole.thoughts, whole.reason, *counts) | whole.extra)

    async def _stream(self, job: Job, response: "_Response") -> AsyncGenerator[bytes]:
        async with self._service.answer(job) as reply:
            started = await reply.begin()
            for piece in response.opening():
                yield piece
            texts, thoughts = list[str](), list[str]()
            async for written in reply.pieces():
                if written is None:
                    yield ALIVE
                    continue
                texts.append(written.text)
                thoughts.append(written.thoughts)
                if written.text:
                    yield response.delta(written.text)
            assert reply.finished is not None
            counts = started.prompt_tokens, started.cached_tokens, reply.finished.tokens
            text = "".join(texts)
            whole = response.finished(text, "".join(thoughts), reply.finished.reason, *counts)
            for piece in response.closing(text, whole | reply.extra()):
                yield piece


class _Response:
    """One response: its object, and the events of its stream."""

    def __init__(self, job: Job, asked: ResponsesRequest):
        self._item = f"msg_{secrets.token_hex(12)}"
        self.place: JsonObject = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._number = 0
        self._base: JsonObject = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": job.name,
            "instructions": asked.instructions,
            "max_output_tokens": job.max_tokens,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": False,
        }

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event, numbered."""
        self._number += 1
        return b"event: " + kind.encode() + b"\n" + event({"type": kind, "sequence_number": self._number - 1, **fields})

    def opening(self) -> list[bytes]:
        running = {**self._base, "status": "in_progress", "output": [], "usage": None}
        return [
            self.event("response.created", response=running),
            self.event("response.in_progress", response=running),
            self.event("response.output_item.added", output_index=0, item=self._message("in_progress", None)),
            self.event("response.content_part.added", **self.place, part=_part("")),
        ]

    def delta(self, text: str) -> bytes:
        return self.event("response.output_text.delta", **self.place, delta=text, logprobs=[])

    def closing(self, text: str, whole: JsonObject) -> list[bytes]:
        kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
        return [
            self.event("response.output_text.done", **self.place, text=text, logprobs=[]),
            self.event("response.content_part.done", **self.place, part=_part(text)),
            self.event("response.output_item.done", output_index=0, item=self._message(whole["status"], text)),
            self.event(kind, response=whole),
        ]

    def finished(self, text: str, thoughts: str, reason: str, prompt: int, cached: int, answer: int) -> JsonObject:
        status = "completed" if reason == "stop" else "incomplete"
        details = None if reason == "stop" else {"reason": "max_output_tokens"}
        output = [self._message(status, text)]
        if thoughts:
            item = {"id": f"rs_{self._item[4:]}", "type": "reasoning", "summary": []}
            output.append({**item, "content": [{"type": "reasoning_text", "text": thoughts}]})
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        }
        return {**self._base, "status": status, "incomplete_details": details, "output": output, "usage": usage}

    def failed(self, error: ApiError) -> bytes:
        told = {"code": "server_error", "message": error.message}
        whole = {**self._base, "status": "failed", "error": told, "output": [], "usage": None}
        return self.event("response.failed", response=whole)

    def _message(self, status: str, text: str | None) -> JsonObject:
        content = [] if text is None else [_part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": []}
