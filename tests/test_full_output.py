"""A disk that is full under what a command prints."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import cli

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="the system has no device that is always full")


def printing(count):
    def work(_: argparse.Namespace) -> None:
        cli.say("a notice")
        cli.show("answer " * count)
        cli.hint("a thought")

    return work


@pytest.mark.parametrize("count", [1, 100_000])
def test_an_answer_that_cannot_be_written_is_one_line(monkeypatch, capsys, count):
    with FULL.open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.run(cli.Parser("ask"), printing(count), []) == cli.FAULT
        patch.undo()
        assert capsys.readouterr().err == "a notice\nnectar ask: No space left on device\n"


@pytest.mark.process
def test_what_a_process_does_where_nothing_can_be_written():
    """Python says nothing more at its end; and without stderr the work is done all the same."""
    command = [sys.executable, "-m", "nectar_mlx", "plan", "--model", "Qwen3-8B", "--tokens", "10k", "--json"]
    with FULL.open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (2, "nectar plan: No space left on device\n")
        done = subprocess.run([*command[:-1]], stdout=subprocess.PIPE, stderr=full, text=True)
        assert done.returncode == 0 and "Qwen3-8B" in done.stdout
