"""The part of Ollama's API by which front ends find models and ask: version, tags, show, ps, chat, generate."""

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from .. import __version__
from ..core.types import JsonObject
from .calls import Call, Tools
from .errors import ApiError
from .job import Job
from .messages import conversation
from .schema import Generation, OllamaChat, OllamaGenerate, OllamaRequest, OllamaShow, parse
from .service import Reply, Service
from .tools import tools_of
from .web import Json, Request, Stream

_LINES = "application/x-ndjson"


def error_body(error: ApiError) -> JsonObject:
    """Ollama's clients look for a text."""
    return {"error": error.message}


def _line(value: JsonObject) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Ollama:
    def __init__(self, service: Service):
        self._service = service

    async def version(self, request: Request) -> Json:
        return Json({"version": __version__})

    async def tags(self, request: Request) -> Json:
        return Json({"models": [self._entry(name) for name in self._service.names]})

    async def running(self, request: Request) -> Json:
        return Json({"models": []})

    async def show(self, request: Request) -> Json:
        asked = parse(request.body, OllamaShow)
        entry = self._entry(self._service.name(asked.model or asked.name))
        details = {
            "details": entry["details"],
            "modified_at": entry["modified_at"],
            "capabilities": ["completion", "tools"],
        }
        return Json({"modelfile": "", "parameters": "", "template": "", "license": "", "model_info": {}, **details})

    def _entry(self, name: str) -> JsonObject:
        path = self._service.engine.shelf.files.get(name)  # none for `library`, which is all of them
        try:
            stat = path.stat() if path else None
        except OSError:
            stat = None
        size = stat.st_size if stat else 0
        changed = datetime.fromtimestamp(stat.st_mtime if stat else self._service.created, UTC)
        return {
            "name": name,
            "model": name,
            "modified_at": changed.isoformat().replace("+00:00", "Z"),
            "size": size,
            "digest": hashlib.sha256(f"{name} {size} {changed}".encode()).hexdigest(),
            "details": {
                "parent_model": "",
                "format": "nectar",
                "family": "nectar",
                "families": ["nectar"],
                "parameter_size": "",
                "quantization_level": "",
            },
        }

    async def chat(self, request: Request) -> Json | Stream:
        asked = parse(request.body, OllamaChat)
        if not asked.messages:
            name = self._service.name(asked.model)
            return Json({"model": name, "message": {"role": "assistant", "content": ""}, "done": True} | _loaded())
        job = await self._job(asked, conversation(asked.messages), tools_of(asked.tools, None, None))
        return await self._answer(
            asked, job, lambda text, more: {"message": {"role": "assistant", "content": text, **more}}
        )

    async def generate(self, request: Request) -> Json | Stream:
        asked = parse(request.body, OllamaGenerate)
        for name in ("images", "suffix"):
            if getattr(asked, name):
                raise ApiError(400, f"{name}: not supported", code="unsupported_value", param=name)
        if not asked.prompt:
            return Json({"model": self._service.name(asked.model), "response": "", "done": True} | _loaded())
        if asked.raw:
            job = await self._service.text_job(_generation(asked), asked.prompt)
        else:
            messages = [{"role": "system", "content": asked.system}] if asked.system else []
            job = await self._job(asked, [*messages, {"role": "user", "content": asked.prompt}])
        return await self._answer(asked, job, lambda text, more: {"response": text, **more})

    async def _job(self, asked: OllamaRequest, messages: list[JsonObject], tools: Tools | None = None) -> Job:
        template: dict[str, Any] = {}
        if asked.think is not None:
            template["enable_thinking"] = bool(asked.think)
        if isinstance(asked.think, str):
            template["reasoning_effort"] = asked.think
        schema = {"type": "object"} if asked.format == "json" else asked.format or None
        return await self._service.chat_job(_generation(asked), messages, template=template, schema=schema, tools=tools)

    async def _answer(
        self, asked: OllamaRequest, job: Job, form: Callable[[str, JsonObject], JsonObject]
    ) -> Json | Stream:
        if asked.stream is None or asked.stream:
            return Stream(self._stream(job, form), lambda error: _line(error_body(error)), _LINES)
        start = time.perf_counter_ns()
        async with self._service.answer(job) as reply:
            whole = await reply.whole()
        content = form(whole.text, _more(whole.thoughts, whole.calls))
        return Json({"model": job.name, "created_at": _now(), **content, **_done(reply, start)})

    async def _stream(self, job: Job, form: Callable[[str, JsonObject], JsonObject]) -> AsyncGenerator[bytes]:
        start = time.perf_counter_ns()
        async with self._service.answer(job) as reply:
            await reply.begin()
            async for piece in reply.pieces():
                if piece is not None and (piece.text or piece.thoughts or piece.calls):
                    content = form(piece.text, _more(piece.thoughts, piece.calls))
                    yield _line({"model": job.name, "created_at": _now(), **content, "done": False})
            yield _line({"model": job.name, "created_at": _now(), **form("", {}), **_done(reply, start)})


def _more(thoughts: str, calls: Sequence[Call]) -> JsonObject:
    """What an answer has beside its text."""
    more: JsonObject = {"thinking": thoughts} if thoughts else {}
    if calls:
        called = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
        more["tool_calls"] = [{"function": {"index": i, **function}} for i, function in enumerate(called)]
    return more


def _loaded() -> JsonObject:
    return {"created_at": _now(), "done_reason": "load"}


def _done(reply: Reply, start: int) -> JsonObject:
    """Ollama's figures at the end of an answer; times in nanoseconds."""
    assert reply.started is not None and reply.finished is not None
    total = time.perf_counter_ns() - start
    return {
        "done": True,
        "done_reason": reply.finished.reason.replace("tool_calls", "stop"),
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": reply.started.prompt_tokens,
        "prompt_eval_duration": 0,
        "eval_count": reply.finished.tokens,
        "eval_duration": total,
        **reply.extra(),
    }


def _generation(asked: OllamaRequest) -> Generation:
    """Ollama's options under OpenAI's names."""
    options = asked.options
    if options is None:
        return Generation(model=asked.model)
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "stop")
    given = {name: getattr(options, name) for name in names}
    if options.num_predict is not None and options.num_predict > 0:  # -1 and -2: as many as there is room for
        given["max_tokens"] = min(options.num_predict, 2**31 - 1)
    window = options.repeat_last_n if options.repeat_last_n and options.repeat_last_n > 0 else None
    return Generation(
        model=asked.model, repetition_penalty=options.repeat_penalty, repetition_context_size=window, **given
    )
