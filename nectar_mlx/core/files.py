"""Files and folders that appear whole or not at all, and the folders for what is made once (converted models, the BLAS
for Linux) and for what was typed."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import NectarError


def cache_folder() -> Path:
    """NECTAR_CACHE, else nectar_mlx in the user's cache folder."""
    if chosen := os.environ.get("NECTAR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nectar_mlx"


def state_folder() -> Path:
    """Where what a user typed is kept: NECTAR_STATE, else nectar_mlx in the user's state folder."""
    if chosen := os.environ.get("NECTAR_STATE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "nectar_mlx"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears whole, on the disk, or leaves what was there; `write` gets the open file.

    NectarError where it cannot be written.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".nectar-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(handle)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's own mode is for the user alone
        temporary.replace(path)
    except OSError as error:
        raise NectarError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the name is safe once its folder is on the disk; not every file system can promise that
        _sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
