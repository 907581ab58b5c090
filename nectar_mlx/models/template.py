"""Chat templates, rendered within limits of time, memory and length: a template is a program that came with a model."""

import atexit
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from ..core import isolated
from ..core.types import Tokenizer
from ..errors import NectarError

SECONDS = 0.5  # of computing, for a conversation of a few words: it takes a millisecond
_SECONDS_PER_BYTE = 1e-6
_SECONDS_TO_START = 20.0
_MOST_WAIT = 120.0  # seconds, computing or not
_SOON = 0.05  # seconds in which nearly every answer comes: until then nobody asks how much was computed
_PROGRAM = Path(__file__).with_name("template_process.py")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of an answer's thoughts, the standard one first


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The conversation as the tokenizer's chat template writes it. options: variables of the template.

    NectarError if the template refuses the conversation, or takes more time or memory, or makes a longer text, than any
    conversation needs.
    """
    inner: Any = getattr(tokenizer, "_tokenizer", tokenizer)  # of mlx-lm's wrapper
    if not _renders_by_file(tokenizer, inner):  # Python code of mlx-lm, transformers or a caller
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    thinking = getattr(tokenizer, "_thinking_kwarg", "enable_thinking")
    if "enable_thinking" in options:
        options[thinking] = options.pop("enable_thinking")
    elif thinking not in options and hasattr(tokenizer, "has_thinking"):
        options[thinking] = tokenizer.has_thinking
    variables = {
        **{"tools": None, "documents": None, "add_generation_prompt": False},
        **inner.special_tokens_map,
        **options,
        "messages": [_plain(message) for message in messages],
    }
    return _process().render(inner.get_chat_template(None, variables["tools"]), variables)


def _renders_by_file(tokenizer: Tokenizer, inner: Any) -> bool:
    """Whether the template is Jinja's, of a file, and nothing else renders it."""
    own = getattr(type(inner), "apply_chat_template", None)
    replaced = getattr(tokenizer, "_chat_template", None) is not None
    return own is PreTrainedTokenizerBase.apply_chat_template and not replaced


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: without empty fields, its thoughts under each name."""
    fields = {name: value for name, value in message.items() if value is not None}
    thoughts = next((fields[name] for name in _REASONING if name in fields), None)
    return fields if thoughts is None else {"thinking": thoughts, **fields, "reasoning_content": thoughts}


class _Process:
    """The other process; it is started when it is first needed, and again after it had to be stopped."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        request = json.dumps({"template": template, "variables": variables}, default=str).encode() + b"\n"
        with self._lock:
            try:
                line = self._exchange(self._started(), request, SECONDS + len(request) * _SECONDS_PER_BYTE)
            except BaseException:
                self.stop()
                raise
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise NectarError(f"the model's chat template cannot write this conversation: {answer['error']}")
        return answer["text"]

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._running is None or self._running.poll() is not None:
            self._running = subprocess.Popen(
                isolated.script(str(_PROGRAM)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd=tempfile.gettempdir(),
                start_new_session=True,  # Ctrl-C is for the program, which then stops this process
            )
            assert self._running.stdin is not None
            os.set_blocking(self._running.stdin.fileno(), False)
            self._exchange(self._running, b"", _SECONDS_TO_START)
        return self._running

    def _exchange(self, process: "subprocess.Popen[bytes]", request: bytes, seconds: float) -> bytes:
        """The line that answers a request. seconds: of computing; waiting for a busy machine is no fault."""
        assert process.stdin is not None and process.stdout is not None
        to, of = process.stdin.fileno(), process.stdout.fileno()
        sending, answer = memoryview(request), bytearray()
        until, since = _computed(process.pid) + seconds, time.monotonic()
        while not answer.endswith(b"\n"):
            readable, writable, _ = select.select([of], [to] if sending else [], [], 0.05)
            waited = time.monotonic() - since
            if (waited > _SOON and _computed(process.pid) > until) or waited > _MOST_WAIT:
                raise NectarError(f"the model's chat template takes more than {seconds:.1g} s: take another model")
            if writable:
                try:
                    sending = sending[os.write(to, sending[: 1 << 16]) :]
                except BrokenPipeError:  # it has ended, which reading from it tells
                    sending = sending[:0]
            if readable:
                piece = os.read(of, 1 << 20)
                if not piece:
                    raise NectarError("the model's chat template takes too much memory: take another model")
                answer += piece
        return bytes(answer)


def _computed(pid: int) -> float:
    """Seconds of a processor that this process has taken."""
    with suppress(psutil.Error):  # it is gone, which reading from it tells
        times = _known(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


@lru_cache(maxsize=4)
def _known(pid: int) -> psutil.Process:
    """Finding it takes ten times as long as asking it."""
    return psutil.Process(pid)


@lru_cache
def _process() -> _Process:
    process = _Process()
    atexit.register(process.stop)
    return process
