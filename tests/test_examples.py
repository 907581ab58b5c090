"""The macOS script, with stand-ins for the dialogs: a Mac has not run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nectar_mlx import ask
from tests import toys

SCRIPT = Path(__file__).parent.parent / "examples" / "quick_ask.sh"
DIALOGS = """#!{python}
import json, os, sys
shown = sys.argv[sys.argv.index("end run") + 1:]
with open(os.environ["SHOWN"], "a") as file:
    file.write(json.dumps(shown) + "\\n")
if len(shown) == 1:
    if "CANCEL" in os.environ:
        sys.exit(1)
    print('who is the "fox"? $(touch hacked)')
"""


@pytest.fixture
def run(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "osascript": DIALOGS.format(python=sys.executable),
        "nectar": f'#!/bin/sh\nexec "{sys.executable}" -m nectar_mlx "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, **environment):
        shown = tmp_path / "shown.jsonl"
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SHOWN": str(shown), **environment}
        done = subprocess.run(["sh", str(SCRIPT), *arguments], env=env, cwd=tmp_path, timeout=120)
        return done.returncode, [json.loads(line) for line in shown.read_text().splitlines()]

    return run


@pytest.mark.process
def test_a_question_is_answered_in_a_dialog(run, tmp_path, capsys):
    book = toys.book(tmp_path)
    code, (question, shown) = run(str(book.path))
    assert code == 0 and question == ["Ask about book"]
    assert ask.main([str(book.path), 'who is the "fox"? $(touch hacked)', "--max-tokens", "300"]) == 0
    expected = capsys.readouterr().out
    assert shown[0] == "book" and shown[1].strip().endswith(expected.strip()) and expected.strip()
    assert not (tmp_path / "hacked").exists()


@pytest.mark.process
def test_a_cancelled_dialog_asks_nothing(run):
    code, shown = run("missing.nectar", CANCEL="1")
    assert code == 0 and shown == [["Ask about missing"]]


@pytest.mark.process
def test_an_error_is_shown(run, tmp_path):
    (tmp_path / "tools" / "nectar").write_text('#!/bin/sh\necho "nectar ask: $2: no such file" >&2\nexit 2\n')
    code, (_, shown) = run("missing.nectar")
    assert code == 0 and shown[1] == "No answer: nectar ask: missing.nectar: no such file"
