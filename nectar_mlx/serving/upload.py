"""Files that come from the page: written into a folder of the library as they arrive, for their owner alone."""

import filecmp
import os
import tempfile
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import IO

from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .web import Sender, body_pieces, headers_of

MAX_UPLOAD = 200_000_000  # bytes
_SECONDS = 600.0  # for a file to arrive
_AT_A_TIME = 8
_LONGEST = 180  # bytes of a name, which leaves room for a number and for `.partial` and the like


class Upload:
    """The body of `PUT …/{name}` becomes a file of this name; there is no form, so that no page elsewhere can send one.

    folder: where it is kept. take: is called with its path, which has another number where the name was taken.
    """

    def __init__(self, folder: Path, take: Callable[[Path], None]):
        self._folder, self._take, self._open = folder.absolute(), take, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Sender(send)
        try:
            path = await self._receive(_safe(scope["path_params"]["name"]), scope, receive)
        except ApiError as error:
            return await reply.json(error.status, error.body, headers_of(error))
        self._take(path)
        await reply.json(202, {"name": path.name})

    async def _receive(self, name: str, scope: Scope, receive: Receive) -> Path:
        if self._open >= _AT_A_TIME:
            raise ApiError(429, "too many files at a time: try again in a moment", code="busy")
        self._open += 1
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".") as file:  # 0600
                async with aclosing(body_pieces(scope, receive, MAX_UPLOAD, seconds=_SECONDS)) as pieces:
                    async for piece in pieces:
                        file.write(piece)
                file.flush()
                return _keep(file, self._folder, name)
        except OSError as error:
            raise ApiError(507, f"{name} cannot be kept: {error.strerror or error}", code="cannot_be_kept") from None
        finally:
            self._open -= 1


def _keep(file: IO[bytes], folder: Path, name: str) -> Path:
    """Gives a file its name, with a number where another one has it, unless that has the same contents."""
    stem, suffix = Path(name).stem, Path(name).suffix
    for number in range(1, 10_000):
        path = folder / (name if number == 1 else f"{stem} ({number}){suffix}")
        with suppress(FileExistsError):
            os.link(file.name, path)
            return path
        if filecmp.cmp(file.name, path, shallow=False):
            return path
    raise ApiError(409, f"there are too many files named {name}", code="conflict")


def _safe(name: str) -> str:
    """A file's name without folders, control characters and leading dots; ApiError where nothing is left."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(c for c in last if c.isprintable()).strip().lstrip(".")
    stem, suffix = Path(kept).stem, Path(kept).suffix[:20]
    while len(f"{stem}{suffix}".encode(errors="replace")) > _LONGEST:
        stem = stem[:-1]
    if not stem:
        raise ApiError(400, "the file has no name", code="invalid_value", param="name")
    return f"{stem}{suffix}"
