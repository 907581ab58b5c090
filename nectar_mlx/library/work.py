"""Fitting what waits: one volume after the other, each claimed by one process, whatever becomes of the others."""

import errno
import json
import sqlite3
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.progress import Log, Progress
from ..documents import FileReport, Place, Reading
from ..errors import NectarError
from . import naming, noted, volumes, whole
from .database import Database
from .fitter import Fitter
from .folder import Folder
from .foreseen import Foreseen
from .volumes import Claim

_REMOVED = "removed before it was fitted"
# Of the machine, not of the document: the next one would fail in the same way.
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_FATAL |= {errno.EISDIR}  # a folder in the place of a volume's file


@dataclass
class Work:
    """What was fitted. fitted: names of documents. failed: the same, with reasons. elsewhere: how many volumes another
    process is fitting. later: how many wait for `update`, as an older model's file answers for them."""

    fitted: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0
    later: int = 0

    def summary(self) -> str:
        """One line."""
        line = f"{len(self.fitted)} document{'s' * (len(self.fitted) != 1)} fitted"
        for count, what in (
            (len(self.failed), "failed"),
            (self.elsewhere, "files in the hands of another process"),
            (self.later, "files of an older model, which `nectar update` fits again"),
        ):
            line += f", {count} {what}" if count else ""
        return line


def fit_waiting(
    database: Database, folder: Folder, fitter: Fitter, *, refit: bool, progress: Progress, log: Log
) -> Work:
    """Fits all volumes that nobody works on. refit: also those that an older model's file answers for.

    NectarError for a full disk and the like; a volume that cannot be fitted is noted, and the next one is taken.
    """
    work, identity, foreseen = Work(), fitter.identity, Foreseen(fitter)
    while True:
        with database.writing() as rows:
            volumes.plan(rows, identity)
            volumes.forget_texts(rows)
            volumes.sweep(rows, folder)
            left = [waiting for waiting in volumes.waiting(rows, identity) if refit or waiting.urgent]
            if left:
                volumes.claim(rows, left[0])
                naming.forget(rows, left[0].volume)
                names = naming.names_of(rows, left[0].texts)
        if not left:
            break
        claim = left[0]
        to_go = sum(len(waiting.texts) for waiting in left)
        log(f"fitting {', '.join(names)} ({to_go} document{'s' * (to_go != 1)} to go{foreseen.end(left)})")
        part, later = _part(work, len(names), to_go), foreseen.stages(left[1:])
        noted_to = noted.Noted(database, claim.volume, progress, part=part, later=later)
        started = time.monotonic()
        reason = _fit(database, folder, fitter, claim, names, progress=noted_to)
        if reason is None:
            foreseen.took(claim, time.monotonic() - started)
            work.fitted += names
        else:
            log(f"{', '.join(names)}: {reason}")
            if len(names) == 1 and reason != _REMOVED:
                work.failed[names[0]] = reason
    with database.reading() as rows:
        work.elsewhere = sum(
            volumes.alive(row[0]) for row in rows.execute("SELECT owner FROM volumes WHERE state = 'fitting'")
        )
        work.later = len(volumes.waiting(rows, identity))
    return work


def _part(work: Work, count: int, to_go: int) -> str:
    """Which of all documents the next ones are, counted from 1; "" for all of them."""
    done = len(work.fitted) + len(work.failed)
    if done + to_go == count:
        return ""
    which = f"document {done + 1}" if count == 1 else f"documents {done + 1} to {done + count}"
    return f"{which} of {done + to_go}"


def _fit(
    database: Database, folder: Folder, fitter: Fitter, claim: Claim, names: list[str], *, progress: Progress
) -> str | None:
    """Fits a claimed volume, and writes down how that ended; the reason where it failed, or is not wanted any more."""
    state, reason, wanted, is_new = "waiting", None, True, False
    try:
        folder.check_place(claim.volume)
        if not fitter.is_whole(folder.volume(claim.volume)):  # else its process was killed just before it said so
            made = folder.work(claim.volume)
            with database.reading() as rows:
                former = volumes.former(rows, claim)
            fitter.fit(
                _reading(database, claim, names),
                made / folder.volume(claim.volume).name,
                source=naming.source(names),
                partial=made / "partial",
                progress=progress,
                former=folder.volume(former) if former else None,
            )
            folder.publish(claim.volume)
            is_new = True
        state = "done"
    except Exception as error:
        if _is_fatal(error):
            raise NectarError(str(error) or type(error).__name__) from error
        state, reason = "failed", " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, NectarError):
            reason = f"the fit fails ({type(error).__name__}: {reason})"
    finally:
        with database.writing() as rows:
            written = rows.execute(
                "UPDATE volumes SET state = ?, owner = '', reason = ? WHERE id = ? AND owner = ?",
                (state, reason or "", claim.volume, volumes.owner()),
            )
            wanted = written.rowcount > 0  # else its document was removed, and the volume with it
            if is_new and wanted:
                naming.note(rows, claim.volume, names)
                whole.note(rows, claim.volume, whole.stamp_of(folder.volume(claim.volume)))
            if state == "done":
                rows.executemany("UPDATE files SET former = NULL WHERE text = ?", [(text,) for text in claim.texts])
            if state == "failed" and wanted and len(claim.texts) > 1:  # to find the one that it fails for
                rows.executemany("UPDATE texts SET alone = 1 WHERE id = ?", [(text,) for text in claim.texts])
    return reason if wanted else _REMOVED


def _is_fatal(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, sqlite3.Error) or (isinstance(error, OSError) and error.errno in _FATAL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reading(database: Database, claim: Claim, names: Sequence[str]) -> Reading:
    """Of one document as it was read; several are headed by their names. NectarError where one was removed."""
    with database.reading() as rows:
        found = [
            rows.execute("SELECT kind, text, places FROM texts WHERE id = ?", (t,)).fetchone() for t in claim.texts
        ]
    if None in found:
        raise NectarError(_REMOVED)
    parts, files, length = list[str](), list[FileReport](), 0
    for name, (kind, packed, places) in zip(names, found, strict=True):
        text = zlib.decompress(packed).decode()
        heading = ("\n\n" if parts else "") + (f"# {name}\n\n" if len(names) > 1 else "")
        start = length + len(heading)
        length = start + len(text)
        parts += [heading, text]
        within = [Place(unit, title, start + a, start + b) for unit, title, a, b, _ in json.loads(places)]
        files.append(FileReport(name, kind, len(text), start, length, within))
    return Reading("".join(parts), files)
