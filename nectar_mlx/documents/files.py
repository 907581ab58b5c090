"""Which files a list of paths stands for: folders in natural order, each file once, hidden ones left aside."""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nectar_mlx.documents import packages
from nectar_mlx.documents.reading import Unreadable
from nectar_mlx.errors import NectarError

MAX_FILE = 1 << 30
_MOST_DEEP = 200  # folders in folders: Python's own stack has an end
_IGNORED = re.compile(r"\.|~\$|__MACOSX$|Thumbs\.db$|desktop\.ini$|.*~$", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|www\.", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A file to be read: its name in the report, and its path (None: standard input)."""

    name: str
    path: Path | None
    reason: str = ""

    def bytes(self) -> bytes:
        """What is in it; raises Unreadable with the reason why it cannot be read."""
        if self.path is None and not self.reason:
            return sys.stdin.buffer.read()
        path, size = self._looked_at()
        try:
            if path.is_dir():
                return packages.zipped(path)
            return path.read_bytes() if size else b""
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error

    def sha256(self) -> str:
        """Of `bytes`, in hexadecimal digits; raises Unreadable. Not for standard input."""
        path, size = self._looked_at()
        try:
            if path.is_dir() or not size:
                return hashlib.sha256(self.bytes()).hexdigest()
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error

    def stamp(self) -> tuple[int, int]:
        """By what it is known again: its size in bytes, and when it was changed, in ns. (-1, -1) where that cannot be
        seen."""
        try:
            if self.path is None:
                return -1, -1
            if packages.is_package(self.path):
                return packages.stamp(self.path)
            status = self.path.stat()
            return status.st_size, status.st_mtime_ns
        except OSError:
            return -1, -1

    def _looked_at(self) -> tuple[Path, int]:
        """Its path and its size; raises Unreadable. What the system shows as files has no size, and may be without
        end."""
        if self.reason:
            raise Unreadable(self.reason)
        assert self.path is not None
        try:
            size = packages.stamp(self.path)[0] if self.path.is_dir() else self.path.stat().st_size
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error
        if size > MAX_FILE:
            raise Unreadable(f"larger than {MAX_FILE / 1e9:.1f} GB")
        return self.path, size


def find(paths: Sequence[str | Path], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Source]:
    """The files that the paths stand for, in the order given, folders in natural order (2 before 10).

    Args:
        paths: files and folders; "-" is standard input.
        include: patterns (`*.md`, `notes/*`); in folders only what matches one is read.
        exclude: patterns of what is left aside in folders.

    Raises:
        NectarError: a path is a URL or does not exist.
    """
    seen: dict[tuple[int, int], str] = {}
    return [source for path in paths for source in _once(_sources(path, include, exclude), seen)]


def _once(sources: Iterator[Source], seen: dict[tuple[int, int], str]) -> Iterator[Source]:
    for source in sources:
        if source.path is not None and not source.reason:
            try:
                status = source.path.stat()
            except OSError as error:  # gone since the folder was listed
                yield Source(source.name, source.path, f"cannot be read ({error.strerror})")
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                source = Source(source.name, source.path, f"the same file as {seen[identity]}")
            seen.setdefault(identity, source.name)
        yield source


def _sources(given: str | Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Source]:
    if str(given) == "-":
        yield Source("standard input", None)
        return
    if isinstance(given, str) and _URL.match(given):
        raise NectarError(f"{given}: only files and folders are read; save the page to a file first")
    path = Path(given).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except PermissionError as error:
        raise NectarError(f"{shown(str(path))}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError) as error:
        raise NectarError(f"{shown(str(path))}: no such file or folder") from error
    if not exists:
        raise NectarError(f"{shown(str(path))}: no such file or folder")
    if packages.is_package(path):
        yield Source(shown(path.name), path, packages.REASONS[path.suffix.lower()])
        return
    if not is_folder:
        yield Source(shown(path.name), path, "" if path.is_file() else "not a file but a device or a pipe")
        return
    for file, reason in _walk(path, set()):
        name = str(file.relative_to(path))
        if (not include or _matches(name, include)) and not _matches(name, exclude):
            yield Source(shown(name), file, reason)


def shown(name: str) -> str:
    """A name for a person: what is no text, or would change the terminal or the line, is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def _walk(folder: Path, visited: set[tuple[int, int]], depth: int = 0) -> Iterator[tuple[Path, str]]:
    """The files below a folder with the reason why one cannot be read; each folder is entered once. depth: of it."""
    if depth > _MOST_DEEP:
        yield folder, f"the folder lies more than {_MOST_DEEP} folders deep"
        return
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        entries = sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name))
    except OSError as error:
        yield folder, f"the folder cannot be opened ({error.strerror})"
        return
    pages = {entry.stem for entry in entries if entry.suffix.lower() in (".html", ".htm")}
    for entry in entries:
        if _IGNORED.match(entry.name):
            continue
        try:
            entry.is_dir()
        except OSError as error:
            yield entry, f"cannot be read ({error.strerror})"
            continue
        if packages.is_package(entry):
            yield entry, packages.REASONS[entry.suffix.lower()]
        elif entry.is_dir() and entry.name.removesuffix("_files") in pages:
            yield entry, "the pictures and scripts of a saved page"
        elif entry.is_dir():
            yield from _walk(entry, visited, depth + 1)
        elif entry.is_file():
            yield entry, ""
        else:
            yield entry, "a link that leads nowhere" if not entry.exists() else "not a file but a device or a pipe"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path below the folder, the file's name or a folder above it."""
    parts = [name, *Path(name).parts]
    return any(fnmatch(part, pattern.removesuffix("/")) for pattern in patterns for part in parts)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value: "note 2" comes before "note 10"."""
    key: list[tuple[int, str]] = []
    for position, part in enumerate(re.split(r"([0-9]+)", name.casefold())):
        digits = part.lstrip("0")
        key.append((len(digits), digits) if position % 2 else (0, part))
    return [*key, (0, name)]
