"""`nectar serve book.nectar ...`: mlx-lm's OpenAI-compatible server, where each .nectar is a model's id.

The server, its batches, its prompt cache and its flags are mlx-lm's. Ours are the models it may load, the prompts (they
continue a context), and what keeps a server safe: a key, limits, and an orderly end. mlx-lm loads and generates in one
thread; a batch holds requests for one id only, so contexts never mix.
"""

import argparse
import hmac
import ipaddress
import json
import logging
import os
import re
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
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import cli, hub, models, prompts, store
from .errors import NectarError
from .nectar import Nectar

_FOREIGN = ("adapter_path", "chat_template", "use_default_chat_template", "trust_remote_code", "pipeline")
_AT = "@exact="  # a model's id and a request's share of exact keys make the id that is loaded
_GRACE = 5.0  # seconds that open requests get to finish when the server is stopped
_LAST_BREATH = 0.3
_IDLE = 60.0  # seconds that a connection may be silent


class ContextTokenizer(TokenizerWrapper):
    """The model's tokenizer, except that what it encodes continues a context: no template head, no BOS."""

    has_chat_template = True  # `prompts` has a way for models without one

    def __init__(self, tokenizer: TokenizerWrapper):
        vars(self).update(vars(tokenizer))
        self._whole = tokenizer

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **template: Any) -> Any:  # type: ignore[override]
        tokens = prompts.prompt(self._whole, messages, **template)
        return tokens if tokenize else self._whole.decode(tokens)

    def encode(self, text: Any, **options: Any) -> list[int]:
        if not isinstance(text, str) or not text:
            raise NectarError("the prompt must be one non-empty string")
        return prompts.encode(self._whole, text)


class Provider(server.ModelProvider):
    """Loads what the server may serve: the given .nectar files, whose shared model is loaded once."""

    model: Any
    tokenizer: Any
    draft_model: Any
    model_key: Any
    serving: Nectar
    reading: list[Any]  # the caches of the request that is served alone

    def __init__(self, args: argparse.Namespace, files: dict[str, Path]):
        super().__init__(args)
        self.files = files
        self._model_map["default_model"] = next(iter(files))
        self._base: tuple[str, Any, Any] | None = None
        self._nectars: dict[str, Nectar] = {}
        self.reading = []
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def load_default(self) -> None:
        """Loads every file once, so that what is wrong is known before the first request; the first one stays."""
        try:
            for name in reversed(self.files):
                self.load(name, None, "default_model")  # type: ignore[no-untyped-call]
        except Exception as error:
            self.failure = error
        self.ready.set()

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        name, exact = _parted(model_path, self.cli_args.exact)
        if name not in self.files:
            raise NectarError(f"there is no model {name!r}; there are: {', '.join(self.files)}")
        nectar, model, tokenizer = self._nectar(name)
        retrieves = bool(nectar.retrieving(exact))

        def make_cache() -> list[Any]:
            self.reading = nectar.make_cache(kv_bits=self.cli_args.kv_bits, exact=exact)
            return self.reading

        model.make_cache = make_cache
        if draft_model_path is not None and self.draft_model is None:
            self.draft_model, _ = models.load(draft_model_path, log=cli.say)
        self.model, self.tokenizer = model, ContextTokenizer(tokenizer)
        self.is_batchable = self.draft_model is None and not retrieves  # what an answer read is known of one alone
        self.serving = nectar
        self.model_key = (model_path, adapter_path, draft_model_path)

    def _nectar(self, name: str) -> tuple[Nectar, Any, Any]:
        file = self.files[name]
        wanted = self.cli_args.model or store.read_metadata(file)["model"]
        if self._base is None or self._base[0] != wanted:
            self._base = None
            self._nectars.clear()
            self.reset()
            self._base = (wanted, *models.load(wanted, log=cli.say))
        _, model, tokenizer = self._base
        if name not in self._nectars:
            self._nectars[name] = cli.load_nectar(file, model, tokenizer)
        return self._nectars[name], model, tokenizer


class PromptCache(LRUPromptCache):
    """mlx-lm's, which may hold the whole of a prompt; its batches need at least one token that is still to be read."""

    def __init__(self, max_size: int, provider: Provider | None = None):
        super().__init__(max_size)
        self._provider = provider

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and self._provider is not None:
            self._provider.reading = cache
            self._provider.serving.forget_reading(cache)
        if rest:
            return cache, rest
        if all(layer.is_trimmable() for layer in cache):
            for layer in cache:
                layer.trim(1)
            return cache, tokens[-1:]
        return None, tokens


class Generator(server.ResponseGenerator):
    """mlx-lm's; what an answer that was served alone has read of its context becomes a field of the request's."""

    model_provider: Provider

    def _serve_single(self, request: Any, stream: Any) -> None:
        queue, *others = request
        super()._serve_single((_Told(queue, self.model_provider), *others), stream)  # type: ignore[no-untyped-call]


