"""Volumes: the .nectar files of a library, each of one document, or of several short ones.

Which texts share a volume follows from the texts alone, not from their names or from when they were added: short ones
lie in the order of their hashes, and a group ends where a hash says so, as in content-defined chunking. So one more
note changes one group, a renamed one none, and a library that was filled in another order, or with interruptions, has
the same volumes.

A volume is fitted by the one process that has claimed it. The claim of a process that is gone is void.
"""

import hashlib
import os
import sqlite3
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from .folder import Folder

SHORT = 4_000  # characters of a text that is grouped, at most
GROUP = 16_000  # characters of a group, at most
_ENDS = 8  # one hash in so many ends a group
# Texts that their files had before, of those that are not fitted yet.
_FORMER = "SELECT former FROM files WHERE former IS NOT NULL AND text IS NOT NULL"
_CLOCK = 2.0  # seconds by which the start of a process may seem to change


class Identity(NamedTuple):
    """A model, to the last weight: the name and the adapter that load it, and what its files belong to."""

    name: str
    model_sha256: str
    tokenizer_sha256: str
    adapter: str = ""

    @property
    def digests(self) -> tuple[str, str]:
        return self.model_sha256, self.tokenizer_sha256

    @property
    def described(self) -> str:
        return f"{self.name} with the adapter {self.adapter}" if self.adapter else self.name


@dataclass(frozen=True)
class Text:
    """id: its number in the database. used: when a question was last answered from it, in seconds since 1970."""

    id: int
    hash: str
    characters: int
    alone: bool
    used: float
    path: bytes


def live_texts(rows: sqlite3.Connection) -> list[Text]:
    """The texts of the library's files, each with its first path."""
    query = (
        "SELECT texts.id, hash, characters, alone, max(used), min(path) FROM texts JOIN files ON files.text = texts.id "
        "GROUP BY texts.id ORDER BY min(path)"
    )
    return [Text(i, h, c, bool(alone), used, path) for i, h, c, alone, used, path in rows.execute(query)]


def compose(texts: Iterable[Text]) -> list[tuple[Text, ...]]:
    """The texts of each volume."""
    texts = list(texts)
    volumes: list[tuple[Text, ...]] = [(text,) for text in texts if text.alone or text.characters > SHORT]
    group: list[Text] = []
    for text in sorted((t for t in texts if not t.alone and t.characters <= SHORT), key=lambda t: t.hash):
        if sum(t.characters for t in group) + text.characters > GROUP:
            volumes.append(tuple(group))
            group = []
        group.append(text)
        if int(text.hash[-8:], 16) % _ENDS == 0:
            volumes.append(tuple(group))
            group = []
    return [*volumes, *([tuple(group)] if group else [])]


