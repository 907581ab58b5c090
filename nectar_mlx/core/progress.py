"""How library code reports on its work. The caller passes a `Progress` for bars and a `Log` for lines; both are silent
by default. The command line's own are in `nectar_mlx.cli`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

_LAST = 0.99  # what is shown while something is still under way, at most
_PRIOR = 0.005  # of the expected time, for which the expectation counts as much as what was seen

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
    elapsed, total_seconds: of the whole task so far, and at its end as far as is known (None: it is not)."""

    description: str
    stage: int
    stages: int
    done: int
    total: int
    share: float
    elapsed: float
    total_seconds: float | None


class Overall:
    """A `Progress` that makes one of all stages of a task. Once it is told what to expect it estimates the end: by the
    expectation at first, later by how much slower or faster the stages went than expected."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._start = clock, clock()
        self._stages, self._at = list[Stage](), -1
        self._done = self._total = 0
        self._shown = 0.0

    def expect(self, stages: Sequence[Stage]) -> None:
        """The stages that follow those so far, in their order. One that is left out takes no time."""
        self._stages[self._at + 1 :] = stages

    @contextmanager
    def __call__(self, description: str, total: int, /) -> Iterator[Update]:
        self._enter(description)
        self._done, self._total = 0, total
        yield self._update
        self._done = self._total = max(total, 1)

    def _update(self, done: int) -> None:
        self._done = done

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
        elapsed = self._clock() - self._start
        part = min(1.0, self._done / max(1, self._total))
        expected = sum(stage.seconds for stage in stages)
        behind = sum(stage.seconds for stage in stages[: max(at, 0)])
        behind += part * stages[at].seconds if at >= 0 else 0.0
        left = share = None
        if expected:
            prior = _PRIOR * expected
            left = (expected - behind) * (elapsed + prior) / (behind + prior)
            share = elapsed / (elapsed + left) if elapsed + left else 0.0
        elif stages:
            share = (max(at, 0) + part) / len(stages)
            left = elapsed / share - elapsed if len(stages) == 1 and share > _PRIOR else None
        self._shown = max(self._shown, min(_LAST, share or 0.0))
        return Status(
            description=stages[at].description if at >= 0 else "",
            stage=at + 1,
            stages=len(stages),
            done=self._done,
            total=self._total,
            share=self._shown,
            elapsed=elapsed,
            total_seconds=None if left is None else elapsed + left,
        )


def silent(description: str, total: int, /) -> AbstractContextManager[Update]:
    """The `Progress` that shows nothing."""
    return nullcontext(no_update)


def no_update(done: int) -> None:
    """The `Update` that shows nothing."""


def no_log(line: str) -> None:
    """The `Log` that drops its lines."""
