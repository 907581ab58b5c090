"""Who may ask: the Host and Origin of a request, its key; headers that protect pages; one line of log for each request.

A web page elsewhere can make a browser send requests to 127.0.0.1, directly (then Origin or Sec-Fetch-Site says so) or
under a name of its own that it points there (then Host says so).
"""

import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .web import Sender, headers_of

_OPEN_PATHS = ("/", "/health")  # and what is below /page/: no secrets, and a page must load to ask for the key
_PAGE = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_log = logging.getLogger("nectar_mlx.requests")


@dataclass(frozen=True, kw_only=True)
class Access:
    """hosts: names under which the server may be asked, besides this machine's own and its addresses. origins: of web
    pages elsewhere that may send requests. key: "" where none is needed."""

    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    key: str = ""


class Guard:
    """Stands before all of the server's routes."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics):
        self._app, self._access, self._metrics = app, access, metrics
        own = socket.gethostname().lower()
        self._hosts = {"localhost", own, f"{own}.local", *(host.lower() for host in access.hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in access.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 0
        headers = _headers(scope)
        origin = headers.get("origin", "").lower()
        allowed = origin in self._origins

        async def protected(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS, (b"content-security-policy", _PAGE)]
                if allowed:
                    message["headers"] += _cors(origin)
            await send(message)

        try:
            if allowed and scope["method"] == "OPTIONS":
                await protected({"type": "http.response.start", "status": 204, "headers": []})
                await protected({"type": "http.response.body", "body": b""})
            elif error := self._refusal(scope, headers, origin):
                await Sender(protected).json(error.status, error.body, headers_of(error))
            else:
                await self._app(scope, receive, protected)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status)
            took = time.perf_counter() - start
            _log.info("%s %s %s %.3f s", scope["method"], _printable(scope["raw_path"]), status or "left", took)

    def _refusal(self, scope: Scope, headers: dict[str, str], origin: str) -> ApiError | None:
        host = headers.get("host")
        if host is not None and not self._is_own(host):
            return ApiError(403, "this name is not the server's: see --allowed-hosts", code="host_not_allowed")
        if origin and origin not in self._origins and origin != f"{scope['scheme']}://{(host or '').lower()}":
            return ApiError(403, "pages of this origin may not ask: see --allowed-origins", code="origin_not_allowed")
        is_link = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if not origin and headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_link:
            return ApiError(403, "pages elsewhere may not ask: see --allowed-origins", code="origin_not_allowed")
        path = scope["path"]
        is_open = scope["method"] in ("GET", "HEAD") and (path in _OPEN_PATHS or path.startswith("/page/"))
        if self._access.key and not is_open and not self._has_key(headers.get("authorization", "")):
            return ApiError(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _has_key(self, given: str) -> bool:
        """In constant time."""
        kind, _, key = given.partition(" ")
        same = hmac.compare_digest(key.strip().encode("latin-1"), self._access.key.encode())
        return same and kind.lower() == "bearer"

    def _is_own(self, host: str) -> bool:
        """Whether a Host is an address, which no page can point elsewhere, or one of the server's names."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return name in self._hosts or name.endswith(".localhost")
        return True


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"vary", b"origin"),
    ]


def _printable(raw_path: bytes, *, most: int = 200) -> str:
    return raw_path[:most].decode("ascii", "replace").encode("ascii", "backslashreplace").decode()
