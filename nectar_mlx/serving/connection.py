"""uvicorn's HTTP/1.1 connection with a bound on the time for a request's head, and on connections that send none.

uvicorn bounds the time between requests alone: a client that sends a head byte by byte would keep its connection.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import lingering
from .errors import ApiError

HEAD_SECONDS = 10.0
MAX_HEADLESS = 256  # connections that wait for a head; the one that has waited longest makes room


class Connection(H11Protocol):
    _timer: asyncio.TimerHandle | None = None
    _refused = False  # what arrives is no HTTP, and is not read any more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._timer is None and self._idle:
            self._wait_for_head()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if not self._idle:
            self._head_is_here()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg, code="invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.close()
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        # A client that is still sending would see a reset in the place of the answer.
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(lingering.SECONDS, self.transport.close)

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _headless(self) -> "dict[Connection, None]":
        """All connections that wait for a head, in the order in which they began to."""
        waiting: dict[Connection, None] = vars(self.server_state).setdefault("headless", {})
        return waiting

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)
        waiting: Any = self._headless
        waiting[self] = None
        if len(waiting) > MAX_HEADLESS:
            next(iter(waiting))._give_up()

    def _head_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._headless.pop(self, None)

    def _give_up(self) -> None:
        self._head_is_here()
        if self._idle:
            self.transport.abort()
