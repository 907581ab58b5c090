"""Files and folders that appear whole or not at all."""

import fcntl
import glob
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import NectarError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears whole, on the disk, or leaves what was there; `write` gets the open file.

    Only the user may read it, whatever the umask: most files hold a text, in some form.

    What a killed writer of the same file left is removed. NectarError where it cannot be written.
    """
    temporary, prefix = None, _prefix(path)
    try:
        _remove_abandoned(path.parent, prefix)
        handle, temporary = _own(lambda: tempfile.mkstemp(dir=path.parent, prefix=prefix))
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(handle)
            temporary.replace(path)  # while it is locked: no other writer takes it for abandoned
    except OSError as error:
        raise NectarError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the name is safe once its folder is on the disk; not every file system can promise that
        _sync_folder(path.parent)


def _prefix(path: Path) -> str:
    """What the names of a file's temporary files begin with; short, whatever its own name is."""
    return f".nectar-{zlib.crc32(path.name.encode()):08x}-"


def _own(make: Callable[[], tuple[int, str]]) -> tuple[int, Path]:
    """A temporary file or folder that is locked as long as its writer lives: open, and its path. make: opens one."""
    while True:
        handle, name = make()
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # else another writer was faster than the lock, and took it for abandoned
            return handle, Path(name)
        os.close(handle)


def _new_folder(parent: Path, prefix: str) -> tuple[int, str]:
    """As `tempfile.mkstemp`; another one where a writer took it for abandoned before it was open."""
    while True:
        name = tempfile.mkdtemp(prefix=prefix, dir=parent)
        with suppress(FileNotFoundError):
            return os.open(name, os.O_RDONLY), name


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Removes temporary files and folders whose writer was killed: those that nobody has locked."""
    for path in folder.glob(glob.escape(prefix) + "?" * 8):  # as `tempfile` names them
        with suppress(OSError), locked(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, a file or folder is this process's; BlockingIOError where it is another's. Ends with the process."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # to lock a file, NFS wants to write
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `folder` when the block ends well; of two processes the first one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    _remove_abandoned(folder.parent, prefix)
    handle, scratch = _own(lambda: _new_folder(folder.parent, prefix))
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def free_space(folder: Path) -> int:
    """Bytes that can still be written there."""
    return shutil.disk_usage(folder).free
