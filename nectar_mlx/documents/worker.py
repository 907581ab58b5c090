"""A process of its own for readers in C: one that hangs, swells or crashes costs a file, not the program."""

import atexit
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import psutil

from nectar_mlx.documents.reading import Document, Unreadable

SECONDS = 30.0  # of computing without another page
MOST_BYTES = 3 << 30  # of memory
_MOST_WAIT = 600.0  # seconds without another page, computing or not
_LENGTH = struct.Struct(">Q")
_START = "from nectar_mlx.documents.worker import serve; serve()"


class _Worker:
    """The process; it is started when it is first needed, and again after it had to be stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, data: bytes, name: str) -> Document:
        """The document; raises Unreadable also where the reader hangs, takes too much memory or crashes."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, (data, name))
            answer = self._answer(process, process.stdout)
        except (OSError, EOFError) as error:
            self.stop()
            raise Unreadable("a damaged file that its reader cannot stand") from error
        except BaseException:
            self.stop()
            raise
        if isinstance(answer, str):
            raise Unreadable(answer)
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            folder = str(Path(__file__).parents[2])
            paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START],  # -P: a file in the current folder is no module,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # what lies in a buffer is not seen by select
                env=os.environ | {"PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the program, which then stops this process
            )
            assert self._process.stdout is not None
            _receive(self._process.stdout)  # it has started
        return self._process

    def _answer(self, process: "subprocess.Popen[bytes]", stdout: IO[bytes]) -> Document | str:
        """Waits for the answer, as long as there is another page within the limits."""
        measured = psutil.Process(process.pid)
        page, computed, since = 0, _computed(measured), time.monotonic()
        while True:
            if select.select([stdout], [], [], 0.1)[0]:
                message = _receive(stdout)
                if isinstance(message, Document | str):
                    return message
                page, computed, since = message, _computed(measured), time.monotonic()
            if _computed(measured) - computed > SECONDS or time.monotonic() - since > _MOST_WAIT:
                raise Unreadable(f"page {page + 1} takes more than {SECONDS:g} seconds to read")
            if measured.memory_info().rss > MOST_BYTES:
                raise Unreadable(f"page {page + 1} takes more than {MOST_BYTES / 1e9:.1f} GB of memory to read")


def _computed(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error as error:
        raise EOFError from error
    return float(times.user + times.system)


@lru_cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.stop)
    return worker


def parse(data: bytes, name: str) -> Document:
    """The document that these bytes are, read in the other process; raises Unreadable."""
    return _worker().parse(data, name)


def serve() -> None:
    """What the other process does: reads files from its input until that ends."""
    from nectar_mlx.documents import pdf
    from nectar_mlx.documents.formats import parse

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    pdf.page_read = lambda number: _send(answers, number)
    _send(answers, 0)
    while True:
        try:
            data, name = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, parse(data, name))
        except Unreadable as error:
            _send(answers, str(error))


def _end_with(parent: int) -> None:
    """Ends this process, whatever it is at, when the program that started it was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _send(pipe: IO[bytes], message: object) -> None:
    data = pickle.dumps(message)
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[pipe.write(rest) :]
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    head = _exactly(pipe, _LENGTH.size)
    return pickle.loads(_exactly(pipe, _LENGTH.unpack(head)[0]))


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = pipe.read(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
