"""OpenAI's /v1/responses, in its basic form: text and function calls, streamed or not; nothing is stored."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ..core.types import JsonObject
from .calls import Call, Tools
from .errors import ApiError
from .job import Job, Written
from .openai_api import ALIVE, event
from .schema import ResponsesRequest, parse
from .service import Reply, Service
from .tools import tools_of
from .web import Json, Request, Stream


class Responses:
    def __init__(self, service: Service):
        self._service = service

    async def create(self, request: Request) -> Json | Stream:
        asked = parse(request.body, ResponsesRequest)
        job = await self._service.chat_job(
            asked,
            asked.messages(),
            template=asked.chat_template_kwargs.given() if asked.chat_template_kwargs else {},
            schema=asked.text.format.wanted() if asked.text and asked.text.format else None,
            tools=tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls),
            max_tokens=asked.max_output_tokens or asked.max_tokens,
        )
        response = _Response(job, asked)
        if asked.stream:
            return Stream(self._stream(job, response), lambda error: response.failed(error))
        async with self._service.answer(job) as reply:
            async for _ in self._written(reply, response):
                pass
        return Json(response.whole(reply) | reply.extra())

    async def _stream(self, job: Job, response: "_Response") -> AsyncGenerator[bytes]:
        async with self._service.answer(job) as reply:
            async for piece in self._written(reply, response):
                yield piece
            whole = response.whole(reply)
            kind = "response.completed" if whole["status"] == "completed" else "response.incomplete"
            yield response.event(kind, response=whole | reply.extra())

    async def _written(self, reply: Reply, response: "_Response") -> AsyncGenerator[bytes]:
        """The events of an answer, but the last."""
        await reply.begin()
        for piece in response.opening():
            yield piece
        async for written in reply.pieces():
            for piece in response.add(written) if written else [ALIVE]:
                yield piece
        assert reply.finished is not None
        for piece in response.closing(reply.finished.reason):
            yield piece


class _Response:
    """One response: its object, and the events of its stream."""

    def __init__(self, job: Job, asked: ResponsesRequest):
        self._number = 0
        self._output: list[JsonObject] = []  # items that are whole
        self._open: str | None = None  # the id of a message that is being written, and its text
        self._text, self._thoughts = "", ""
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
            "parallel_tool_calls": bool(job.tools and job.tools.parallel),
            "tool_choice": _choice(job.tools),
            "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in _functions(job.tools)],
            "store": False,
        }

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event, numbered."""
        self._number += 1
        return b"event: " + kind.encode() + b"\n" + event({"type": kind, "sequence_number": self._number - 1, **fields})

    def opening(self) -> list[bytes]:
        running = {**self._base, "status": "in_progress", "output": [], "usage": None}
        kinds = "response.created", "response.in_progress"
        return [self.event(kind, response=running) for kind in kinds]

    def add(self, written: Written) -> list[bytes]:
        """What is new of the answer."""
        self._thoughts += written.thoughts
        events = self._begun() if written.text and self._open is None else []
        if written.text:
            self._text += written.text
            events.append(self.event("response.output_text.delta", **self._place(), delta=written.text, logprobs=[]))
        for call in written.calls:
            events += self._ended("completed") + self._called(call)
        return events

    def closing(self, reason: str) -> list[bytes]:
        """Ends the message; an answer without any output has an empty one."""
        begun = self._begun() if self._open is None and not self._output else []
        return begun + self._ended(_status(reason))

    def whole(self, reply: Reply) -> JsonObject:
        """The response, once its answer has ended."""
        assert reply.started is not None and reply.finished is not None
        prompt, answer, status = reply.started.prompt_tokens, reply.finished.tokens, _status(reply.finished.reason)
        output = list(self._output)
        if self._thoughts:
            content = [{"type": "reasoning_text", "text": self._thoughts}]
            output.append({"id": _id("rs"), "type": "reasoning", "summary": [], "content": content})
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": reply.started.cached_tokens},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + answer,
        }
        details = None if status == "completed" else {"reason": "max_output_tokens"}
        return {**self._base, "status": status, "incomplete_details": details, "output": output, "usage": usage}

    def failed(self, error: ApiError) -> bytes:
        told = {"code": "server_error", "message": error.message}
        whole = {**self._base, "status": "failed", "error": told, "output": [], "usage": None}
        return self.event("response.failed", response=whole)

    def _begun(self) -> list[bytes]:
        """Opens a message."""
        self._open = _id("msg")
        item, index = self._message("in_progress", None), len(self._output)
        return [
            self.event("response.output_item.added", output_index=index, item=item),
            self.event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def _ended(self, status: str) -> list[bytes]:
        """Ends the message that is open, if one is."""
        if self._open is None:
            return []
        text, place, item = self._text, self._place(), self._message(status, self._text)
        self._output.append(item)
        self._open, self._text = None, ""
        return [
            self.event("response.output_text.done", **place, text=text, logprobs=[]),
            self.event("response.content_part.done", **place, part=_part(text)),
            self.event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _called(self, call: Call) -> list[bytes]:
        item = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        place, index, arguments = {"item_id": item["id"]}, len(self._output), "response.function_call_arguments"
        whole = {**item, "status": "completed", "arguments": call.arguments}
        self._output.append(whole)
        return [
            self.event(
                "response.output_item.added",
                output_index=index,
                item={**item, "status": "in_progress", "arguments": ""},
            ),
            self.event(f"{arguments}.delta", **place, output_index=index, delta=call.arguments),
            self.event(f"{arguments}.done", **place, output_index=index, name=call.name, arguments=call.arguments),
            self.event("response.output_item.done", output_index=index, item=whole),
        ]

    def _place(self) -> JsonObject:
        return {"item_id": self._open, "output_index": len(self._output), "content_index": 0}

    def _message(self, status: str, text: str | None) -> JsonObject:
        content = [] if text is None else [_part(text)]
        return {"id": self._open, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": []}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"


def _functions(tools: Tools | None) -> Sequence[JsonObject]:
    return tools.functions if tools else ()


def _choice(tools: Tools | None) -> str | JsonObject:
    if tools is None:
        return "none"
    if len(tools.forced) == 1 < len(tools.functions):
        return {"type": "function", "name": tools.forced[0]}
    return "required" if tools.forced else "auto"
