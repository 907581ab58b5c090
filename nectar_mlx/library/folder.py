"""Where a library is, and its files: for their owner's eyes alone.

library.db       the state (`database`)
volumes/         a .nectar for each volume, and what belongs beside it
documents/       what was added without a file of its own on this machine, as from a page
work/            a folder for each fit under way, from which an interrupted one goes on
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from ..errors import NectarError
from .database import path_bytes

_DATABASE = "library.db"
_VOLUME = "[0-9a-f]{32}"  # a volume's name (`volumes.plan`)


def default_folder() -> Path:
    """$NECTAR_LIBRARY, else the system's place for a user's data."""
    if chosen := os.environ.get("NECTAR_LIBRARY"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/nectar/library").expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "nectar" / "library"


def holds_library(path: Path) -> bool:
    """Whether a folder is a library's."""
    return (path / _DATABASE).exists()


class Folder:
    """The files of one library, apart from its database."""

    def __init__(self, path: Path):
        """Makes the folders where they are missing. NectarError where that cannot be done, or where there is another
        folder of this name with something in it."""
        self.path, self.database = path, path / _DATABASE
        self.documents = path / "documents"
        self.volumes, self._work = path / "volumes", path / "work"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_others()
            for folder in (path, self.documents, self.volumes, self._work):
                folder.mkdir(mode=0o700, exist_ok=True)
            path.chmod(0o700)
        except OSError as error:
            raise NectarError(f"the library {path} cannot be made: {error.strerror or error}") from None

    def _refuse_others(self) -> None:
        """A library closes its folder to others, and removes what it does not know."""
        if not self.path.is_dir() or self.database.exists():
            return
        own = {folder.name for folder in (self.documents, self.volumes, self._work)}
        others = (name for name in os.listdir(self.path) if name not in own and not name.startswith("."))
        if (other := next(others, None)) is not None:
            raise NectarError(f"{self.path} is no library and holds other files ({other}): name a folder of its own")

    def volume(self, name: str) -> Path:
        return self.volumes / f"{name}.nectar"

    def is_own(self, path: bytes) -> bool:
        """Whether an absolute path is of the library itself, and no document."""
        inside = path.startswith(path_bytes(self.path) + b"/")
        return inside and not path.startswith(path_bytes(self.documents) + b"/")

    def work(self, name: str) -> Path:
        """A folder for the fit of a volume."""
        folder = self._work / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def check_place(self, name: str) -> None:
        """NectarError where there is a folder in the place of a volume's file."""
        if (place := self.volume(name)).is_dir():
            error = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise NectarError(f"{place} is a folder, where a file of the library belongs; remove it") from error

    def publish(self, name: str) -> None:
        """Moves a fitted volume from its work folder to its place: what belongs beside it first."""
        made = self.work(name)
        output = made / self.volume(name).name
        for file in sorted(made.glob(f"{output.name}*"), key=lambda file: file == output):
            file.chmod(0o600)
            file.replace(self.volumes / file.name)
        shutil.rmtree(made, ignore_errors=True)

    def sweep(self, known: Collection[str], *, unfinished: Collection[str]) -> None:
        """Removes the files of volumes that are not among the known ones, the work on those that are not among the
        unfinished ones, and no other file."""
        files = [(file, known) for file in self.volumes.iterdir()]
        for file, kept in [*files, *((file, unfinished) for file in self._work.iterdir())]:
            name = file.name.partition(".")[0]
            if re.fullmatch(_VOLUME, name) and name not in kept:
                shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
