"""A library's documents as a caller sees them."""

import json
import os
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ..core.types import JsonObject
from . import whole
from .database import shown
from .noted import progress_of
from .volumes import Identity, alive
from .whole import Stamp


class Place(NamedTuple):
    """A page, chapter, sheet, slide, mail or cell: characters [start, end) of the text, and the first and the last of
    its passages (`index`)."""

    unit: str
    name: str
    start: int
    end: int
    passages: tuple[int, int]


class FitProgress(NamedTuple):
    """How far a fit is. share: of all of it. seconds_left: None where that is not known."""

    stage: str
    share: float
    seconds_left: float | None


@dataclass(frozen=True)
class Document:
    """One file of the library.

    Attributes:
        path: as the file system has it. name: its last part, for a person.
        state: "ready"; "older model", where its file was fitted on another model than the library's; "waiting" and
            "fitting", where it has no file yet; "failed" and "not read", for a reason, as is "damaged" (`looked_at`).
        reason: why it could not be read or fitted, or what is wrong with its file.
        missing: whether it is gone from the disk. What was read of it stays until it is removed.
        kind: "pdf", "text", ... characters: how many were read. left_out: what was not, and why.
        places: pages, chapters, sheets, slides or mails.
        file: the .nectar that answers for it; None where there is none. model: that it was fitted on. stamp: the file's
            when it was last found whole (`whole`); None where that is not known.
        shared: with how many other documents of the library. number: its place (from 0) among all of them there.
        progress: of the fit that is under way: the share of it that is done, the seconds that are left (None where that
            is not known), and its stage; None where none is.
        used: when a question was last answered from it, in seconds since 1970; 0 for never.
        text: its number in the database; None where it cannot be read. Equal documents have one.
    """

    path: bytes
    state: str
    reason: str
    missing: bool
    kind: str
    characters: int
    left_out: list[str]
    places: list[Place]
    file: Path | None
    model: str
    stamp: Stamp | None
    shared: int
    number: int
    used: float
    text: int | None
    progress: FitProgress | None = None

    @property
    def name(self) -> str:
        return shown(os.path.basename(self.path))

    @property
    def unanswered(self) -> str:
        """Why no file of the library's model answers for it, and what to do, for a person."""
        if self.text is None:
            return f"{self.name} could not be read: {self.reason}"
        if self.state == "fitting":
            return f"{self.name} is being fitted: ask again when that has ended"
        if self.file is not None:
            return f"{self.name} is fitted on an older model: `nectar update` fits it again"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.name} has no fitted file ({self.state}{reason}): `nectar update` fits it"

    def looked_at(self) -> "Document":
        """The same, but "damaged" for a reason where its file is gone, or is not as it was written (`whole.damage`)."""
        if self.file is None:
            return self
        reason = whole.damage(self.file, self.stamp)
        return replace(self, state="damaged", reason=reason) if reason else self

    def as_json(self) -> JsonObject:
        """For `--json`: all but what only the library uses."""
        return {
            "name": self.name,
            "path": shown(self.path),
            "state": self.state,
            "reason": self.reason,
            "missing": self.missing,
            "kind": self.kind,
            "characters": self.characters,
            "left_out": self.left_out,
            "places": len(self.places),
            "file": None if self.file is None else str(self.file),
            "model": self.model,
            "shared": self.shared,
            "used": self.used,
            "progress": None if self.progress is None else self.progress._asdict(),
        }


def documents(rows: sqlite3.Connection, identity: Identity | None, folder: Path) -> list[Document]:
    """All of them, in the order of their paths. identity: the library's model. folder: of the volumes."""
    best, pending = _finished(rows, identity), _unfinished(rows)
    query = (
        "SELECT path, files.text, reason, missing, used, kind, characters, left_out, places FROM files "
        "LEFT JOIN texts ON texts.id = files.text ORDER BY path"
    )
    result = []
    for path, text, reason, missing, used, kind, characters, left_out, places in rows.execute(query):
        volume = best.get(text)
        state, why, progress = pending.get(text, ("waiting", "", None))
        if volume:
            state, why = "ready" if volume.current else "older model", ""
        if text is None:
            state, why = "not read", reason
        result.append(
            Document(
                path=path,
                state=state,
                reason=why,
                missing=bool(missing),
                kind=kind or "",
                characters=characters or 0,
                left_out=json.loads(left_out or "[]"),
                places=[Place(*place) for place in json.loads(places or "[]")],
                file=folder / f"{volume.id}.nectar" if volume else None,
                model=volume.model if volume else "",
                stamp=volume.stamp if volume else None,
                shared=volume.texts - 1 if volume else 0,
                number=volume.number if volume else 0,
                used=used,
                text=text,
                progress=progress,
            )
        )
    return result


class _Volume(NamedTuple):
    """A finished one, as one of its texts sees it. current: whether its model is the library's. texts: how many it
    holds. number: this one's place (from 0) among them. stamp: as of `Document`."""

    id: str
    model: str
    stamp: Stamp | None
    current: bool
    texts: int
    number: int


def _finished(rows: sqlite3.Connection, identity: Identity | None) -> dict[int, _Volume]:
    """For each text with a finished volume the best one."""
    best: dict[int, _Volume] = {}
    stamps = whole.stamps(rows)
    query = (
        "SELECT text, id, model, model_sha256, tokenizer_sha256, "
        "(SELECT count(*) FROM members AS own WHERE own.volume = id), position "
        "FROM volumes JOIN members ON volume = id WHERE state = 'done' ORDER BY volumes.rowid DESC"
    )
    for text, volume, model, model_sha256, tokenizer_sha256, texts, number in rows.execute(query):
        current = identity is None or (model_sha256, tokenizer_sha256) == identity.digests
        if text not in best or (current and not best[text].current):
            best[text] = _Volume(volume, model, stamps.get(volume), current, texts, number)
    return best


def _unfinished(rows: sqlite3.Connection) -> dict[int, tuple[str, str, FitProgress | None]]:
    """For each text in a volume that is not finished: its state, the reason of a failure, and how far the fit is."""
    states: dict[int, tuple[str, str, FitProgress | None]] = {}
    noted = progress_of(rows)
    query = "SELECT text, id, state, owner, reason FROM volumes JOIN members ON volume = id WHERE state != 'done'"
    for text, volume, state, owner, reason in rows.execute(query):
        if state == "fitting" and not alive(owner):
            state = "waiting"
        progress = FitProgress(*noted.get(volume, ("", 0.0, None))) if state == "fitting" else None
        states[text] = state, reason, progress
    return states
