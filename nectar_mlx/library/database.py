"""The library's state: one SQLite file in WAL mode, which any number of threads and processes may use at once.

A transaction is whole on the disk or has not happened, also when its process is killed. Paths are kept as the bytes
that the file system has.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NectarError

VERSION = 1
_WAIT = 60.0  # seconds for another process's transaction
_SCHEMA = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
-- What `update` reads again: folders and single files, as they were given.
CREATE TABLE roots (path BLOB PRIMARY KEY, include TEXT NOT NULL, exclude TEXT NOT NULL);
-- Removed by hand: scans of a folder leave them aside.
CREATE TABLE ignored (path BLOB PRIMARY KEY);
-- The text of one or several equal documents. places: JSON of `documents.Place`s. alone: not to be grouped.
CREATE TABLE texts (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, characters INTEGER NOT NULL,
    passages INTEGER NOT NULL, text BLOB NOT NULL, places TEXT NOT NULL, left_out TEXT NOT NULL,
    alone INTEGER NOT NULL DEFAULT 0
);
-- reason: why a file cannot be read; its text is NULL then. used: seconds since 1970, of the last question. former:
-- its text before a change, until it is fitted: the old volume is then brought up to date.
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, sha256 TEXT NOT NULL,
    text INTEGER REFERENCES texts (id), reason TEXT NOT NULL DEFAULT '', missing INTEGER NOT NULL DEFAULT 0,
    used REAL NOT NULL DEFAULT 0, former INTEGER
);
CREATE INDEX files_text ON files (text);
-- passages: of that text which hold the word, as uint32.
CREATE TABLE postings (
    word TEXT NOT NULL, text INTEGER NOT NULL REFERENCES texts (id), passages BLOB NOT NULL, PRIMARY KEY (word, text)
) WITHOUT ROWID;
CREATE INDEX postings_text ON postings (text);
-- A .nectar each. state: waiting, fitting (by owner), done, failed (for a reason).
CREATE TABLE volumes (
    id TEXT PRIMARY KEY, model TEXT NOT NULL, model_sha256 TEXT NOT NULL, tokenizer_sha256 TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting', owner TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE members (
    volume TEXT NOT NULL REFERENCES volumes (id) ON DELETE CASCADE, text INTEGER NOT NULL REFERENCES texts (id),
    position INTEGER NOT NULL, PRIMARY KEY (volume, text)
) WITHOUT ROWID;
CREATE INDEX members_text ON members (text);
PRAGMA user_version = {VERSION};
"""
# Added later: databases of this version may be without them.
_ADDED = """
-- How far the fit of a volume is; share: of all of it.
CREATE TABLE IF NOT EXISTS progress (
    volume TEXT PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE, stage TEXT NOT NULL, share REAL NOT NULL,
    seconds_left REAL
);
-- What the file of a volume calls its documents.
CREATE TABLE IF NOT EXISTS named (
    volume TEXT PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE, names TEXT NOT NULL
);
-- The size and the time of change of a volume's file when it was last found whole.
CREATE TABLE IF NOT EXISTS whole (
    volume TEXT PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE, size INTEGER NOT NULL, mtime INTEGER NOT NULL
);
"""


class Database:
    """Connections to one file, one a thread. Errors of SQLite become one line each."""

    def __init__(self, path: Path):
        """Makes the file, readable by its owner alone, where there is none. NectarError where it cannot be used."""
        self.path = path
        self._local = threading.local()
        with self._explained():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            with self.writing() as rows:
                found = rows.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    _make(rows, _SCHEMA)
                elif found != VERSION:
                    raise NectarError(f"{path} was made by another version of nectar: remove it, and add again")
                _make(rows, _ADDED)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent state, whatever others write meanwhile."""
        with self._transaction("DEFERRED") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other one writes beside. All of it is kept, or nothing if the block raises."""
        with self._transaction("IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        with self._explained():
            connection = self._connection()
            if connection.in_transaction:  # within another one
                yield connection
                return
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # not where SQLite has ended it, as on a full disk
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Of this thread."""
        connection = vars(self._local).pop("connection", None)
        if connection is not None:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
            _use_wal(connection)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")  # what is removed is gone from the file
            self._local.connection = connection
        return connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise NectarError(f"the library's database {self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            self.close()
            raise NectarError(
                f"the library's database {self.path} is damaged ({error}): remove it and add the folders again; the "
                "fitted files beside it are found again"
            ) from error
        except OSError as error:
            raise NectarError(f"the library {self.path.parent} cannot be used: {error.strerror or error}") from error


def _make(rows: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";\n"):
        rows.execute(statement)


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait here by itself where another process makes the same change."""
    for _ in range(100):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(0.05)


def path_bytes(path: str | Path) -> bytes:
    """The absolute path as the file system has it; links are not followed."""
    return os.fsencode(os.path.abspath(os.path.expanduser(path)))


def shown(path: bytes) -> str:
    """A path for a person: what is no text, or would change the terminal, is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in path.decode(errors="replace"))
