"""`mlx.launch -n 2 nectar add`: several processes share the documents of one library."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx.library import Library
from tests.library.test_kill import contents


@pytest.mark.process
@pytest.mark.slow
def test_each_rank_fits_some_documents(tmp_path, notes):
    """The library is that of one process."""
    for number in range(6):
        (notes / f"more-{number}.md").write_text(f"# Number {number}\n\n" + f"The answer is {number}. " * 2000)

    def add(library):
        return [sys.executable, "-m", "tests.library.cheap", str(tmp_path / library), str(notes), "1.0"]

    subprocess.run(add("one"), check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = str(Path(sys.executable).with_name("mlx.launch"))
    launched = [launcher, "-n", "2", "--backend", "ring", "--starting-port", port, *add("two")]
    said = subprocess.run(launched, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120).stdout
    fitted = [int(count) for count in re.findall(r"(\d+) documents fitted", said)]
    assert len(fitted) == 2 and min(fitted) >= 2, said
    assert contents(Library(tmp_path / "two")) == contents(Library(tmp_path / "one"))
