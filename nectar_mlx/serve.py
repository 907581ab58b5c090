"""`nectar serve book.nectar ...`: mlx-lm's OpenAI-compatible server, where each .nectar is a model's id.

The server, its batches, its prompt cache and its flags are mlx-lm's. Ours are the models it may load, the prompts (they
continue a context), and what keeps a server safe: a key, limits, and an orderly end. mlx-lm loads and generates in one
thread; a batch holds requests for one id only, so contexts never mix.
"""

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from mlx_lm import server

from . import cli, store
from .errors import NectarError
from .models import hub
from .serving.handler import Handler
from .serving.provider import Generator, PromptCache, Provider

_FOREIGN = ("adapter_path", "chat_template", "use_default_chat_template", "trust_remote_code", "pipeline")
_HELP = {  # where mlx-lm's does not hold
    "model": "the model to use (default: the name of the one the files were fitted on)",
    "allowed_origins": "of web pages that may ask, separated by commas (default: none)",
} | dict.fromkeys(_FOREIGN, argparse.SUPPRESS)
_GRACE = 5.0  # seconds that open requests get to finish when the server is stopped
_LAST_BREATH = 0.3


class Server(ThreadingHTTPServer):
    """Answers at most so many requests at a time, one thread each; the rest are told to come back."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], generator: server.ResponseGenerator, *, max_requests: int):
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, partial(Handler, generator, system_fingerprint=server.get_system_fingerprint()))
        self._generator, self._max_requests = generator, max_requests
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

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, (ConnectionError, TimeoutError)):
            logging.info(f"{client_address[0]} has left")
        else:
            logging.error(f"{type(error).__name__}: {error}", exc_info=logging.getLogger().isEnabledFor(logging.DEBUG))

    def service_actions(self) -> None:
        if not self._generator.is_healthy:
            raise RuntimeError("generation has stopped, see above")

    def stop(self) -> None:
        """Takes no more requests, lets the open ones finish for a while, and ends the generation thread."""
        self.server_close()
        end = time.monotonic() + _GRACE
        while self.open_requests and time.monotonic() < end:
            time.sleep(0.05)
        _end(self._generator)


def start(args: argparse.Namespace) -> Server:
    """A server that is bound and has loaded its models, for `serve_forever`; NectarError for a user's mistake."""
    foreign = [f"--{name.replace('_', '-')}" for name in _FOREIGN if getattr(args, name)]
    if foreign:
        raise NectarError(f"{', '.join(foreign)}: a .nectar belongs to one model, with its own weights and template")
    if not args.api_key and not _is_loopback(args.host):
        raise NectarError(f"{args.host} can be reached from other machines: give an --api-key, or leave out --host")
    files = {Path(name).stem if name.endswith(".nectar") else name: hub.nectar_file(name) for name in args.nectars}
    if len(files) < len(args.nectars):
        raise NectarError("two .nectar files have the same name, which is their id: rename one")
    for file in files.values():
        store.model_name(file)  # or it says what is wrong with it
    provider = Provider(args, files)
    generator = Generator(provider, PromptCache(args.prompt_cache_size, provider))
    try:
        provider.ready.wait()
        if provider.failure is not None:
            raise provider.failure
        return Server((args.host, args.port), generator, max_requests=args.max_requests)
    except BaseException as error:
        _end(generator)
        if isinstance(error, OSError):
            raise NectarError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from None
        raise


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(make_parser(), _work, argv)


def make_parser() -> argparse.ArgumentParser:
    """Our arguments and mlx-lm's: its main() builds a parser and has it parse, and here that parser is ours."""

    class Complete(Exception):
        pass

    parser = cli.Parser("serve", "Serves .nectar files over HTTP, OpenAI-compatible; each file's name is a model's id.")
    parser.add_argument("nectars", nargs="+", metavar="nectar", help="a .nectar file, or the id of one on the hub")
    cli.add_retrieval(parser)
    parser.add_argument("--api-key", default=os.environ.get("NECTAR_API_KEY"), help="(default: NECTAR_API_KEY)")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="largest request (8 MiB)")
    parser.add_argument("--max-requests", type=int, default=128, metavar="N", help="open at a time (128)")
    with (
        suppress(Complete),
        patch.object(parser, "parse_args", side_effect=Complete),
        patch.object(server, "argparse", SimpleNamespace(ArgumentParser=lambda **_: parser)),
    ):
        server.main()
    parser.set_defaults(allowed_origins=[])  # else any web page that is open could ask
    for action in parser._actions:
        action.help = _HELP.get(action.dest, action.help)
    return parser


def _work(args: argparse.Namespace) -> None:
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    server.maybe_set_recommended_wired_limit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    httpd = start(args)
    host, port = httpd.server_address[:2]
    cli.say(f"serving {', '.join(args.nectars)} at http://{host!s}:{port}/v1")
    try:
        httpd.serve_forever()
    except KeyboardInterrupt:
        cli.say("stopping")
    finally:
        httpd.stop()


def _end(generator: server.ResponseGenerator) -> None:
    generator.stop_and_join()
    # Joined, the thread still frees what MLX keeps for it, and needs the interpreter to do so: without one it aborts.
    time.sleep(_LAST_BREATH)


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None)
    except OSError:
        raise NectarError(f"there is no host {host}") from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


if __name__ == "__main__":
    sys.exit(main())
