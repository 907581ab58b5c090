"""From files and folders to texts in the database: what is new or changed is read, once; the rest is left alone."""

import hashlib
import json
import os
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import documents
from ..core.progress import Progress, silent
from ..core.words import words
from ..documents import Place
from ..documents.files import Source, find
from ..documents.packages import is_package
from ..documents.reading import Unreadable
from ..errors import NectarError
from . import index
from .database import Database, path_bytes, shown


@dataclass
class Scan:
    """What became of the files of one call: their paths, by what happened to them. failed: with the reason."""

    read: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line."""
        total = len(self.read) + len(self.unchanged) + len(self.failed)
        line = f"{total} files: {len(self.read)} read, {len(self.unchanged)} known"
        for count, what in (
            (len(self.failed), "cannot be read"),
            (len(self.missing), "gone from the disk"),
            (len(self.ignored), "left aside, as they were removed before"),
        ):
            line += f", {count} {what}" if count else ""
        return line


@dataclass(frozen=True)
class Root:
    """A folder or a file that was added, and which files of a folder are meant."""

    path: bytes
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def holds(self, path: bytes) -> bool:
        """Whether a path is this one, or lies below it."""
        return path == self.path or path.startswith(self.path.rstrip(b"/") + b"/")


def add_roots(database: Database, roots: Iterable[Root]) -> None:
    """Remembers what was added. A path that was removed before is taken again if it is named itself."""
    with database.writing() as rows:
        for root in roots:
            patterns = json.dumps(root.include), json.dumps(root.exclude)
            rows.execute("INSERT OR REPLACE INTO roots VALUES (?, ?, ?)", (root.path, *patterns))
            rows.execute("DELETE FROM ignored WHERE path = ?", (root.path,))


def known_roots(database: Database) -> list[Root]:
    with database.reading() as rows:
        found = rows.execute("SELECT path, include, exclude FROM roots ORDER BY path").fetchall()
    return [Root(path, tuple(json.loads(include)), tuple(json.loads(exclude))) for path, include, exclude in found]


def scan(
    database: Database, roots: Sequence[Root], *, own: Callable[[bytes], bool], progress: Progress = silent
) -> Scan:
    """Reads what is new or changed below the roots, a transaction a file; marks what is gone.

    own: whether a path is of the library itself, and so no document. A root that is gone is no error: a drive may be
    away. NectarError where the database cannot be written.
    """
    done = Scan()
    sources = _sources(roots, own)
    with database.reading() as rows:
        ignored = {row[0] for row in rows.execute("SELECT path FROM ignored")}
    with progress("reading", len(sources)) as update:
        for number, (path, source) in enumerate(sources.items()):
            if path in ignored:
                done.ignored.append(shown(path))
            else:
                _take(database, path, source, done)
            update(number + 1)
    _mark_missing(database, roots, sources.keys(), done)
    return done


def _sources(roots: Sequence[Root], own: Callable[[bytes], bool]) -> dict[bytes, Source]:
    found = dict[bytes, Source]()
    for root in roots:
        if not os.path.lexists(root.path):
            continue
        for source in find([Path(os.fsdecode(root.path))], include=root.include, exclude=root.exclude):
            if source.path is not None and not own(path_bytes(source.path)):
                found.setdefault(path_bytes(source.path), source)
    return found


def _take(database: Database, path: bytes, source: Source, done: Scan) -> None:
    """Brings the row of one file up to date."""
    size, mtime = source.stamp()
    with database.reading() as rows:
        known = rows.execute(
            "SELECT size, mtime, sha256, reason, missing FROM files WHERE path = ?", (path,)
        ).fetchone()
    # What could not be opened is tried again: a permission, or the other file that it was the same as, leaves no trace
    # in the file itself.
    was_opened = known and (known[2] or known[3] == source.reason)
    if known and known[:2] == (size, mtime) and was_opened and not known[4]:
        done.unchanged.append(shown(path)) if not known[3] else done.failed.update({shown(path): known[3]})
        return
    sha256, reason, reading = _read(source)
    if known and known[2] == sha256 and known[3] == reason:
        if known[:2] != (size, mtime) or known[4]:
            with database.writing() as rows:
                rows.execute("UPDATE files SET size = ?, mtime = ?, missing = 0 WHERE path = ?", (size, mtime, path))
        done.unchanged.append(shown(path)) if not reason else done.failed.update({shown(path): reason})
        return
    with database.writing() as rows:
        if not _is_wanted(rows, path):
            done.ignored.append(shown(path))
            return
        text = None if reading is None else _insert_text(rows, reading)
        used = _moved_here(rows, path, sha256)
        rows.execute(
            "INSERT INTO files (path, size, mtime, sha256, text, reason, used) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime = excluded.mtime, sha256 = excluded.sha256, "
            "text = excluded.text, reason = excluded.reason, missing = 0, "
            "former = CASE WHEN text IS NOT excluded.text THEN coalesce(former, text) ELSE former END",
            (path, size, mtime, sha256, text, reason, used),
        )
    done.failed.update({shown(path): reason}) if reason else done.read.append(shown(path))


def _is_wanted(rows: sqlite3.Connection, path: bytes) -> bool:
    """Whether nobody has removed it since the scan began."""
    if rows.execute("SELECT 1 FROM ignored WHERE path = ?", (path,)).fetchone():
        return False
    return any(Root(root).holds(path) for (root,) in rows.execute("SELECT path FROM roots"))


def _read(source: Source) -> tuple[str, str, documents.Reading | None]:
    """The sha256 of a file, and either its text or the reason why there is none."""
    path = source.path
    assert path is not None
    try:
        sha256 = source.sha256()
    except Unreadable as error:
        return "", str(error), None
    try:
        return sha256, "", documents.read([path])
    except NectarError as error:
        return sha256, str(error).removeprefix(f"{path}: "), None
    except Exception as error:  # a reader's own fault must not stop the other files
        return sha256, f"its reader fails ({type(error).__name__})", None


def _insert_text(rows: sqlite3.Connection, reading: documents.Reading) -> int:
    """The number of a text, which is indexed if it is new. Texts are told apart by what they say and their places."""
    report = reading.files[0]
    text = reading.text.encode(errors="replace").decode()
    places = json.dumps([[place.unit, place.name, place.start, place.end] for place in report.places])
    digest = hashlib.sha256(f"{text}\0{places}".encode()).hexdigest()
    if row := rows.execute("SELECT id FROM texts WHERE hash = ?", (digest,)).fetchone():
        return int(row[0])
    cursor = rows.execute(
        "INSERT INTO texts (hash, kind, characters, passages, text, places, left_out) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            digest,
            report.kind,
            len(text),
            index.passage_count(text),
            zlib.compress(text.encode()),
            json.dumps(_with_passages(text, report.places)),
            json.dumps(report.left_out),
        ),
    )
    number = int(cursor.lastrowid or 0)
    index.insert(rows, number, text)
    return number


def _with_passages(text: str, places: Sequence[Place]) -> list[list[object]]:
    """Each place with the first and the last of its passages."""
    result, at, count = list[list[object]](), 0, 0
    for place in places:
        count += len(words(text[at : place.start]))
        first, count = count, count + len(words(text[place.start : place.end]))
        at = place.end
        passages = [first // index.PASSAGE, max(first, count - 1) // index.PASSAGE]
        result.append([place.unit, place.name, place.start, place.end, passages])
    return result


def _moved_here(rows: sqlite3.Connection, path: bytes, sha256: str) -> float:
    """Drops the row of a file with this content that is gone, as it was renamed; when it was last used."""
    for other, used in rows.execute(
        "SELECT path, used FROM files WHERE sha256 = ? ORDER BY path", (sha256,)
    ).fetchall():
        if sha256 and other != path and (_is_gone(other) or _is_same(other, path)):
            rows.execute("DELETE FROM files WHERE path = ?", (other,))
            return float(used)
    return 0.0


def _is_gone(path: bytes) -> bool:
    """Whether there is no file any more; a folder in its place is none, unless it is a package."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not is_package(Path(os.fsdecode(path))))


def _is_same(path: bytes, other: bytes | None) -> bool:
    """Whether two paths differ in case, or in how accents are written, alone, and lead to one file: on a Mac a renamed
    file is still found by its old path."""
    try:
        return other is not None and _folded(path) == _folded(other) and os.path.samefile(path, other)
    except OSError:  # one has just gone
        return False


def _folded(path: bytes) -> str:
    return unicodedata.normalize("NFC", os.fsdecode(path).casefold())


def _mark_missing(database: Database, roots: Sequence[Root], found: Iterable[bytes], done: Scan) -> None:
    found = set(found)
    folded = {_folded(path): path for path in found}
    with database.writing() as rows:
        for path, text, missing in rows.execute("SELECT path, text, missing FROM files ORDER BY path").fetchall():
            if path in found or not any(root.holds(path) for root in roots):
                continue
            if _is_gone(path) or _is_same(path, folded.get(_folded(path))):
                done.missing.append(shown(path))
                if text is None:  # nothing was read of it that could be kept
                    rows.execute("DELETE FROM files WHERE path = ?", (path,))
                elif not missing:
                    rows.execute("UPDATE files SET missing = 1 WHERE path = ?", (path,))
