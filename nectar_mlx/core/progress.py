"""How library code reports on its work. The caller passes a `Progress` for bars and a `Log` for lines; both are silent
by default. The command line's own are in `nectar_mlx.cli`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

Update: TypeAlias = Callable[[int], None]
"""Takes how much of a stage's total is done."""

Log: TypeAlias = Callable[[str], None]
"""Takes one line for a person."""


class Progress(Protocol):
    """Starts a stage of `total` units; the context manager ends it, and yields the stage's `Update`."""

    def __call__(self, description: str, total: int, /) -> AbstractContextManager[Update]: ...


def silent(description: str, total: int, /) -> AbstractContextManager[Update]:
    """The `Progress` that shows nothing."""
    return nullcontext(no_update)


def no_update(done: int) -> None:
    """The `Update` that shows nothing."""


def no_log(line: str) -> None:
    """The `Log` that drops its lines."""
