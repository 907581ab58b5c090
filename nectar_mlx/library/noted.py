"""How far a fit is, written down for other processes: a server shows what `nectar add` does."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..core.progress import Overall, Progress, Update
from ..errors import NectarError
from .database import Database

_EVERY = 0.5  # seconds between two notes


class Noted(Overall):
    """Reports to `progress`, and notes the share of the whole fit in the database."""

    def __init__(self, database: Database, volume: str, progress: Progress):
        super().__init__()
        self._database, self._volume, self._progress = database, volume, progress
        self._written = 0.0

    @contextmanager
    def __call__(self, description: str, total: int, /) -> Iterator[Update]:
        with super().__call__(description, total) as count, self._progress(description, total) as show:

            def update(done: int) -> None:
                count(done)
                show(done)
                self._note()

            self._note()
            yield update

    def _note(self) -> None:
        now = time.monotonic()
        if now - self._written < _EVERY:
            return
        self._written, status = now, self.status()
        left = None if status.total_seconds is None else status.total_seconds - status.elapsed
        row = (self._volume, status.description, status.share, left)
        with suppress(NectarError), self._database.writing() as rows:  # no fit fails for it
            rows.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?)", row)


def progress_of(rows: sqlite3.Connection) -> dict[str, tuple[str, float, float | None]]:
    """For each volume: the stage of its fit, the share that is done, and the seconds that are left, None where that is
    not known. Of fits that ended, too."""
    return {volume: (stage, share, left) for volume, stage, share, left in rows.execute("SELECT * FROM progress")}
