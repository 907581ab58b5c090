"""Python processes that import what this one does, and nothing from the folder in which the user happens to be."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "


def module(name: str, *arguments: str) -> list[str]:
    """The command of `python -m name arguments`."""
    return [*_python(f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"), *arguments]


def script(path: str, *arguments: str) -> list[str]:
    """The command of `python path arguments`."""
    return [*_python(f"runpy.run_path({path!r}, run_name='__main__')"), *arguments]


def _python(code: str) -> list[str]:
    return [sys.executable, "-I", "-c", _START + code, json.dumps(_search_path(sys.path))]


def _search_path(path: Sequence[str]) -> list[str]:
    """Where to import from, without the current folder and what is relative to it. Where this package itself was
    imported from comes last: that may be the current folder, too."""
    own = str(Path(__file__).parents[2])
    return [*(folder for folder in path if os.path.isabs(folder) and not _is_here(folder) and folder != own), own]


def _is_here(folder: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(os.getcwd())
