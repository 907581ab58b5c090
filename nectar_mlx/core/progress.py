"""What long work tells whoever waits for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# (description, total) -> a context manager that yields what to tell how many of the total are done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def silent(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that nobody sees."""
    return nullcontext(lambda done: None)
