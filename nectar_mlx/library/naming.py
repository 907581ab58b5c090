"""What documents are called today, in the files that were fitted to them: a renamed document is not fitted again.

Only what a file says of its text is written anew. The names that head the texts of several documents in one file are
tokens of its text, and stay.
"""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import NectarError
from . import whole
from .database import Database, shown
from .folder import Folder

_OF_TEXT = "(SELECT min(path) FROM files WHERE files.text = texts.id)"  # the first file with a text


@dataclass
class _Volume:
    """A finished one. names: of its documents today. characters: of their texts."""

    id: str
    names: list[str] = field(default_factory=list)
    characters: int = 0


def rename_all(database: Database, folder: Folder) -> None:
    """Brings the names in the files of all finished volumes up to date. A damaged file is left for `Library.update`.
    NectarError where the disk is full."""
    with database.reading() as rows:
        due = _due(rows)
    if due:
        with database.writing() as rows:  # before a file is another one: a kill may come between
            for volume in due:
                forget(rows, volume.id)
    for volume in due:
        with database.writing() as rows:  # nobody removes it meanwhile
            if volume in _due(rows, volume.id):
                with suppress(_Damaged):
                    _rename(rows, folder, volume)
                    note(rows, volume.id, volume.names)


def note(rows: sqlite3.Connection, volume: str, names: Sequence[str]) -> None:
    """Writes down what the file of a volume calls its documents."""
    rows.execute("INSERT OR REPLACE INTO named VALUES (?, ?)", (volume, json.dumps(names)))


def forget(rows: sqlite3.Connection, volume: str) -> None:
    """It is not known any more what the file of a volume calls its documents."""
    rows.execute("DELETE FROM named WHERE volume = ?", (volume,))


def names_of(rows: sqlite3.Connection, texts: Sequence[int]) -> list[str]:
    """The names of documents by their texts."""
    return [_name(rows.execute(f"SELECT {_OF_TEXT} FROM texts WHERE id = ?", (text,)).fetchone()[0]) for text in texts]


def source(names: Sequence[str]) -> str:
    """What a file says that its text is."""
    return ", ".join(names)


def _due(rows: sqlite3.Connection, volume: str | None = None) -> list[_Volume]:
    """The volumes, or that one, whose files may call their documents something else than these are called."""
    found: dict[str, _Volume] = {}
    query = (
        f"SELECT volume, {_OF_TEXT}, characters FROM members JOIN volumes ON volume = volumes.id "
        "JOIN texts ON members.text = texts.id WHERE state = 'done' AND volume = coalesce(?, volume) "
        "ORDER BY volume, position"
    )
    for id, path, characters in rows.execute(query, (volume,)):
        one = found.setdefault(id, _Volume(id))
        one.names.append(_name(path))
        one.characters += characters
    noted = rows.execute("SELECT volume, names FROM named WHERE volume = coalesce(?, volume)", (volume,))
    known = dict(noted.fetchall())
    # A text that is in no file any more has no name: its volume is about to be replaced.
    return [one for one in found.values() if all(one.names) and known.get(one.id) != json.dumps(one.names)]


def _name(path: bytes | None) -> str:
    return shown((path or b"").rpartition(b"/")[2])


class _Damaged(Exception):
    """A file cannot be read."""


def _rename(rows: sqlite3.Connection, folder: Folder, volume: _Volume) -> None:
    from .. import store  # with MLX, which most uses of a library can do without
    from ..documents import record

    path, said = folder.volume(volume.id), source(volume.names)
    try:
        if store.source(path) == said:
            return
        tensors, metadata = store.read(path)
        report = record.renamed(metadata["report"], volume.names, characters=volume.characters)
    except (NectarError, KeyError, TypeError, ValueError) as error:
        raise _Damaged from error
    store.write(folder.work(volume.id) / path.name, tensors, metadata | {"source": said, "report": report})
    folder.publish(volume.id)
    whole.note(rows, volume.id, whole.stamp_of(path))
