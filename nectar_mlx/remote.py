"""Answers from a `nectar serve` that runs on this machine: its model is loaded already, so they begin at once.

Nothing here imports MLX, which alone takes longer than such an answer.
"""

import argparse
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import cli
from .core import local_server, terminal
from .core.local_server import Found
from .core.repetition import Repetition
from .errors import NectarError
from .writing import Ended, Written

if TYPE_CHECKING:
    from .core.types import JsonObject

_CONNECT, _SILENCE = 0.5, 120.0  # seconds to connect, and without a byte: a server that is busy sends one every ten
_READING = ("sources", "bytes_read_per_token")
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
_MOST_HEAD, _MOST_BYTES = 100, 8 << 20  # lines of an answer's head; bytes of a line, or of an error


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the option of `reply` and `conversation`."""
    parser.add_argument(
        "--here", action="store_true", help="load the model here, even where `nectar serve` has it loaded already"
    )


def reply(args: argparse.Namespace, messages: Sequence[Mapping[str, str]]) -> "Reply | None":
    """A server's answer to a conversation about the file; None where no server has the file as it is, or the options
    are not a server's. NectarError if the server refuses the question."""
    path = Path(args.nectar)
    if _needs_model(args) or (found := local_server.find(path)) is None:
        return None
    try:
        response = _Response(found, _body(found.name, args, messages))
        if response.status == 200:
            if len(messages) == 1:
                cli.say(f"answered by the server that runs here{_not_faithful(_header(path))}")
            return Reply(response, args, _header(path))
        message = str(json.loads(response.read())["error"]["message"])
    except (ConnectionRefusedError, FileNotFoundError):
        local_server.forget(found)  # of a server that was killed
        return None
    except _BROKEN:
        return None
    if response.status == 400:
        raise NectarError(message)
    return None


def _needs_model(args: argparse.Namespace) -> bool:
    """Whether an option is not a server's."""
    return bool(args.here or args.model or args.adapter or args.kv_bits or getattr(args, "cite", False) or args.library)


def conversation(args: argparse.Namespace) -> "Conversation | None":
    """A conversation with a server; None as for `reply`."""
    path = Path(args.nectar)
    if _needs_model(args) or local_server.find(path) is None:
        return None
    return Conversation(args, _header(path))


class _Event(NamedTuple):
    """A line of an answer as it comes. pieces: answer, thoughts, and why it ended. extra: for `Reply.facts`."""

    pieces: "list[tuple[str, str, str | None]]"
    usage: dict[str, int]
    extra: "JsonObject"

    @classmethod
    def of(cls, line: bytes) -> "_Event":
        """NectarError with the server's message; one of `_BROKEN` for a line that no server of ours writes."""
        event = json.loads(line)
        if "error" in event:
            raise NectarError(str(event["error"]["message"]))
        pieces = [
            (_text(choice["delta"].get("content")), _text(choice["delta"].get("reasoning")), _reason(choice))
            for choice in event.get("choices", ())
        ]
        usage = {name: int(count) for name, count in (event.get("usage") or {}).items() if not isinstance(count, dict)}
        extra = {name: event[name] for name in ("chunk", *_READING) if name in event}
        for source in extra.get("sources") or ():
            _source_line(source)
        return cls(pieces, usage, extra)


class Reply:
    """One answer; iterate over it once."""

    def __init__(self, response: "_Response", args: argparse.Namespace, header: "JsonObject"):
        self._response, self._args, self._header = response, args, header
        self._usage: dict[str, int] = {}
        self._extra: JsonObject = {}

    def __iter__(self) -> Iterator[Written]:
        """NectarError where the server ends in the middle of the answer."""
        loops, reason, started, pieces = Repetition(), None, 0.0, 0
        for event in self._events():
            self._usage = event.usage or self._usage
            self._extra |= event.extra
            for answer, thoughts, ended in event.pieces:
                reason = ended or reason
                if answer or thoughts:
                    started, pieces = started or time.perf_counter(), pieces + 1
                    yield Written(answer, thoughts, answer)
                if loops.add(thoughts + answer) and not self._args.allow_loops:
                    reason = "repetition"
            if reason == "repetition":
                break
        self._response.close()
        if reason is None:
            raise NectarError("the server that runs here ended in the middle of the answer")
        seconds, tokens = time.perf_counter() - started, self._usage.get("completion_tokens", pieces)
        speed = round((tokens - 1) / seconds, 2) if started and tokens > 1 else 0.0
        prompt_tokens = self._usage.get("prompt_tokens", 0)
        yield Written(ended=Ended(reason=reason, tokens=tokens, prompt_tokens=prompt_tokens, tokens_per_second=speed))

    def _events(self) -> Iterator[_Event]:
        try:
            for line in self._response:
                data = line.removeprefix(b"data: ").strip()
                if data != line.strip() and data != b"[DONE]":  # no blank line, no comment, not the end
                    yield _Event.of(data)
        except _BROKEN as error:
            raise NectarError(f"the server that runs here ended in the middle of the answer ({error})") from None

    def sources(self) -> list[str]:
        """The passages that say what it says, a line each."""
        found = self._extra.get("sources") or ()
        return [f"[{number}] {_source_line(source)}" for number, source in enumerate(found, 1)]

    named = 0  # of the sources, by marks

    def cited(self) -> str:
        """A server does not mark sentences (`_needs_model`)."""
        raise NotImplementedError

    def facts(self) -> "JsonObject":
        """For `--json`, once the answer has ended."""
        return {
            "model": self._header["model"],
            "context_tokens": self._header["tokens"],
            "chunk": None,
            "prompt_tokens": self._usage.get("prompt_tokens", 0),
            "seconds_to_load": 0.0,
            "server": True,
            **self._extra,
        }