class _Told:
    """A request's queue: the first item is its `GenerationContext`, the last is None."""

    def __init__(self, queue: Any, provider: Provider):
        self._queue, self._provider, self._context = queue, provider, None

    def put(self, item: Any) -> None:
        if self._context is None:
            self._context = item
        elif item is None:
            self._context.reading = self._provider.serving.reading(self._provider.reading)
        self._queue.put(item)


class _Kept:
    """A generator for one request that keeps its `GenerationContext`."""

    def __init__(self, generator: Any):
        self._generator, self.context = generator, None

    def generate(self, *args: Any, **options: Any) -> Any:
        found = self._generator.generate(*args, **options)
        self.context = found[0]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


class Handler(server.APIHandler):
    """mlx-lm's requests, admitted and checked: what would end its generation thread must not reach it."""

    timeout = _IDLE
    response_generator: Any  # a ResponseGenerator, or one that is kept for a request

    @property
    def _provider(self) -> Provider:
        return self.response_generator.model_provider  # type: ignore[no-any-return]

    def do_POST(self) -> None:
        if not self._has_key():
            return self._refuse(401, "a valid key is needed: Authorization: Bearer KEY")
        length = self.headers.get("Content-Length", "0")
        limit = self._provider.cli_args.max_body
        if not re.fullmatch(r"\d{1,15}", length):
            return self._refuse(400, "the Content-Length is not a number")
        if int(length) > limit:
            self._refuse(413, f"the request is larger than {limit:,} bytes")
            return self._discard(min(int(length), 16 * limit))
        try:
            super().do_POST()  # type: ignore[no-untyped-call]
        except UnicodeDecodeError:
            self._refuse(400, "the request is not UTF-8")

    def do_GET(self) -> None:
        if self.path != "/health" and not self._has_key():
            return self._refuse(401, "a valid key is needed: Authorization: Bearer KEY")
        super().do_GET()  # type: ignore[no-untyped-call]

    def _has_key(self) -> bool:
        key = self._provider.cli_args.api_key
        given = self.headers.get("Authorization", "")
        return not key or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._answer(status, {"error": {"message": message, "type": kind, "code": None, "param": None}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _discard(self, length: int) -> None:
        """Reads on for a while: a client that is still sending would not see the answer to a closed connection."""
        while length > 0 and (piece := self.rfile.read(min(length, 1 << 16))):
            length -= len(piece)

    def handle_models_request(self) -> None:
        names = list(self._provider.files)
        entries = [{"id": n, "object": "model", "created": self.created, "owned_by": "nectar"} for n in names]
        wanted = self.path.partition("?")[0].removeprefix("/v1/models").strip("/")
        if not wanted:
            self._answer(200, {"object": "list", "data": entries})
        elif wanted in names:
            self._answer(200, entries[names.index(wanted)])
        else:
            self._refuse(404, f"there is no model {wanted!r}")

    def handle_chat_completions(self) -> Any:
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise NectarError("messages must be a list of objects")
        for message in messages:
            parts = message.get("content")
            if isinstance(parts, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in parts):
                raise NectarError("only text is supported in messages")
        return super().handle_chat_completions()

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        if self.requested_model not in {"default_model", *self._provider.files}:
            return self._refuse(404, f"there is no model {self.requested_model!r}")
        if problem := self._problem(stop_words):
            return self._refuse(400, problem)
        self._asked, self.response_generator = self.requested_model, _Kept(self.response_generator)
        if (exact := self.body.get("exact")) is not None:
            known = self._provider.files
            self.requested_model = f"{self._asked if self._asked in known else next(iter(known))}{_AT}{exact}"
        super().handle_completion(request, stop_words)

    def generate_response(self, text: str, finish_reason: Any, *args: Any, **options: Any) -> dict[str, Any]:
        response: dict[str, Any] = super().generate_response(text, finish_reason, *args, **options)
        response["model"] = self._asked
        if finish_reason is not None:
            response |= getattr(self.response_generator.context, "reading", {})
        return response

    def _problem(self, stop_words: Any) -> str | None:
        """What mlx-lm does not check before the request is in its generation thread."""
        if self.adapter is not None or self.requested_draft_model != "default_model":
            return "adapters and draft models cannot be chosen by a request"
        if not isinstance(stop_words, list) or not all(isinstance(w, str) and w for w in stop_words):
            return "stop must be a non-empty string, or a list of them"
        size = len(self._provider.tokenizer)
        if self.top_k >= size or any(not 0 <= token < size for token in self.logit_bias or {}):
            return f"top_k and logit_bias must stay within the vocabulary of {size} tokens"
        if self.stream_options is not None and "include_usage" not in self.stream_options:
            self.stream_options = None
        exact = self.body.get("exact")
        if exact is not None and (isinstance(exact, bool) or not isinstance(exact, int | float) or not 0 <= exact <= 1):
            return "exact must be a number from 0 to 1: the share of the text's keys to read at each step"
        return None


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
        store.read_metadata(file)
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


def _parted(model_path: str, exact: float | None) -> tuple[str, float | None]:
    """A file's id and the share of keys to read exactly, the server's own unless the request said so."""
    name, at, told = model_path.partition(_AT)
    return name, float(told) if at else exact


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
