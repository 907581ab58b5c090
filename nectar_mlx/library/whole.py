"""Whether the files of volumes are whole, without reading all of them each time.

A file that has the size and the time of change with which it was last found whole is whole as far as its header tells.
Any other is read once, and its bytes are compared with its checksum.
"""

import sqlite3
from functools import lru_cache
from pathlib import Path

from ..core.progress import Log
from ..errors import NectarError
from . import volumes
from .database import Database
from .fitter import Fitter
from .folder import Folder

Stamp = tuple[int, int]
"""A file's size in bytes, and when it was changed, in ns since 1970."""


def stamp_of(file: Path) -> Stamp | None:
    """None where there is no such file."""
    try:
        return _stamp(file)
    except OSError:
        return None


def note(rows: sqlite3.Connection, volume: str, stamp: Stamp | None) -> None:
    """Writes down that the file of a volume was found whole when it had this stamp."""
    if stamp is not None:
        rows.execute("INSERT OR REPLACE INTO whole VALUES (?, ?, ?)", (volume, *stamp))


def stamps(rows: sqlite3.Connection) -> dict[str, Stamp]:
    """Of the volumes' files when they were last found whole."""
    return {volume: (size, mtime) for volume, size, mtime in rows.execute("SELECT volume, size, mtime FROM whole")}


def damage(file: Path, noted: Stamp | None) -> str:
    """What is wrong with a file, for a person; "" for nothing that is seen. noted: its stamp when it was found whole. A
    byte that changed within a tensor and left both as they were is not seen: `miss_damaged` sees it."""
    try:
        stamp = _stamp(file)
        return _damage(file, stamp, stamp != noted)
    except OSError as error:
        return f"its file cannot be read ({error.strerror})"


def _stamp(file: Path) -> Stamp:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(4096)
def _damage(file: Path, stamp: Stamp, thoroughly: bool) -> str:
    """stamp: so that the next state of the file is looked at anew. thoroughly: read all of it, not the header alone.
    OSError where it cannot be read, which is no state of the file: nothing is remembered."""
    from .. import store  # with MLX, which most uses of a library can do without

    try:
        (store.check_whole if thoroughly else store.check_header)(file)
    except NectarError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        reason = error.message.removeprefix(f"{file} is damaged").removeprefix(f"{file}:").lstrip(": ")
        return reason.replace(str(file), "its file")
    return ""


def miss_damaged(database: Database, folder: Folder, fitter: Fitter, identity: volumes.Identity, log: Log) -> None:
    """What the library's model was fitted to is to be fitted again where its file is not whole; all are read.
    identity: of that model."""
    with database.reading() as rows:
        fitted = volumes.finished(rows, identity)
    if not fitted or fitter.identity.digests != identity.digests:
        return
    found = {volume: stamp_of(folder.volume(volume)) for volume in fitted}
    damaged = [volume for volume in fitted if not fitter.is_whole(folder.volume(volume))]
    if damaged:
        log(f"{len(damaged)} of the library's files cannot be read: what they held is fitted again")
    with database.writing() as rows:
        volumes.miss(rows, damaged)
        for volume in set(fitted) - set(damaged):
            if volumes.is_known(rows, volume):  # else it was removed meanwhile
                note(rows, volume, found[volume])
