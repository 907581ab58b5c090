"""How library code reports on its work. The caller passes a `Progress` for bars and a `Log` for lines; both are silent
by default. The command line's own are in `nectar_mlx.cli`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

_LAST = 0.99  # what is shown while something is still under way, at most
_PRIOR = 0.02  # of the expected time, for which the expectation counts as much as what was seen
_SEEN = 0.05  # of a stage of which nothing was expected, from which on its end is told

Update: TypeAlias = Callable[[int], None]
"""Takes how much of a stage's total is done."""

Log: TypeAlias = Callable[[str], None]
"""Takes one line for a person."""


class Progress(Protocol):
    """Starts a stage of `total` units; the context manager ends it, and yields the stage's `Update`."""

    def __call__(self, description: str, total: int, /) -> AbstractContextManager[Update]: ...


class Stage(NamedTuple):
    """A stage that is expected, and the seconds that it is expected to take."""

    description: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """How far a task is: stage number `stage` (from 1) of `stages`, and done / total of it. share: of the whole task.
    elapsed, total_seconds: of the whole task so far, and at its end as far as is known (None: it is not). part: of the
    task, to which the stage belongs, for a person; "" where it has no parts."""

    description: str
    stage: int
    stages: int
    done: int
    total: int
    share: float
    elapsed: float
    total_seconds: float | None
    part: str = ""


class Overall:
    """A `Progress` that makes one of all stages of a task. Once it is told what to expect it estimates the end: by the
    expectation at first, later by how much slower or faster the stages went than expected.

    The pace is that of the last report: a report that is late would else move the end, and the next one move it back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._start = clock, clock()
        self._reported = self._start  # when something was last done
        self._expected: float | None = None  # when it was told what to expect: what came before is not in the pace
        self._stages, self._at = list[Stage](), -1
        self._done = self._total = 0
        self._shown = 0.0
        self._part = ""

    def expect(self, stages: Sequence[Stage], *, part: str = "") -> None:
        """The stages that follow those so far, in their order. One that is left out takes no time. part: as in
        `Status`, of the stages from now on."""
        self._stages[self._at + 1 :] = stages
        self._part = part
        if self._expected is None:
            self._expected = self._reported = self._clock()
            self._shown = 0.0  # it was the share of what came before

    @contextmanager
    def __call__(self, description: str, total: int, /) -> Iterator[Update]:
        self._enter(description)
        self._done, self._total, self._reported = 0, total, self._clock()
        yield self._update
        self._done = self._total = max(total, 1)
        self._reported = self._clock()

    def _update(self, done: int) -> None:
        if done != self._done:
            self._done, self._reported = done, self._clock()

    def _enter(self, description: str) -> None:
        for at in range(self._at + 1, len(self._stages)):
            if self._stages[at].description == description:
                # Those in between were left out, as where a fit is resumed.
                self._stages[self._at + 1 : at] = []
                self._at += 1
                return
        same = [stage.seconds for stage in self._stages if stage.description == description]
        self._at += 1
        self._stages.insert(self._at, Stage(description, same[-1] if same else 0.0))

    def status(self) -> Status:
        """May be asked for from another thread."""
        stages, at = list(self._stages), self._at
        elapsed, known = self._clock() - self._start, self._reported - self._start
        part = min(1.0, self._done / max(1, self._total))
        expected = sum(stage.seconds for stage in stages)
        behind = sum(stage.seconds for stage in stages[: max(at, 0)])
        behind += part * stages[at].seconds if at >= 0 else 0.0
        total = share = None
        if expected:
            pace = self._pace(behind, expected)
            later = sum(stage.seconds for stage in stages[at + 1 :])
            total = max(known + pace * (expected - behind), elapsed + pace * later)
            share = elapsed / total if total else 0.0
        elif stages:
            share = (max(at, 0) + part) / len(stages)
            total = max(known / part, elapsed) if len(stages) == 1 and part >= _SEEN else None
        self._shown = max(self._shown, min(_LAST, share or 0.0))
        return Status(
            description=stages[at].description if at >= 0 else "",
            stage=at + 1,
            stages=len(stages),
            done=self._done,
            total=self._total,
            share=self._shown,
            elapsed=elapsed,
            total_seconds=total,
            part=self._part,
        )

    def _pace(self, behind: float, expected: float) -> float:
        """How many seconds those of the expectation take. behind: of it, when something was last done. Machines differ
        by factors, and so do a stage's first moments from the rest: it is a factor that is weighed."""
        spent = self._reported - self._expected if self._expected is not None else 0.0
        return (spent / behind) ** (behind / (behind + _PRIOR * expected)) if behind and spent else 1.0


def silent(description: str, total: int, /) -> AbstractContextManager[Update]:
    """The `Progress` that shows nothing."""
    return nullcontext(no_update)


def no_update(done: int) -> None:
    """The `Update` that shows nothing."""


def no_log(line: str) -> None:
    """The `Log` that drops its lines."""
