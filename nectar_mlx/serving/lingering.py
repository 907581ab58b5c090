"""An answer to a request whose body is still on its way, such as one that is refused.

A connection that is closed while its client sends is reset: the client sees a broken pipe in the place of the answer.
So the rest of the body is read and forgotten, within bounds, before the connection is closed.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = 2.0  # for the rest of a body to arrive, once its answer is sent
MOST = 64 << 20  # bytes of it
_END: Message = {"type": "http.response.body", "body": b"", "more_body": False}


class Lingering:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body, early = _Body(scope, receive), False

        async def reply(message: Message) -> None:
            nonlocal early
            if not body.arrived:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
                elif not message.get("more_body", False):
                    # The head has the answer's length, so the client need not wait for its formal end.
                    early, message = True, {**message, "more_body": True}
            await send(message)

        try:
            await self._app(scope, body.receive, reply)
        finally:
            if early:
                await body.discard()
                await send(_END)


class _Body:
    """A request's body, and whether it has arrived to its end."""

    def __init__(self, scope: Scope, receive: Receive):
        headers = dict(scope["headers"])
        self.arrived = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):  # nor has a client that has left
            self.arrived = True
        return message

    async def discard(self) -> None:
        """Reads the rest, as far as it arrives within the bounds."""
        left = MOST
        try:
            async with asyncio.timeout(SECONDS):
                while not self.arrived and left > 0:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            return
