"""Optional dependencies: nectar_mlx is on no package index, so what installs them starts from the clone."""

from collections.abc import Iterator
from contextlib import contextmanager

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
        if "libmlx" not in str(error):
            raise
        advice = f"{install('cpu')}, or with an NVIDIA GPU '.[cuda13]'"
        raise NectarError(f"MLX has nothing to compute with: {advice}") from error
