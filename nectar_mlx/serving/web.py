"""From HTTP to values and back: bodies with bounds in size and time, JSON and streams out, clients that have left."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, as_api_error

BODY_SECONDS = 30.0  # for a request's body to arrive
MOST_BODIES = 16  # of the largest size, arriving at a time
SEND_SECONDS = 60.0  # for a client to read a piece of the answer
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What an endpoint gets: the body, whole, and what the path named."""

    body: bytes = b""
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Json:
    """An answer in one piece."""

    value: Any
    status: int = 200


@dataclass(frozen=True)
class Stream:
    """An answer in pieces. on_error: the last piece, for an error once the answer has begun."""

    pieces: AsyncGenerator[bytes]
    on_error: Callable[[ApiError], bytes]
    content_type: str = "text/event-stream; charset=utf-8"


Endpoint: TypeAlias = Callable[[Request], Awaitable[Json | Stream]]


class Route:
    """An ASGI application of one endpoint. limit: bytes of a body, 0 for a request without one."""

    def __init__(self, endpoint: Endpoint, *, limit: int = 0, style: Callable[[ApiError], Any] | None = None):
        self._endpoint, self._limit = endpoint, limit
        self._style = style or (lambda error: error.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Sender(send)
        try:
            body = await read_json(scope, receive, self._limit) if self._limit else b""
            request = Request(body, scope.get("path_params", {}))
            await unless_gone(receive, self._answer(request, reply))
        except ApiError as error:
            await reply.json(error.status, self._style(error), headers_of(error))
        except asyncio.CancelledError:  # the server stops, and its time for answers to end is over
            if reply.begun:
                raise
            await reply.json(503, self._style(ApiError(503, "the server is stopping", code="stopping")))

    async def _answer(self, request: Request, reply: "Sender") -> None:
        on_error = None
        try:
            answer = await self._endpoint(request)
            if isinstance(answer, Json):
                return await reply.json(answer.status, answer.value)
            on_error = answer.on_error
            await reply.stream(answer)
        except Exception as error:
            told = as_api_error(error)
            if told.status == 500:
                _log.error("%s: %s", type(error).__name__, error, exc_info=error)
            if on_error is None or not reply.begun:
                raise told from None
            await reply.end(on_error(told))


async def unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Does the work, or stops it as soon as the client has left."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped = not task.done()
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(gone, *([task] if stopped else []), return_exceptions=True)
    if not stopped:
        task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_json(scope: Scope, receive: Receive, limit: int) -> bytes:
    """A JSON body, not parsed. ApiError 415 for another type, else as `body_pieces`."""
    kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "the Content-Type must be application/json", code="unsupported_media_type")
    body = bytearray()
    try:
        async with aclosing(body_pieces(scope, receive, limit)) as pieces:
            async for piece in pieces:
                body += piece
                bodies.take(len(piece), limit)
    finally:
        bodies.held -= len(body)
    return bytes(body)


async def body_pieces(
    scope: Scope, receive: Receive, limit: int, *, seconds: float | None = None
) -> AsyncGenerator[bytes]:
    """A body as it arrives. ApiError 413 for more than `limit` bytes, 408 where it has not arrived in time."""
    length, count = dict(scope["headers"]).get(b"content-length", b"0"), 0
    if length.isdigit() and int(length) > limit:
        raise ApiError(413, f"the request is larger than {limit:,} bytes", code="request_too_large")
    seconds = BODY_SECONDS if seconds is None else seconds
    end, more = asyncio.get_running_loop().time() + seconds, True
    while more:
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the request has not arrived in {seconds:g} s", code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the request has no end", code="incomplete_request")
        piece = message.get("body", b"")
        count += len(piece)
        if count > limit:
            raise ApiError(413, f"the request is larger than {limit:,} bytes", code="request_too_large")
        yield piece
        more = message.get("more_body", False)


class _Bodies:
    """Bytes of bodies that are arriving, all together."""

    held = 0

    def take(self, nbytes: int, limit: int) -> None:
        self.held += nbytes
        if self.held > MOST_BODIES * limit:
            raise ApiError(429, "too many large requests at a time: try again in a moment", code="busy")


bodies = _Bodies()


def headers_of(error: ApiError) -> list[tuple[bytes, bytes]]:
    extra = {401: (b"www-authenticate", b"Bearer"), 429: (b"retry-after", b"1")}.get(error.status)
    return [extra] if extra else []


class Sender:
    """Sends one answer. A client that does not read it is given up."""

    def __init__(self, send: Send):
        self._send, self.begun = send, False

    async def json(self, status: int, value: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        length = (b"content-length", str(len(content)).encode())
        await self._start(status, "application/json", [length, *(headers or [])])
        await self.end(content)

    async def stream(self, stream: Stream) -> None:
        """The first piece decides the status: an error before it is an answer of its own."""
        async with aclosing(stream.pieces) as pieces:
            async for piece in pieces:
                if not self.begun:
                    await self._start(200, stream.content_type, [])
                await self._put({"type": "http.response.body", "body": piece, "more_body": True})
        await self.end(b"")

    async def end(self, content: bytes) -> None:
        await self._put({"type": "http.response.body", "body": content, "more_body": False})

    async def _start(self, status: int, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        head = [(b"content-type", kind.encode()), (b"cache-control", b"no-store"), *headers]
        await self._put({"type": "http.response.start", "status": status, "headers": head})

    async def _put(self, message: Message) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self._send(message)
