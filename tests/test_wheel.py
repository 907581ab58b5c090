"""What is in the wheel; and, with -m slow, that it installs and fits on every Python it says it is for."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests import toys

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        ["uv", "build", "--wheel", "--out-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "nectar_mlx").rglob("*.py")} | {"nectar_mlx/py.typed"}
    package |= {str(p.relative_to(ROOT)) for p in (ROOT / "nectar_mlx/serving/page").iterdir()}
    kernels = {f"nectar_mlx/{p.relative_to(ROOT)}" for p in (ROOT / "metal").iterdir() if p.is_file()}
    assert kernels and package | kernels <= names
    rest = {name for name in names - package - kernels if ".dist-info/" not in name}
    assert all(name.startswith("nectar_mlx/") and not re.search(r"__pycache__|\.pyc$|tests/", name) for name in rest)


def test_it_says_which_pythons_it_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    said = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    assert said == set(PYTHONS)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_it_installs_and_fits(wheel, tmp_path, python):
    made = subprocess.run(["uv", "venv", "--quiet", "--python", python, str(tmp_path / "venv")], capture_output=True)
    if made.returncode:
        pytest.skip(f"Python {python} cannot be had here")
    program = tmp_path / "venv" / "bin"
    extra = "[cpu]" if sys.platform == "linux" else ""
    command = ["uv", "pip", "install", "--quiet", "--python", str(program / "python"), f"{wheel}{extra}"]
    subprocess.run(command, check=True)
    assert subprocess.run([program / "nectar", "--help"], capture_output=True, text=True).stdout.startswith("usage")
    toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    (tmp_path / "text.txt").write_text("The ship sailed at dawn with barley and rope. " * 12)
    options = ["--budget", "30%", "--queries", "500", "--steps", "2", "--output", str(tmp_path / "a.nectar")]
    fit = [program / "nectar", "fit", "--model", str(tmp_path / "model"), "--context", str(tmp_path / "text.txt")]
    done = subprocess.run([*fit, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "a.nectar").is_file(), done.stderr[-2000:]
