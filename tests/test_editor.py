"""The input line of `chat`, with keys from a pipe."""

import os

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input

from nectar_mlx import NectarError, chat
from nectar_mlx.editor import Commands, Editor

PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """The questions that a session makes of these keys."""
    monkeypatch.setenv("NECTAR_STATE", str(tmp_path / "state"))

    def typed(*keys):
        with create_pipe_input() as pipe, create_app_session(input=pipe):
            editor, questions = Editor(chat._COMMANDS), []
            for text in keys:
                pipe.send_bytes(text.encode(errors="surrogateescape"))
                questions.append(editor.question())
            return questions

    return typed


def test_enter_asks_and_a_paste_is_one_question(typed):
    pasted = PASTE.format("def f():\r\n\treturn 1\r\r/quit")
    assert typed("who?\r", pasted + "what is this?\r") == ["who?", "def f():\n\treturn 1\n\n/quitwhat is this?"]


def test_new_lines(typed):
    assert typed("one\x1b\rtwo\\\rthree\r") == ["one\ntwo\nthree"]


def test_the_end_of_input_and_ctrl_c(typed):
    assert typed("\x04") == [None]
    assert typed("half\x03whole\r") == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        typed("\x03")


@pytest.mark.parametrize(
    "text, names", [("/hi", ["/history"]), ("/s", ["/sources", "/save"]), ("see /hi", []), ("", [])]
)
def test_tab_completes_commands_at_the_start_only(text, names):
    completions = Commands(chat._COMMANDS).get_completions(Document(text), CompleteEvent())
    assert [completion.text for completion in completions] == names


def test_what_is_not_unicode_is_refused(typed):
    with pytest.raises(NectarError, match="not UTF-8"):
        typed("a\udcffb\r")


def test_history_outlives_the_session_and_is_its_owners_alone(typed, tmp_path):
    typed("first\x1b\rline\r")
    file = tmp_path / "state" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    assert typed("\x1b[A\r") == ["first\nline"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["folder", "link", "binary"])
def test_a_history_that_cannot_be_kept_stops_nothing(typed, tmp_path, kind):
    file = tmp_path / "state" / "chat_history"
    file.parent.mkdir()
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        os.symlink(tmp_path / "elsewhere", file)
    else:
        file.write_bytes(b"+\xff\n\x00" * 9)
    assert typed("who?\r") == ["who?"]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text, command", [
    ("/quit", ("/quit", "")),
    ("/exit", ("/quit", "")),
    ("/save notes.md", ("/save", "notes.md")),
    ("/save", ("/save", "")),
    ("/etc/hosts", ("", "")),
    ("/etc/hosts is what?", ("", "")),
    ("/reset the clock?", ("", "")),
    ("who?", ("", "")),
])  # fmt: skip
def test_a_leading_path_is_a_question(text, command):
    assert chat._command(text) == command


def test_a_word_like_a_command_is_no_question():
    with pytest.raises(NectarError, match="there is no /histroy"):
        chat._command("/histroy")
