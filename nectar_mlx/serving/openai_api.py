"""OpenAI's models, chat completions and completions."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

from ..core.types import JsonObject
from .calls import Call
from .errors import ApiError
from .job import Job, TokenLogprob
from .messages import conversation
from .schema import ChatRequest, CompletionRequest, parse
from .service import Reply, Service
from .tools import tools_of
from .web import Json, Request, Stream

DONE = b"data: [DONE]\n\n"
ALIVE = b": the prompt is being read\n\n"


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def failed(error: ApiError) -> bytes:
    return event(error.body)


class OpenAI:
    """Endpoints; each takes a request and returns an answer."""

    def __init__(self, service: Service):
        self._service = service

    async def models(self, request: Request) -> Json:
        return Json({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def model(self, request: Request) -> Json:
        return Json(self._model(self._service.name(request.params["name"])))

    def _model(self, name: str) -> JsonObject:
        return {"id": name, "object": "model", "created": self._service.created, "owned_by": "nectar"}

    async def chat(self, request: Request) -> Json | Stream:
        asked = parse(request.body, ChatRequest)
        job = await self._service.chat_job(
            asked,
            conversation(asked.messages),
            template=asked.chat_template_kwargs.given() if asked.chat_template_kwargs else {},
            schema=asked.response_format.wanted() if asked.response_format else None,
            tools=tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls),
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        )
        return await self._answer(asked, job, _Chat())

    async def completion(self, request: Request) -> Json | Stream:
        asked = parse(request.body, CompletionRequest)
        wanted = None if asked.logprobs is None or asked.logprobs is False else int(asked.logprobs)
        job = await self._service.text_job(asked, asked.prompt, top_logprobs=wanted)
        return await self._answer(asked, job, _Completion())

    async def _answer(self, asked: ChatRequest | CompletionRequest, job: Job, form: "_Form") -> Json | Stream:
        head = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.kind,
            "created": int(time.time()),
            "model": job.name,
        }
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return Stream(self._stream(job, form, head, usage=usage), failed)
        async with self._service.answer(job) as reply:
            whole = await reply.whole()
        logprobs = form.logprobs(whole.logprobs) if job.top_logprobs is not None else None
        choice = {"index": 0, **form.whole(whole.text, whole.thoughts, whole.calls), "logprobs": logprobs}
        choice["finish_reason"] = whole.reason
        counts = whole.prompt_tokens, whole.cached_tokens, whole.answer_tokens
        return Json({**head, "choices": [choice], "usage": _usage(*counts), **whole.extra})

    async def _stream(self, job: Job, form: "_Form", head: JsonObject, *, usage: bool) -> AsyncGenerator[bytes]:
        head = {**head, "object": form.stream_kind}

        def chunk(content: JsonObject, reason: str | None = None, logprobs: Any = None, **extra: Any) -> bytes:
            choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason}
            return event({**head, "choices": [choice], **({"usage": None} if usage else {}), **extra})

        async with AsyncExitStack() as stack:
            reply = await stack.enter_async_context(self._service.answer(job))
            await reply.begin()
            yield chunk(form.begin(), **reply.facts)
            called = 0
            async for piece in reply.pieces():
                if piece is None:
                    yield ALIVE
                    continue
                logprobs = form.logprobs(piece.logprobs) if piece.logprobs else None
                yield chunk(form.piece(piece.text, piece.thoughts, piece.calls, called), logprobs=logprobs)
                called += len(piece.calls)
            assert reply.finished is not None
            yield chunk(form.piece("", ""), reply.finished.reason, **reply.extra())
            if usage:
                yield event({**head, "choices": [], "usage": usage_of(reply)})
            yield DONE


def usage_of(reply: Reply) -> JsonObject:
    assert reply.started is not None and reply.finished is not None
    return _usage(reply.started.prompt_tokens, reply.started.cached_tokens, reply.finished.tokens)


def _usage(prompt: int, cached: int, answer: int) -> JsonObject:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _called(calls: Sequence[Call]) -> list[JsonObject]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


class _Chat:
    """How chat completions write an answer."""

    prefix, kind, stream_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str, thoughts: str, calls: Sequence[Call]) -> JsonObject:
        more = ({"reasoning": thoughts} if thoughts else {}) | ({"tool_calls": _called(calls)} if calls else {})
        return {"message": {"role": "assistant", "content": text or (None if calls else ""), **more}}

    def begin(self) -> JsonObject:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str, thoughts: str, calls: Sequence[Call] = (), before: int = 0) -> JsonObject:
        """before: the number of calls so far."""
        delta: JsonObject = {"content": text} if text else {}
        if thoughts:
            delta["reasoning"] = thoughts
        if calls:
            delta["tool_calls"] = [{"index": before + i, **call} for i, call in enumerate(_called(calls))]
        return {"delta": delta}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        def entry(text: str, logprob: float) -> JsonObject:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {**entry(token.text, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content}


class _Completion:
    """How completions do."""

    prefix, kind, stream_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str, thoughts: str, calls: Sequence[Call]) -> JsonObject:
        return {"text": text}

    def begin(self) -> JsonObject:
        return {"text": ""}

    def piece(self, text: str, thoughts: str, calls: Sequence[Call] = (), before: int = 0) -> JsonObject:
        return {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> JsonObject:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": [],
        }


_Form: TypeAlias = _Chat | _Completion
