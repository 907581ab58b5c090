"""Five seconds of damaged files for each reader; `tests/fuzz_readers.py` goes on for as long as you like."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.process
@pytest.mark.parametrize("kind", ["nectar", "kv", "gguf"])
def test_no_damaged_file_is_more_than_one_line(kind):
    command = [sys.executable, "-m", "tests.fuzz_readers", kind, "--blind", "--seconds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "without a finding" in done.stdout
