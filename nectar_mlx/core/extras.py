"""Optional dependencies: nectar_mlx is on no package index, so what installs them starts from the clone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..errors import NectarError


def install(extra: str) -> str:
    """The command for an extra of pyproject.toml, for a message."""
    return f"pip install '.[{extra}]' in the clone of nectar_mlx"


@contextmanager
def backend_named() -> Iterator[None]:
    """Inside, NectarError for an MLX that lacks the library that computes, which is an extra on Linux."""
    try:
        yield
    except ImportError as error:
        if not _lacks_backend(error):
            raise
        raise NectarError(_no_backend()) from error


def name_backend_outside_main() -> None:
    """For `python -m nectar_mlx.COMMAND`, whose module imports MLX before its `main` can catch anything: the error is
    the line, and the exit code, of `nectar COMMAND`."""

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _lacks_backend(error):
            return sys.__excepthook__(kind, error, trace)
        print(f"nectar {Path(sys.argv[0]).stem}: {_no_backend()}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = say


def _lacks_backend(error: BaseException) -> bool:
    return isinstance(error, ImportError) and "libmlx" in str(error)


def _no_backend() -> str:
    return f"MLX has nothing to compute with: {install('cpu')}, or with an NVIDIA GPU '.[cuda13]'"
