"""What the endpoints share: names of files, a server's defaults, and an answer as a stream of events."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.types import JsonObject
from ..mlxlm.window import window
from .calls import Call, CallSplitter, Tools
from .constraint import Constraints
from .engine import Engine
from .errors import as_api_error, refused
from .job import Event, Failed, Finished, Job, Started, Ticket, TokenLogprob, Written
from .library import LIBRARY, ServedLibrary, Target
from .prompting import Prompting
from .schema import Generation
from .shelf import UnknownModel, listed

_SILENCE = 10.0  # seconds after which a stream shows that it is alive


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Of a request. sampling: fields of `Sampling`. max_tokens: the longest answer, cut to the room there is. template:
    arguments of the chat template."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 512
    template: Mapping[str, Any] = field(default_factory=dict)


class Whole(NamedTuple):
    """A finished answer. extra: `chunk`, and what was read of the text."""

    text: str
    thoughts: str
    calls: Sequence[Call]
    reason: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    logprobs: Sequence[TokenLogprob]
    extra: JsonObject


class Reply:
    """The events of one answer, as they come; raises ApiError."""

    def __init__(self, events: "asyncio.Queue[Event]", facts: JsonObject, calls: CallSplitter | None = None):
        self._events, self.facts, self._calls = events, facts, calls
        self.started: Started | None = None
        self.finished: Finished | None = None

    async def begin(self) -> Started:
        """Waits until the prompt is being read: errors in the request are known by then."""
        event = await self._next()
        assert isinstance(event, Started)
        self.started = event
        return event

    async def pieces(self) -> AsyncIterator[Written | None]:
        """What is written, after `begin`. None where nothing has come for a while."""
        while self.finished is None:
            try:
                async with asyncio.timeout(_SILENCE):
                    event = await self._next()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Written):
                if any(event := self._with_calls(event)):
                    yield event
            elif isinstance(event, Finished):
                if self._calls and any(rest := self._calls.finish()):
                    yield Written(rest[0], "", [], rest[1])
                self.finished = event._replace(reason=self._calls.reason(event.reason)) if self._calls else event

    def _with_calls(self, written: Written) -> Written:
        if self._calls is None:
            return written
        text, calls = self._calls.feed(written.text)
        return written._replace(text=text, calls=calls)

    async def whole(self) -> Whole:
        """All of it."""
        started = await self.begin()
        texts, thoughts, calls, logprobs = list[str](), list[str](), list[Call](), list[TokenLogprob]()
        async for piece in self.pieces():
            if piece is not None:
                texts.append(piece.text)
                thoughts.append(piece.thoughts)
                calls += piece.calls
                logprobs += piece.logprobs
        assert self.finished is not None
        return Whole(
            "".join(texts),
            "".join(thoughts),
            calls,
            self.finished.reason,
            started.prompt_tokens,
            started.cached_tokens,
            self.finished.tokens,
            logprobs,
            self.extra(),
        )

    def extra(self) -> JsonObject:
        """What an answer has beside OpenAI's fields, once it is finished."""
        chunk = {} if self.started is None or self.started.chunk is None else {"chunk": self.started.chunk}
        return self.facts | chunk | (self.finished.reading if self.finished else {})

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Failed):
            raise as_api_error(event.error)
        return event


class Service:
    """An engine, and what turns requests into its jobs. library: finds the document that answers a question."""

    def __init__(self, engine: Engine, defaults: Defaults, library: ServedLibrary | None = None):
        self.engine, self.defaults, self.library = engine, defaults, library
        shelf = engine.shelf
        self.prompting = Prompting(shelf.tokenizer, window(shelf.model), defaults.template)
        self.constraints = Constraints(shelf.tokenizer)
        self.created = int(time.time())
        self.vocabulary = len(shelf.tokenizer.get_vocab())

    @property
    def names(self) -> list[str]:
        return [*([LIBRARY] if self.library else []), *self.engine.shelf.files]

    def name(self, model: str | None) -> str:
        """The model that a request names; the first one where it names none. UnknownModel if there is none."""
        names = self.names
        if not model or (model == "default_model" and model not in names):
            return names[0]
        for name in (model, model.removesuffix(":latest")):
            if name in names:
                return name
        raise UnknownModel(f"there is no model {model[:100]!r}; there are: {listed(names)}")

    async def _target(self, model: str | None, questions: Sequence[str]) -> Target:
        """Where to answer from. questions: the user's, the last one first."""
        if self.library is None:
            return Target(self.name(model))
        if model and model not in self.names:  # it may be new
            await self.library.about(model.removesuffix(":latest"))
        if (name := self.name(model)) == LIBRARY:
            return await self.library.find(questions)
        return Target(name, about=await self.library.about(name))

    async def chat_job(
        self,
        request: Generation,
        messages: Sequence[JsonObject],
        *,
        template: Mapping[str, Any],
        schema: JsonObject | None = None,
        tools: Tools | None = None,
        **fields: Any,
    ) -> Job:
        """A job of a conversation. schema: of the answer, None for text. fields: of `Job`, over the request's."""
        if tools and schema is not None:
            raise refused("response_format", "not beside tools, unless tool_choice is none")
        asked = [message["content"] for message in reversed(messages) if message["role"] == "user"]
        target = await self._target(request.model, asked)
        questions = [] if request.whole else asked
        job = self._fields(request) | {"questions": questions, "tools": tools} | fields
        for param, form in (("response_format", schema), ("tools", tools.schema if tools else None)):
            if form is not None:
                job["constraint"] = await self.prompting.run(self.constraints.of, form, param)
                job["thinks"], template = False, {**template, "enable_thinking": False}  # no room for thoughts
        if tools and tools.forced:
            job["stops"] = []  # a call ends by itself
        prompt = await self.prompting.chat(messages, template, tools)
        return Job(prompt=prompt, **vars(target), **job)

    async def text_job(self, request: Generation, prompt: str, **fields: Any) -> Job:
        """A job of a text that continues the document."""
        job = self._fields(request) | {"thinks": False} | fields
        target, questions = await self._target(request.model, [prompt]), [] if request.whole else [prompt]
        return Job(prompt=await self.prompting.text(prompt), questions=questions, **vars(target), **job)

    def _fields(self, request: Generation) -> dict[str, Any]:
        request.check()
        sampling = request.sampling(self.defaults.sampling)
        sampling.check_vocabulary(self.vocabulary)
        return {
            "sampling": sampling,
            "stops": request.stops(),
            "max_tokens": request.max_tokens,
            "default_tokens": self.defaults.max_tokens,
            "exact": request.exact,
            "sources": bool(request.sources),
            "recall": request.recall is not False,
        }

    @asynccontextmanager
    async def answer(self, job: Job) -> AsyncIterator[Reply]:
        """The events of a job's answer. Leaving ends it, finished or not."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        if job.said is not None:
            for event in (Started(0, 0, None), Written(job.said, "", []), Finished("stop", 0, {})):
                events.put_nowait(event)
            yield Reply(events, job.facts)
            return
        form = await self.prompting.run(lambda: self.prompting.call_format) if job.tools else None
        calls = CallSplitter(job.tools, form) if job.tools and form else None
        ticket = Ticket(job, deliver)
        self.engine.submit(ticket)
        try:
            yield Reply(events, job.facts, calls)
        finally:
            ticket.cancel()
