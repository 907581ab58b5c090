"""How far a fit is, written down for other processes: a server shows what `nectar add` does."""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..core.progress import Overall, Progress, Stage, Update
from ..errors import NectarError
from .database import Database

_EVERY = 0.5  # seconds between two notes


class Noted(Overall):
    """Of the fit of one volume: reports to `progress`, and notes the share of the whole fit in the database."""

    def __init__(
        self, database: Database, volume: str, progress: Progress, *, part: str = "", later: Sequence[Stage] = ()
    ):
        """part: of all that is to be fitted, for a person. later: what is fitted after this volume."""
        super().__init__()
        self._database, self._volume, self._progress = database, volume, progress
        self._of_all, self._later = part, later
        self._written = 0.0

    def expect(self, stages: Sequence[Stage], *, part: str = "") -> None:
        super().expect(stages, part=part)
        if isinstance(self._progress, Overall):
            self._progress.expect([*stages, *self._later], part=self._of_all)

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
