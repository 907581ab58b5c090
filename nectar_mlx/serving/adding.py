"""Documents are read and fitted by `nectar add` in a process of its own, so that the engine's goes on answering."""

import os
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from ..core import isolated
from ..library import Library

_NICE = 10  # how far the process stands back behind this one
_END_SECONDS = 5.0  # that the process gets to end
_LAST = 4_000  # bytes of what it said that are looked at


class Adding:
    """Runs one process at a time; a fit that is interrupted is gone on with by the next one.

    pending: files that wait to be read. message: why the last process failed, "" where it did not.
    """

    def __init__(self, library: Library, model: str, adapter: str | None = None):
        """model, adapter: to fit on, as `--model` and `--adapter` take them."""
        self._options = ["--library", str(library.folder.path.absolute()), "--model", model]
        self._options += ["--adapter", adapter] if adapter else []
        self.message, self.pending = "", list[Path]()
        self._wanted = threading.Condition()
        self._update = self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._work, name="adding", daemon=True).start()

    def add(self, path: Path) -> None:
        """Reads and fits a file, and what else is not fitted yet."""
        with self._wanted:
            self.pending.append(path)
            self._wanted.notify()

    def update(self) -> None:
        """Looks again at all files, and fits what is not fitted yet."""
        with self._wanted:
            self._update = True
            self._wanted.notify()

    @property
    def busy(self) -> bool:
        return self._process is not None or bool(self.pending) or self._update

    def stop(self) -> None:
        """Ends the process that runs; the library stays whole."""
        with self._wanted:
            self._stopped, process = True, self._process
            self._wanted.notify()
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _work(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._stopped or self._update or self.pending)
                if self._stopped:
                    return
                self.pending = _there(self.pending)
                paths = list(self.pending)
            if not paths and not self._update:
                continue
            failed = False
            with tempfile.TemporaryFile() as said:
                try:
                    failed = self._run(paths, said)
                    self.message = _last_line(said) if failed and not self._stopped else ""
                except OSError as error:
                    self.message = f"no process can be started ({error})"
            with self._wanted:
                left = _there(paths)  # one that is removed meanwhile fails all; the others are tried again
                self.pending = (left if failed and len(left) < len(paths) else []) + self.pending[len(paths) :]

    def _run(self, paths: Sequence[Path], said: IO[bytes]) -> bool:
        """Runs `nectar add`, or `nectar update` where there are no paths; whether it failed."""
        command = isolated.module("nectar_mlx.add" if paths else "nectar_mlx.update")
        command += [*map(str, paths), *self._options]
        with self._wanted:
            self._update = self._update and bool(paths)
            if self._stopped:
                return False
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said)
            self._process = process
        try:
            _stand_back(process.pid)
            return process.wait() != 0
        finally:
            self._process = None


def _there(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def _last_line(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _LAST))
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the process that fits has ended"


def _stand_back(process: int) -> None:
    import psutil

    with suppress(psutil.Error):  # it has ended, or may not
        cast("Any", psutil).Process(process).nice(_NICE)
