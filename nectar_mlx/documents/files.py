"""Which files a list of paths stands for: folders in natural order, each file once, hidden ones left aside."""

import io
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nectar_mlx.documents.reading import Unreadable
from nectar_mlx.errors import NectarError

MAX_FILE = 1 << 30
_IGNORED = re.compile(r"\.|~\$|__MACOSX$|Thumbs\.db$|desktop\.ini$|.*~$", re.IGNORECASE)
# Folders that a Mac shows as one file, and why they are not read; Books keeps e-books unpacked.
_PACKAGES = {
    ".epub": "",
    ".pages": "an Apple Pages file; export it as .docx",
    ".numbers": "an Apple Numbers file; export it as .xlsx",
    ".key": "an Apple Keynote file; export it as .pptx",
    ".app": "a program",
    ".photoslibrary": "the pictures of Photos",
    ".musiclibrary": "the music of Music",
}
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|www\.", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A file to be read: its name in the report, and its path (None: standard input)."""

    name: str
    path: Path | None
    reason: str = ""

    def bytes(self) -> bytes:
        """What is in it; raises Unreadable with the reason why it cannot be read."""
        if self.reason:
            raise Unreadable(self.reason)
        if self.path is None:
            return sys.stdin.buffer.read()
        try:
            if self.path.is_dir():
                return _zipped(self.path)
            size = self.path.stat().st_size
            if size > MAX_FILE:
                raise Unreadable(f"larger than {MAX_FILE / 1e9:.1f} GB")
            if not size:  # what the system shows as files has no size, and may be without end
                return b""
            return self.path.read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error


def _zipped(folder: Path) -> bytes:
    """The zip file that a folder stands for."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if sum(file.stat().st_size for file in files) > MAX_FILE:
        raise Unreadable(f"larger than {MAX_FILE / 1e9:.1f} GB")
    data = io.BytesIO()
    # A zip file has no times before 1980, and no names that are no text: neither matters here.
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for file in files:
            name = os.fsencode(file.relative_to(folder).as_posix())
            archive.write(file, name.decode(errors="replace"))
    return data.getvalue()


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
    if is_folder and path.suffix.lower() in _PACKAGES:
        yield Source(shown(path.name), path, _PACKAGES[path.suffix.lower()])
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


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[tuple[Path, str]]:
    """The files below a folder with the reason why one cannot be read; each folder is entered once."""
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
        if entry.is_dir() and entry.suffix.lower() in _PACKAGES:
            yield entry, _PACKAGES[entry.suffix.lower()]
        elif entry.is_dir() and entry.name.removesuffix("_files") in pages:
            yield entry, "the pictures and scripts of a saved page"
        elif entry.is_dir():
            yield from _walk(entry, visited)
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
