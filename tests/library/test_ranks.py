"""`mlx.launch -n 2 nectar add`: several processes share the documents of one library."""

import re
import subprocess
import sys

import pytest

from nectar_mlx.library import Library
from tests import launching
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
    said = launching.said(launching.start(*add("two")[1:]))
    fitted = [int(count) for count in re.findall(r"(\d+) documents fitted", said)]
    assert len(fitted) == 2 and min(fitted) >= 2, said
    assert contents(Library(tmp_path / "two")) == contents(Library(tmp_path / "one"))