def volume_id(identity: Identity, texts: Sequence[Text]) -> str:
    """What a volume's file is called: equal texts on an equal model are the same volume."""
    parts = [*identity.digests, *(text.hash for text in texts)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def plan(rows: sqlite3.Connection, identity: Identity) -> None:
    """Lists the volumes that the library's texts should have on a model; drops those that nobody needs any more."""
    live = live_texts(rows)
    wanted = {volume_id(identity, texts): texts for texts in compose(live)}
    known = {row[0] for row in rows.execute("SELECT id FROM volumes")}
    rows.execute("UPDATE volumes SET model = ? WHERE model_sha256 = ? AND tokenizer_sha256 = ?", identity[:3])
    for volume, texts in wanted.items():
        if volume not in known:
            rows.execute(
                "INSERT INTO volumes (id, model, model_sha256, tokenizer_sha256) VALUES (?, ?, ?, ?)",
                (volume, identity.name, *identity.digests),
            )
            holding = [(volume, text.id, position) for position, text in enumerate(texts)]
            rows.executemany("INSERT INTO members VALUES (?, ?, ?)", holding)
    _drop(rows, wanted, live)


def _drop(rows: sqlite3.Connection, wanted: Container[str], live: Sequence[Text]) -> None:
    """A file that is no longer wanted stays as long as it alone answers for some text."""
    needed = {text.id for text in live} | {row[0] for row in rows.execute(_FORMER)}
    known, holding = rows.execute("SELECT id, state, owner FROM volumes").fetchall(), members(rows)
    covered = {text for volume, state, _ in known if state == "done" and volume in wanted for text in holding[volume]}
    for volume, state, owner in known:
        if volume in wanted or (state == "fitting" and alive(owner)):
            continue
        if state != "done" or not (set(holding[volume]) & needed) - covered:
            rows.execute("DELETE FROM volumes WHERE id = ?", (volume,))


def forget_texts(rows: sqlite3.Connection, *, at_once: bool = False) -> None:
    """Drops the texts that no file has; at once: with every volume that holds one of them, else once none does."""
    query = "SELECT id FROM texts WHERE NOT EXISTS (SELECT 1 FROM files WHERE files.text = texts.id)"
    for (text,) in rows.execute(query).fetchall():
        holding = rows.execute("SELECT volume FROM members WHERE text = ?", (text,)).fetchall()
        if at_once:
            rows.executemany("DELETE FROM volumes WHERE id = ?", holding)
        if at_once or not holding:
            rows.execute("UPDATE files SET former = NULL WHERE former = ?", (text,))  # the next text may get its number
            rows.execute("DELETE FROM postings WHERE text = ?", (text,))
            rows.execute("DELETE FROM texts WHERE id = ?", (text,))


def members(rows: sqlite3.Connection) -> dict[str, tuple[int, ...]]:
    """The texts of each volume, in order."""
    found = dict[str, list[int]]()
    for volume, text in rows.execute("SELECT volume, text FROM members ORDER BY volume, position"):
        found.setdefault(volume, []).append(text)
    return {volume: tuple(texts) for volume, texts in found.items()}


def finished(rows: sqlite3.Connection, identity: Identity | None = None) -> list[str]:
    """The volumes that are fitted, or those that are by one model."""
    query = "SELECT id FROM volumes WHERE state = 'done'"
    if identity is None:
        return [row[0] for row in rows.execute(query)]
    return [row[0] for row in rows.execute(f"{query} AND (model_sha256, tokenizer_sha256) = (?, ?)", identity.digests)]


def sweep(rows: sqlite3.Connection, folder: Folder) -> None:
    """Removes the files of volumes that are gone, and what kills have left of the work on those that are finished.

    rows: of a writing transaction, so that nobody claims a volume, or renames its documents, meanwhile.
    """
    states = dict(rows.execute("SELECT id, state FROM volumes").fetchall())
    folder.sweep(states, unfinished={volume for volume, state in states.items() if state != "done"})


def is_known(rows: sqlite3.Connection, volume: str) -> bool:
    """Whether a volume is still there."""
    return _state(rows, volume) != ""


def miss(rows: sqlite3.Connection, lost: Iterable[str]) -> None:
    """Finished volumes whose file is gone, or damaged, are to be fitted again."""
    rows.executemany("UPDATE volumes SET state = 'waiting' WHERE id = ?", [(volume,) for volume in lost])


def former(rows: sqlite3.Connection, claimed: "Claim") -> str | None:
    """The finished volume of the same model that holds what a claimed volume's text was before it was changed."""
    if len(claimed.texts) != 1:
        return None
    query = (
        "SELECT old.id FROM volumes AS old JOIN volumes AS new USING (model_sha256, tokenizer_sha256) "
        "JOIN members ON members.volume = old.id JOIN files ON files.former = members.text "
        "WHERE old.state = 'done' AND new.id = ? AND files.text = ? "
        "AND (SELECT count(*) FROM members WHERE members.volume = old.id) = 1 ORDER BY old.id"
    )
    row = rows.execute(query, (claimed.volume, claimed.texts[0])).fetchone()
    return row[0] if row else None


def answered(rows: sqlite3.Connection) -> set[int]:
    """The texts that a finished volume holds."""
    return {row[0] for row in rows.execute("SELECT text FROM members JOIN volumes ON volume = id WHERE state = 'done'")}


@dataclass(frozen=True)
class Claim:
    """A volume to be fitted by this process. characters: of its texts. urgent: it has no forerunner of the same texts
    on another model."""

    volume: str
    texts: tuple[int, ...]
    characters: int
    urgent: bool


def claim(rows: sqlite3.Connection, waiting: Claim) -> None:
    """Takes one of `waiting`, in the same transaction."""
    rows.execute("UPDATE volumes SET state = 'fitting', owner = ?, reason = '' WHERE id = ?", (owner(), waiting.volume))


def waiting(rows: sqlite3.Connection, identity: Identity) -> list[Claim]:
    """The volumes of a model that are to be fitted and that nobody works on: first those with texts that no file
    answers for, then those of texts put together anew, last those that a file on another model stands for: the most
    recently used first."""
    texts = {text.id: text for text in live_texts(rows)}
    place = {text: number for number, text in enumerate(texts)}
    held, holding = answered(rows), members(rows)
    done = {holding[volume] for volume in finished(rows)}
    ordered = []
    for volume, state, held_by in rows.execute(
        "SELECT id, state, owner FROM volumes WHERE state IN ('waiting', 'fitting') AND model_sha256 = ? "
        "AND tokenizer_sha256 = ?",
        identity.digests,
    ).fetchall():
        own = holding[volume]
        if (state == "fitting" and alive(held_by)) or not all(text in texts for text in own):
            continue
        forerunner = own in done
        used = 0.0 if not forerunner else -max(texts[text].used for text in own)
        rank = (2 if forerunner else int(all(text in held for text in own)), used, min(place[t] for t in own))
        characters = sum(texts[text].characters for text in own)
        ordered.append((rank, Claim(volume, own, characters, urgent=not forerunner)))
    return [candidate for _, candidate in sorted(ordered, key=lambda item: item[0])]


def owner() -> str:
    """This process, told from another of the same number by its start."""
    process = psutil.Process()
    return f"{os.getpid()}:{process.create_time():.2f}"


def alive(held_by: str) -> bool:
    """Whether the process that a claim names still runs."""
    number, _, started = held_by.partition(":")
    try:
        process = psutil.Process(int(number))
        same = abs(process.create_time() - float(started)) < _CLOCK
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.Error):
        return False


def _state(rows: sqlite3.Connection, volume: str) -> str:
    row = rows.execute("SELECT state FROM volumes WHERE id = ?", (volume,)).fetchone()
    return row[0] if row else ""
