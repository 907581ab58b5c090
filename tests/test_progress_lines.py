"""What a command shows of its progress where there is no terminal, and where there is one."""

import io
import time

import pytest
from rich.console import Console

from nectar_mlx import cli, console
from nectar_mlx.core.clock import duration
from nectar_mlx.core.progress import Stage, Status


def test_off_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with cli.overall() as task:
        task.expect([Stage("reading", 1.0), Stage("fitting heads", 3.0)])
        with task("reading", 10) as update:
            update(5)
            time.sleep(0.12)  # nothing is reported meanwhile: a line comes all the same
        with task("fitting heads", 4) as update:
            update(4)
            time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("stage 1 of 2, reading (5 of 10): ") and " of about " in lines[0]
    assert lines[-1].startswith("stage 2 of 2, fitting heads (4 of 4): ")
    assert len(lines) >= 3 and not any("100%" in line for line in lines)


def test_a_short_command_says_nothing(capsys):
    with cli.progress("reading", 2) as update:
        update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, said", [
    (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (5400, "1.5 h"), (40000, "11 h"), (864000, "10 days"),
])  # fmt: skip
def test_a_duration_as_a_person_says_it(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_is_one_line_at_any_width(width):
    status = Status(
        description="answering check questions",
        stage=3,
        stages=12,
        done=1200,
        total=120_000,
        share=0.34,
        elapsed=130,
        total_seconds=4000,
    )
    terminal = Console(width=width, file=io.StringIO())
    terminal.print(console._bar(status))
    (line,) = terminal.file.getvalue().splitlines()
    assert "34% 2 min of about 67 min" in line and (width < 80 or "stage 3 of 12, answering" in line)
