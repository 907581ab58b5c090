"""The folders for what is made once (converted models, the BLAS for Linux) and for what was typed."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """NECTAR_CACHE, else nectar_mlx in the user's cache folder."""
    if chosen := os.environ.get("NECTAR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nectar_mlx"


def state_folder() -> Path:
    """Where what a user typed is kept: NECTAR_STATE, else nectar_mlx in the user's state folder."""
    if chosen := os.environ.get("NECTAR_STATE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "nectar_mlx"
