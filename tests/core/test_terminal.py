"""What a terminal is shown, and what is taken from it."""

import io
import types
from pathlib import Path

import pytest

from nectar_mlx import NectarError, cli, demo
from nectar_mlx.core import repetition, terminal


def test_escape_sequences_are_written_out_and_text_stays():
    assert terminal.printable("a\x1b[31mb\x9b2J\r\x00\u202ec") == "a\\x1b[31mb\\x9b2J\\r\\x00\\u202ec"
    text = "Tab\tline\nעברית हिन्दी 👩‍👩‍👧 é"
    assert terminal.printable(text) == text
    assert terminal.printable("a\nnectar: b", one_line=True) == "a\\nnectar: b"


def test_an_answer_is_escaped(capsys):
    cli.show("a\n\x1b]0;title\x07", end="")
    assert capsys.readouterr().out == "a\n\\x1b]0;title\\x07"


def test_messages_are_one_line_whatever_a_file_is_called(capsys):
    cli.say("book\x1b[2J\n.nectar: damaged")
    assert capsys.readouterr().err == "book\\x1b[2J\\n.nectar: damaged\n"


@pytest.mark.parametrize("text, complaint", [
    ("a\udcffb", "byte 0xff, at character 2"),
    ("\ud800", "surrogate pair, U\\+D800"),
])  # fmt: skip
def test_what_is_not_unicode_is_refused(text, complaint):
    with pytest.raises(NectarError, match=complaint):
        terminal.typed(text, "the question")


def test_standard_input_that_is_not_utf_8(monkeypatch):
    for options in ({"encoding": "utf-8"}, {"encoding": "utf-8", "errors": "surrogateescape"}):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"who\xff"), **options))
        with pytest.raises(NectarError, match=r"standard input is not UTF-8 text: .*byte 0xff"):
            terminal.standard_input()


@pytest.mark.parametrize(
    "typed, answer", [("y\n", True), ("what\nYES\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_yes_or_no(monkeypatch, typed, answer):
    monkeypatch.setattr(terminal, "at_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert terminal.confirm("Go?", otherwise="") is answer


def test_without_a_terminal_the_question_says_what_to_do(monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: False))
    with pytest.raises(NectarError, match="Go\\? There is no terminal to answer at: --yes goes"):
        terminal.confirm("Go?", otherwise="--yes goes")


@pytest.mark.parametrize("loop", [
    "The fox is here. " * 20,
    "a" * 300,
    "He said that he did not know who she was, and so the two of them went home again.\n" * 4,
    "".join(f"{i}. The fox sat by the dog.\n" for i in range(30)),
    "狐は犬の前にいる。" * 40,
])  # fmt: skip
def test_loops(loop):
    watch = repetition.Repetition()
    assert any(watch.add(character) for character in "Once upon a time there was a fox. " + loop)


@pytest.mark.parametrize("text", [
    "-" * 500,
    " " * 500,
    "".join(f"| {i} | {i * i} | {i**3} |\n" for i in range(60)),
    "The fox is here. " * 10,
    "She sings: la la la la la la la la, and then goes on. " * 2,
])  # fmt: skip
def test_no_loops(text):
    watch = repetition.Repetition()
    assert not any(watch.add(character) for character in text)


def test_manuals_and_code_are_no_loops():
    texts = [demo.manual()[:120_000], Path(cli.__file__).read_text()]
    for text in texts:
        watch = repetition.Repetition()
        assert not any(watch.add(text[i : i + 64]) for i in range(0, len(text), 64))
