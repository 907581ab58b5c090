"""The library: documents go in, and questions find the one that answers them."""

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.progress import Log, Progress, no_log, silent
from ..core.types import JsonObject
from ..core.words import words
from ..errors import NectarError
from . import index, naming, scan, search, volumes, whole
from .database import Database, path_bytes, shown
from .documents import Document, documents
from .fitter import Fitter
from .folder import Folder, default_folder
from .question_words import question_words
from .routing import LOOKED_AT, WEIGHED, Answers, Candidate, Evidence, Routing, odds, with_answers, with_evidence
from .scan import Root, Scan
from .volumes import Identity
from .work import Work, fit_waiting

_LISTED = 8  # candidates of a routing


@dataclass
class Added:
    """What `add` and `update` did: scan: of the files. work: of the fits."""

    scan: Scan
    work: Work


@dataclass
class Removed:
    """What `remove` did. documents: their paths. waiting: names of documents that shared a file with one of them, and
    have none until the next `update`."""

    documents: list[str]
    waiting: list[str]


class Library:
    """A folder with documents' texts, their fitted files and one database.

    Threads and processes may use it at the same time, through one object or several. A process that is killed leaves
    it whole; the next `add` or `update` goes on with its work.
    """

    def __init__(self, folder: str | Path | None = None):
        """folder: default `default_folder()`; made where there is none. NectarError where it cannot be used."""
        self.folder = Folder(Path(folder).expanduser() if folder is not None else default_folder())
        self._database = Database(self.folder.database)

    @property
    def identity(self) -> Identity | None:
        """The model that its documents are fitted on; None before the first fit."""
        kept = self._setting("identity")
        return Identity(*kept) if isinstance(kept, list) else None

    @property
    def options(self) -> JsonObject:
        """Fields of `FitConfig` for its fits."""
        kept: JsonObject = self._setting("options") or {}
        return kept

    @options.setter
    def options(self, options: JsonObject) -> None:
        self._set("options", options)

    @property
    def is_empty(self) -> bool:
        """Whether no file and no folder was added."""
        return not scan.known_roots(self._database)

    def documents(self) -> list[Document]:
        """All documents, in the order of their paths."""
        identity = self.identity
        with self._database.reading() as rows:
            return documents(rows, identity, self.folder.volumes)

    def text(self, document: Document) -> str:
        """What was read of a document; NectarError where nothing was, or where it is no longer there."""
        with self._database.reading() as rows:
            row = rows.execute("SELECT text FROM texts WHERE id = ?", (document.text,)).fetchone()
        if row is None:
            raise NectarError(f"{document.name}: {document.reason or 'it is no longer in the library'}")
        return zlib.decompress(row[0]).decode()

    def add(
        self,
        paths: Sequence[str | Path],
        fitter: Fitter,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        progress: Progress = silent,
        log: Log = no_log,
    ) -> Added:
        """Reads what is new or changed in files and folders, and fits it. Interrupted, the next call goes on.

        Args:
            paths: files and folders; what changes in them later is for `update`.
            fitter: of a `ModelFitter`'s kind. Its model becomes the library's; what is fitted on another model still
                answers, and `update` fits it anew.
            include, exclude: patterns for files of folders, as in `documents.read`.
            progress, log: whom to report to.

        NectarError for a path that does not exist, and where the disk is full or the database damaged. What cannot be
        read or fitted is in the result, and in `documents()`.
        """
        roots = [Root(path_bytes(path), tuple(include), tuple(exclude)) for path in _checked(paths)]
        scan.add_roots(self._database, roots)
        scanned = scan.scan(self._database, roots, own=self.folder.is_own, progress=progress)
        return Added(scanned, self._fit(fitter, refit=False, progress=progress, log=log))

    def add_in_background(self, paths: Sequence[str | Path], fitter: Fitter, **options: object) -> "Future[Added]":
        """`add` in a thread of its own, while the caller goes on; arguments as there. Its documents can be listed, and
        found by `route`, as soon as they are read."""
        future: Future[Added] = Future()

        def work() -> None:
            try:
                future.set_result(self.add(paths, fitter, **options))  # type: ignore[arg-type]
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._database.close()

        threading.Thread(target=work, name="nectar-library-add", daemon=True).start()
        return future

    def update(self, fitter: Fitter, *, progress: Progress = silent, log: Log = no_log, retry: bool = True) -> Added:
        """Reads all that was ever added again, fits what is new or changed, and then what was fitted on another model:
        the documents that were used last come first. retry: fit again what failed, and what has a damaged file, for
        which all of the model's files are read. Errors as in `add`."""
        scanned = scan.scan(self._database, scan.known_roots(self._database), own=self.folder.is_own, progress=progress)
        if retry:
            with self._database.writing() as rows:
                rows.execute("UPDATE volumes SET state = 'waiting', reason = '' WHERE state = 'failed'")
            if known := self.identity:
                whole.miss_damaged(self._database, self.folder, fitter, known, log)
        return Added(scanned, self._fit(fitter, refit=True, progress=progress, log=log))

    def remove(self, paths: Sequence[str | Path], *, missing: bool = False) -> Removed:
        """Takes documents out: their texts, and the files that hold them.

        paths: files, folders, or names of documents. missing: also all that is gone from the disk. A file is not added
        again with its folder, only by its own path. NectarError for what is not in the library.
        """
        gone: list[bytes] = []
        with self._database.writing() as rows:
            known = [row[0] for row in rows.execute("SELECT path FROM files ORDER BY path")]
            roots = [row[0] for row in rows.execute("SELECT path FROM roots")]
            for given in paths:
                wanted, within = _named(given, known, roots)
                rows.executemany("DELETE FROM roots WHERE path = ?", [(root,) for root in within])
                roots = [root for root in roots if root not in within]
                gone += wanted
            if missing:
                gone += [r[0] for r in rows.execute("SELECT path FROM files WHERE missing ORDER BY path")]
            before = {document.path for document in self.documents() if document.file is not None}
            for path in gone:
                rows.execute("DELETE FROM files WHERE path = ?", (path,))
                if any(path != root and path.startswith(root + b"/") for root in roots):
                    rows.execute("INSERT OR IGNORE INTO ignored VALUES (?)", (path,))
            volumes.forget_texts(rows, at_once=True)
            if identity := self.identity:
                volumes.plan(rows, identity)
            waiting = [d.name for d in self.documents() if d.file is None and d.path in before]
        self._sweep()
        with suppress(NectarError):  # on a full disk the next `add` or `update` does it
            naming.rename_all(self._database, self.folder)  # an equal document may have named the file
        return Removed([shown(path) for path in dict.fromkeys(gone)], waiting)

    def route(self, question: str, *, evidence: Evidence | None = None, answers: Answers | None = None) -> Routing:
        """The documents that answer a question, or the answer that none does: by words; where several are close, by
        what is answered behind their files; where words leave doubt, by how likely the question is behind them.

        Args:
            evidence: how likely the question is behind documents' files.
            answers: the first sentence of the answer behind them. Both take the model; None leaves it out, as do
                questions of more than 1,000 characters. Of longer ones the first 10,000 characters count.
        """
        if len(question) > WEIGHED:
            question, evidence, answers = question[:LOOKED_AT], None, None
        known = [document for document in self.documents() if document.text is not None]
        by_text: dict[int, Document] = {}
        names: dict[int, set[str]] = {}
        for document in known:
            if document.text is not None:
                by_text.setdefault(document.text, document)
                named = words(Path(document.name).stem)
                names.setdefault(document.text, set()).update([*named, *filter(None, map(index.stem, named))])
        with self._database.reading() as rows:
            found = search.matches(rows, question, names)
            candidates = [
                Candidate(by_text[match.text], match.score, _place(rows, by_text[match.text], match, question))
                for match in found[:_LISTED]
            ]
        routing = Routing(candidates, odds(found))
        if answers is not None and routing.close:
            return with_answers(routing, question, answers, self.text)
        return routing if evidence is None else with_evidence(routing, evidence)

    def touch(self, document: Document) -> None:
        """Notes that a question was answered from a document."""
        with self._database.writing() as rows:
            rows.execute("UPDATE files SET used = ? WHERE path = ?", (time.time(), document.path))

    def _fit(self, fitter: Fitter, *, refit: bool, progress: Progress, log: Log) -> Work:
        """Loads the model only if there is something to fit, or if it may be another one."""
        naming.rename_all(self._database, self.folder)
        with self._database.writing() as rows:
            volumes.miss(rows, (v for v in volumes.finished(rows) if not self.folder.volume(v).exists()))
        known = self.identity
        if known is not None and (known.name, known.adapter) == (fitter.name, fitter.adapter) and not refit:
            self._plan(known)
            with self._database.reading() as rows:
                if not any(claim.urgent for claim in volumes.waiting(rows, known)):
                    return Work()
        with self._database.reading() as rows:
            if not volumes.live_texts(rows):
                return Work()
        self._set("identity", list(fitter.identity))
        work = fit_waiting(self._database, self.folder, fitter, refit=refit, progress=progress, log=log)
        naming.rename_all(self._database, self.folder)  # files that were found, not fitted, have the names they had
        return work

    def _plan(self, identity: Identity) -> None:
        with self._database.writing() as rows:
            volumes.plan(rows, identity)
            volumes.forget_texts(rows)
        self._sweep()

    def _sweep(self) -> None:
        with self._database.writing() as rows:  # nobody claims a volume meanwhile
            volumes.sweep(rows, self.folder)

    def _setting(self, name: str) -> Any:
        with self._database.reading() as rows:
            row = rows.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def _set(self, name: str, value: object) -> None:
        with self._database.writing() as rows:
            rows.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value, sort_keys=True)))


