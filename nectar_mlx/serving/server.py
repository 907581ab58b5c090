"""The HTTP server: how many requests it takes at a time, how it starts, and how it ends in order."""

import argparse
import ipaddress
import logging
import socket
import sys
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_lm import server

from .. import store
from ..core.progress import Log, no_log
from ..errors import NectarError
from ..models import hub
from .handler import Handler
from .provider import Generator, LoadNectar, PromptCache, Provider

FOREIGN = ("adapter_path", "chat_template", "use_default_chat_template", "trust_remote_code", "pipeline")
"""Options of mlx-lm's server that change the model, so that a .nectar would no longer fit it."""

_GRACE = 5.0  # seconds that open requests get to finish when the server is stopped
_THREAD_EXIT = 0.3  # seconds that a joined generation thread may need to free MLX's memory


class Server(ThreadingHTTPServer):
    """Answers at most `max_requests` requests at a time, one thread each; the others get a 503 with Retry-After."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], generator: server.ResponseGenerator, *, max_requests: int):
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, partial(Handler, generator, system_fingerprint=server.get_system_fingerprint()))
        self.generator, self._max_requests = generator, max_requests
        self._lock, self.open_requests = threading.Lock(), 0

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            admitted = self.open_requests < self._max_requests
            self.open_requests += admitted
        if admitted:
            return super().process_request(request, client_address)
        body = b'{"error": {"message": "too many open requests", "type": "server_error"}}'
        head = f"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: {len(body)}\r\n"
        request.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self.open_requests -= 1

    def handle_error(self, request: object, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, (ConnectionError, TimeoutError)):
            logging.info(f"{client_address[0]} closed the connection")
        else:
            logging.error(f"{type(error).__name__}: {error}", exc_info=logging.getLogger().isEnabledFor(logging.DEBUG))

    def service_actions(self) -> None:
        if not self.generator.is_healthy:
            raise RuntimeError("generation has stopped, see above")

    def stop(self) -> None:
        """Takes no more requests, gives the open ones time to finish, and ends the generation thread."""
        self.server_close()
        end = time.monotonic() + _GRACE
        while self.open_requests and time.monotonic() < end:
            time.sleep(0.05)
        _stop(self.generator)


def start(args: argparse.Namespace, load_nectar: LoadNectar, *, log: Log = no_log) -> Server:
    """A server that is bound and has its models loaded, ready for `serve_forever`. args: of `nectar serve`. NectarError
    for an error in the user's input."""
    if foreign := [f"--{name.replace('_', '-')}" for name in FOREIGN if getattr(args, name)]:
        raise NectarError(f"{', '.join(foreign)}: a .nectar belongs to one model, with its own weights and template")
    if not args.api_key and not _is_loopback(args.host):
        raise NectarError(f"{args.host} can be reached from other machines: give an --api-key, or leave out --host")
    files = {Path(name).stem if name.endswith(".nectar") else name: hub.nectar_file(name) for name in args.nectars}
    if len(files) < len(args.nectars):
        raise NectarError("two .nectar files have the same name, which is their id: rename one")
    for file in files.values():
        store.model_name(file)  # NectarError if it is not a .nectar
    provider = Provider(args, files, load_nectar, log=log)
    generator = Generator(provider, PromptCache(args.prompt_cache_size, provider))
    try:
        provider.ready.wait()
        if provider.failure is not None:
            raise provider.failure
        return Server((args.host, args.port), generator, max_requests=args.max_requests)
    except BaseException as error:
        _stop(generator)
        if isinstance(error, OSError):
            raise NectarError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from None
        raise


def _stop(generator: server.ResponseGenerator) -> None:
    generator.stop_and_join()
    # After the join the thread still frees its MLX memory, for which it needs the interpreter; else it aborts.
    time.sleep(_THREAD_EXIT)


def _is_loopback(host: str) -> bool:
    try:
        entries = socket.getaddrinfo(host or "0.0.0.0", None)
    except OSError:
        raise NectarError(f"there is no host {host}") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in entries)
