"""Requests, checked before mlx-lm sees them: an error in its generation thread would end the server."""

import hmac
import json
import re
from typing import Any

from mlx_lm import server

from ..core.types import JsonObject
from ..errors import NectarError
from .provider import Provider, Target

_IDLE = 60.0  # seconds after which a silent connection is closed


class _Refusal(BaseException):
    """A NectarError on its way through mlx-lm's handler, which would answer 404 to any Exception."""


class _RequestGenerator:
    """The generator of one request, which keeps its `GenerationContext`. target: what it is answered from. chosen:
    whether the client chose the answer's length."""

    def __init__(self, generator: Any, target: Target, *, chosen: bool):
        self._generator, self._target, self._chosen, self.context = generator, target, chosen, None

    def generate(self, request: Any, arguments: Any, **options: Any) -> Any:
        arguments.model.model, arguments.chosen = self._target, self._chosen
        try:
            self.context, responses = self._generator.generate(request, arguments, **options)
        except NectarError as error:
            raise _Refusal(str(error)) from error
        return self.context, responses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


class Handler(server.APIHandler):
    """mlx-lm's request handler, with a key, limits and checks."""

    timeout = _IDLE
    response_generator: Any  # a ResponseGenerator; during a request, its _RequestGenerator
    _chunk: int | None = None

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

    def _answer(self, status: int, body: JsonObject) -> None:
        content = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _discard(self, length: int) -> None:
        """Reads up to `length` bytes more: a client that is still sending sees no answer on a closed connection."""
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
            self._refuse(404, self._provider.no_model(wanted))

    def handle_chat_completions(self) -> Any:
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise NectarError("messages must be a list of objects")
        for message in messages:
            content = message.get("content")
            if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
                raise NectarError("only text is supported in messages")
        return super().handle_chat_completions()

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        if self.requested_model not in {"default_model", *self._provider.files}:
            return self._refuse(404, self._provider.no_model(self.requested_model))
        if problem := self._problem(stop_words):
            return self._refuse(400, problem)
        chosen = any(self.body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        files = self._provider.files
        name = self.requested_model if self.requested_model in files else next(iter(files))
        self._chunk = self._provider.nearest(name, self._questions())
        target = Target(name, self._chunk, self.body.get("exact"))
        self.response_generator = _RequestGenerator(self.response_generator, target, chosen=chosen)
        try:
            super().handle_completion(request, stop_words)
        except _Refusal as refusal:
            self._refuse(400, str(refusal))

    def _questions(self) -> list[str]:
        """The user's questions, the last one first; none if the answer is to use the whole text."""
        if self.body.get("whole"):
            return []
        if not self.path.endswith("/chat/completions"):
            prompt = self.body.get("prompt")
            return [prompt] if isinstance(prompt, str) else []
        contents = [m.get("content") for m in reversed(self.body["messages"]) if m.get("role") == "user"]
        return [
            c if isinstance(c, str) else "\n".join(str(piece.get("text", "")) for piece in c or []) for c in contents
        ]

    def generate_response(self, text: str, finish_reason: Any, *args: Any, **options: Any) -> JsonObject:
        response: JsonObject = super().generate_response(text, finish_reason, *args, **options)
        if self._chunk is not None:
            response["chunk"] = self._chunk
        if finish_reason is not None:
            response |= getattr(self.response_generator.context, "reading", {})
        return response

    def _problem(self, stop_words: Any) -> str | None:
        """Errors that mlx-lm would find only in its generation thread."""
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