def _checked(paths: Sequence[str | Path]) -> Sequence[str | Path]:
    if not paths:
        raise NectarError("nothing to add was given")
    for path in paths:
        if str(path) == "-":
            raise NectarError("a library keeps files and folders: save what comes from standard input to a file first")
    from ..documents import find

    find(paths)  # refuses what does not exist
    return paths


def _named(given: str | Path, known: Sequence[bytes], roots: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The documents, and the roots, that a path or a name means."""
    path = path_bytes(given)
    inside = path + b"/"
    wanted = [p for p in known if p == path or p.startswith(inside)]
    within = [root for root in roots if root == path or root.startswith(inside)]
    if wanted or within:
        return wanted, within
    named = [p for p in known if p.rpartition(b"/")[2] == str(given).encode(errors="surrogateescape")]
    if len(named) > 1:
        raise NectarError(f"{given}: {len(named)} documents have this name: give the path, such as {shown(named[0])}")
    if not named:
        raise NectarError(f"{given} is not in the library: `nectar list` shows what is")
    return named, [root for root in roots if root == named[0]]


def _place(rows: sqlite3.Connection, document: Document, match: search.Match, question: str) -> tuple[str, str] | None:
    """The page, or the like, among those that the match's window touches, with most words of the question."""
    near = [place for place in document.places if place.passages[0] <= match.passage + 1]
    near = [place for place in near if place.passages[1] >= match.passage]
    if not near:
        return None
    text = zlib.decompress(rows.execute("SELECT text FROM texts WHERE id = ?", (match.text,)).fetchone()[0]).decode()
    asked = set(words(question)) - question_words()
    place = max(near, key=lambda place: len(asked & set(words(text[place.start : place.end]))))
    return place.unit, place.name
