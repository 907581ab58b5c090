"""What a class of modules does, told from its source."""

import inspect
import sys
from functools import cache

import mlx.nn as nn


@cache
def mentions(kind: type[nn.Module], *names: str) -> bool:
    """Whether the source of a class has all these names.

    Finding a class in its file means parsing that, which takes longer than a small model: it is done only where the
    file has the names at all.
    """
    try:
        return all(_has(inspect.getsource(where), names) for where in (sys.modules[kind.__module__], kind))
    except (OSError, TypeError):
        return False


def _has(source: str, names: tuple[str, ...]) -> bool:
    return all(name in source for name in names)
