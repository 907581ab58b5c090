"""What the commands with --plot share: matplotlib, where it is installed, and a picture that is written in the end."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import NectarError
from . import extras


def check(path: Path) -> None:
    """NectarError where no picture can be drawn, before the work that it is to show."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NectarError(f"--plot needs matplotlib: {extras.install('plot')}")
    if not path.resolve().parent.is_dir():
        raise NectarError(f"{path}: there is no such folder")


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
    """pyplot's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, **options)


def save(figure: Any, path: Path) -> None:
    """Writes a picture as what its name ends with, .png or .svg; NectarError if it cannot be written."""
    from matplotlib import pyplot

    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise NectarError(f"cannot write {path}: {error}") from None
    finally:
        pyplot.close(figure)