class Conversation:
    """A conversation that the server reads anew with each question; it keeps what it has read before."""

    def __init__(self, args: argparse.Namespace, header: "JsonObject"):
        self._args, self._header = args, header
        self.messages: list[dict[str, str]] = []
        self._last: Reply | None = None

    def reset(self) -> None:
        self.messages, self._last = [], None

    def answer(self, question: str) -> Iterator[Written]:
        """The answer of the next turn as it is written; the turn is added when it is complete or interrupted."""
        messages = [*self.messages, {"role": "user", "content": question}]
        self._last = reply(self._args, messages)
        if self._last is None:
            raise NectarError("the server that ran here is gone: start `nectar chat` again to load the model here")
        pieces = list[str]()
        try:
            for piece in self._last:
                pieces.append(piece.answer)
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]

    def sources(self) -> list[str]:
        return self._last.sources() if self._last else []

    def describe(self) -> str:
        """One line about the text and the file."""
        source, verdict = self._header["source"] or "a text", self._header["verdict"]
        return f"{source}: {self._header['tokens']:,} tokens, read by {self._header['model']}. {verdict}".strip()

    def figures(self, ended: Ended) -> str:
        """One line about the last answer."""
        return f"[{ended.tokens} tokens, {ended.tokens_per_second:.1f} tokens/s, by the server]"


class _Response:
    """The answer to a question, over HTTP 1.0 on a Unix socket: a body that ends with the connection.

    `http.client` would take as long to import as everything else here together.
    """

    def __init__(self, found: Found, body: bytes):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:  # `_file` keeps it open
            connection.settimeout(_CONNECT)
            connection.connect(str(found.socket))
            connection.settimeout(_SILENCE)
            key = [f"Authorization: Bearer {found.key}"] if found.key else []
            head = ["POST /v1/chat/completions HTTP/1.0", "Host: localhost", "Content-Type: application/json", *key]
            connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            self._file = connection.makefile("rb")
        self.status = int(self._line().split()[1])
        for _ in range(_MOST_HEAD):
            if not self._line().strip():
                break

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._line, b"")

    def _line(self) -> bytes:
        line = self._file.readline(_MOST_BYTES)
        if len(line) == _MOST_BYTES:
            raise ValueError("a line of it has no end")
        return line

    def read(self) -> bytes:
        return self._file.read(_MOST_BYTES)

    def close(self) -> None:
        self._file.close()


def _text(value: object) -> str:
    """A text that may be left out; ValueError for anything else."""
    if value is not None and not isinstance(value, str):
        raise ValueError("a part of it is no text")
    return value or ""


def _reason(choice: "JsonObject") -> str | None:
    return _text(choice.get("finish_reason")) or None


def _source_line(source: "JsonObject") -> str:
    document, place, text = (_text(source[name]) for name in ("document", "place", "text"))
    return terminal.quoted(document, place, float(source["score"]), text)


def _body(name: str, args: argparse.Namespace, messages: Sequence[Mapping[str, str]]) -> bytes:
    wanted = {
        "model": name,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": args.temp,
        "top_p": args.top_p,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
        "exact": args.exact,
        "whole": args.whole,
        "recall": args.recall,
        "sources": args.sources or bool(getattr(args, "json", False)),
        "chat_template_kwargs": {"enable_thinking": args.think},
    }
    return json.dumps({name: value for name, value in wanted.items() if value is not None}).encode()


def _header(path: Path) -> "JsonObject":
    """What a file says of itself, read without the library that checks it: the server has done that."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _MOST_BYTES)))
        said = header["__metadata__"]
        report = json.loads(said["report"])
        return {
            "model": said["model"],
            "source": said.get("source", ""),
            "tokens": header["prefix"]["shape"][0],
            "verdict": report.get("verdict", ""),
        }
    except _BROKEN:
        return {"model": "", "source": "", "tokens": 0, "verdict": ""}


def _not_faithful(header: "JsonObject") -> str:
    """The verdict, if it is not "close"."""
    verdict = header["verdict"]
    return "" if not verdict or verdict.startswith("Close") else f". {verdict}"
