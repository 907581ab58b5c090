"""Where the library keeps what it made once: converted models, the BLAS for Linux."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """NECTAR_CACHE, else nectar_mlx in the user's cache folder."""
    if chosen := os.environ.get("NECTAR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nectar_mlx"


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `folder` when the block ends well; of two processes the first one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
