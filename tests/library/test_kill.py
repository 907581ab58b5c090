"""`add`, killed at random moments and run again, gives the same library."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nectar_mlx.library import Library
from tests import toys


def contents(library):
    """Every file of the volumes, and every row but for times."""
    files = {path.name: path.read_bytes() for path in library.folder.path.rglob("*.nectar")}
    with library._database.reading() as rows:
        tables = {
            name: sorted(rows.execute(f"SELECT {columns} FROM {name}").fetchall())
            for name, columns in {
                "files": "path, sha256, reason, missing, (SELECT hash FROM texts WHERE id = text)",
                "texts": "hash, kind, characters, passages, text, places, left_out, alone",
                "postings": "word, (SELECT hash FROM texts WHERE id = text), passages",
                "volumes": "id, model, model_sha256, tokenizer_sha256, state, owner, reason",
                "members": "volume, (SELECT hash FROM texts WHERE id = text), position",
                "roots": "*",
                "ignored": "*",
                "settings": "*",
            }.items()
        }
    others = sorted(str(path.relative_to(library.folder.path)) for path in library.folder.path.rglob("*"))
    return files, tables, [name for name in others if not name.startswith("library.db")]


@pytest.mark.process
@pytest.mark.parametrize(
    "fitter, kills",
    [("cheap", 3), *(pytest.param(fitter, 20, marks=pytest.mark.slow) for fitter in ("cheap", "toy"))],
)
def test_killed_at_random_moments(tmp_path, notes, fitter, kills):
    model = tmp_path / "toy"
    if fitter == "toy":
        toys.save_model(toys.toy("llama"), model, toys.tokenizer())

    def add(library):
        how = str(model) if fitter == "toy" else "0.1"
        return [sys.executable, "-m", "tests.library.cheap", str(tmp_path / library), str(notes), how]

    (notes / "broken.pdf").write_bytes(b"%PDF-1.4 no more")
    (notes / "deep" / "worse.md").write_text("unfittable")
    start = time.monotonic()
    subprocess.run(add("whole"), check=True)
    whole = time.monotonic() - start
    draw, killed = random.Random(5), 0
    for _ in range(10 * kills):
        process = subprocess.Popen(add("killed"))
        time.sleep(draw.uniform(0.1, 1) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if killed == kills:
            break
        if draw.random() < 0.3:  # begin anew, so that every stage is met
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    assert killed == kills
    subprocess.run(add("killed"), check=True)
    assert contents(Library(tmp_path / "killed")) == contents(Library(tmp_path / "whole"))
