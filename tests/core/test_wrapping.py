"""Lines that end at words, in whatever pieces a text comes."""

import itertools
import os
import pty
import termios

import pytest

from nectar_mlx import cli, writing
from nectar_mlx.core.wrapping import Wrap
from nectar_mlx.writing import Written

PROSE = "The heron stood in the shallow water near the reeds, and did not move."


def wrapped(text, columns, size=1):
    wrap = Wrap(lambda: columns)
    return "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.finish()


@pytest.mark.parametrize("columns", [12, 13, 20, 69, 70, 71])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_end_at_words_and_are_full(columns, size):
    lines = wrapped(PROSE, columns, size).split("\n")
    assert " ".join(lines) == PROSE and max(map(len, lines)) <= columns
    for line, after in itertools.pairwise(lines):
        assert len(line) + 1 + len(after.split()[0]) > columns, "the next word had no room"


CASES = [
    ("breaks of the text stay", "one\n\n  - two three", 9, "one\n\n  - two\nthree"),
    ("a word that fits exactly", "abc def", 7, "abc def"),
    ("one that does not by a column", "abc defg", 7, "abc\ndefg"),
    ("a word wider than the terminal is left to it", "see http://example.org/heron now", 10,
     "see\nhttp://example.org/heron now"),
    ("and what follows goes on behind it", "abcdefghijkl mn", 10, "abcdefghijkl mn"),
    ("or not, at the last column", "abcdefghij k", 10, "abcdefghij\nk"),
    ("tabs go to their stops", "a\tbcd", 10, "a\nbcd"),
    ("wide characters take two columns, and a line may end between them", "蒼鷺は動かない", 7, "蒼鷺は\n動かな\nい"),
    ("but not before what closes", "蒼鷺は。", 6, "蒼鷺\nは。"),
    ("nor behind what opens", "蒼「鷺」", 4, "蒼\n「鷺」"),
    ("marks and parts of a sign stay with it", "de\u0301 👩\u200d💻 👍🏽", 5, "de\u0301 👩\u200d💻\n👍🏽"),
    ("a blank that may not break", "aa b\u00a0c", 5, "aa\nb\u00a0c"),
    ("a terminal of no known width", PROSE, 0, PROSE),
    ("blanks at the end are not shown", "one ", 10, "one"),
]  # fmt: skip


@pytest.mark.parametrize("what, text, columns, expected", CASES)
def test_what_a_line_is_broken_at(what, text, columns, expected):
    assert wrapped(text, columns) == wrapped(text, columns, 1000) == expected, what


def test_the_last_word_is_held_back_and_no_other():
    wrap = Wrap(lambda: 10)
    assert [wrap.feed(piece) for piece in ("The he", "ron ", "stood", "\n")] == ["The", " heron", "", "\nstood\n"]


@pytest.mark.parametrize("word", ["0123456789" * 50, "ภาษาไทย" * 50, "e\u0301" * 200])
def test_a_word_wider_than_the_terminal_is_shown_as_it_comes(word):
    wrap = Wrap(lambda: 40)
    shown = wrap.feed("It is ")
    for start in range(0, len(word), 7):
        shown += wrap.feed(word[start : start + 7])
        assert len(f"It is\n{word[: start + 7]}") - len(shown) < 90
    assert shown + wrap.finish() == f"It is\n{word}"


def test_a_terminal_that_changes_its_width():
    columns = [20]
    wrap = Wrap(lambda: columns[0])
    shown = wrap.feed("The heron stood ")
    columns[0] = 18
    assert shown + wrap.feed("still ") == "The heron stood\nstill"


@pytest.fixture
def terminal():
    """Of 20 columns: its end for a program, and what was shown on it."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 20))
    with os.fdopen(slave, "w") as stream:
        yield stream, lambda: os.read(master, 10_000).decode().replace("\r\n", "\n")
    os.close(master)


def test_answers_and_notices_are_wrapped_at_a_terminal(terminal, monkeypatch):
    stream, shown = terminal
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)
    cli.show_answer(PROSE[:30])
    assert shown() == "The heron stood in\nthe shallow\n"
    cli.complain(PROSE[:30])
    assert shown() == "The heron stood in\nthe shallow\n"
    cli.show(PROSE[:30])
    assert shown() == PROSE[:30] + "\n", "JSON and tables are as they are"


def test_thoughts_and_an_interrupted_answer_are_shown_to_their_last_words(terminal, monkeypatch):
    stream, shown = terminal
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", stream)

    def pieces():
        yield Written(thoughts="Who flew over the")
        yield Written(thoughts=" lake?")
        yield Written(answer="The heron fl")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.show(pieces())
    assert shown() == "Who flew over the\nlake?\n\nThe heron fl"


def test_nothing_is_changed_elsewhere(capsys):
    flow = cli.answering()
    flow.add("The he")
    assert capsys.readouterr().out == "The he", "nothing is held back"
    flow.add(f"ron {PROSE * 9}")
    flow.finish()
    assert capsys.readouterr().out == f"ron {PROSE * 9}"
