"""How commands find a server that runs on this machine: a Unix socket in the cache folder, and a note beside it that
says which files it serves. Both are their owner's alone, in a folder that is, too.
"""

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .folders import cache_folder

if TYPE_CHECKING:
    from .types import JsonObject


class Found(NamedTuple):
    """A server's socket, the name under which it serves the wanted file, and the key that it wants."""

    socket: Path
    name: str
    key: str


class LocalSocket:
    """A server's side. `listeners` is what it listens on: one socket, or none where there can be none."""

    def __init__(self, files: Mapping[str, Path], key: str = ""):
        """files: by the name under which they are served."""
        self._path = _folder() / f"{os.getpid()}.sock"
        self.listeners: list[socket.socket] = []
        self.close()  # what an earlier process of this number left
        if not _is_own(self._path.parent):
            return
        with suppress(OSError):  # the path is too long, or the folder cannot be written
            listener = _listen(self._path)
            self.listeners.append(listener)
            served = {name: _identity(path) for name, path in files.items()}
            handle = os.open(self._path.with_suffix(".json"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                json.dump({"files": served, "key": key}, file)

    def close(self) -> None:
        """Removes the traces."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []
        _remove(self._path)


def find(file: Path) -> Found | None:
    """The server that serves a file as it now is; None if none does."""
    try:
        wanted = _identity(file)
    except OSError:
        return None
    folder = _folder(create=False)
    for note in sorted(folder.glob("*.json")) if _is_own(folder) else ():
        with suppress(OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            told = json.loads(note.read_text())
            for name, identity in told["files"].items():
                if identity == wanted:
                    return Found(note.with_suffix(".sock"), name, told["key"])
    return None


def forget(found: Found) -> None:
    """Removes the traces of a server that ended without doing so."""
    _remove(found.socket)


def _remove(path: Path) -> None:
    for each in (path, path.with_suffix(".json")):
        with suppress(OSError):
            each.unlink()


def _identity(path: Path) -> "JsonObject":
    """A file's place, size and time of change: a server does not know what became of the file after it was read."""
    stat = path.stat()
    return {"path": str(path.resolve()), "size": stat.st_size, "changed": stat.st_mtime_ns}


def _folder(*, create: bool = True) -> Path:
    folder = cache_folder() / "servers"
    if create:
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
    return folder


def _is_own(folder: Path) -> bool:
    """Whether a folder is there and this user's: who else can write to it could answer in a server's place."""
    try:
        return folder.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener
