"""What a terminal would obey is shown instead."""

import pytest

from nectar_mlx import cli
from nectar_mlx.core.terminal import printable
from nectar_mlx.errors import NectarError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("a\rb\x00\x7f", "a\\rb\\x00\\x7f"),
        ("\ud800", "\\ud800"),
        ("naïve 你好 🙂 שלום", "naïve 你好 🙂 שלום"),
        ("a\tb\nc", "a\tb\nc"),
    ],
)
def test_only_what_is_no_text_is_written_out(text, shown):
    assert printable(text) == shown


def test_a_name_cannot_pretend_to_be_the_next_line(capsys):
    def work(_):
        raise NectarError("a\nnectar ask: all is well\x1b[2J")

    assert cli.run(cli.Parser("ask"), work, []) == cli.FAULT
    assert capsys.readouterr().err == "nectar ask: a\\nnectar ask: all is well\\x1b[2J\n"
    assert cli.run(cli.Parser("ask"), work, ["\x1b[2J\n"]) == cli.FAULT
    assert "\x1b" not in capsys.readouterr().err


def test_answers_and_lines_are_shown(capsys):
    cli.show("an\x1b[31m answer", end="")
    cli.say("a line\x07")
    assert capsys.readouterr() == ("an\\x1b[31m answer", "a line\\x07\n")
