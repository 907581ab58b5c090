"""The input line of `chat`: several lines, pastes in one piece, and a history that outlives the session."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from .core import terminal
from .core.folders import state_folder


class Editor:
    """Reads questions at a terminal. Enter asks; Alt-Enter, or Enter after a backslash, starts a new line; a paste is
    one text whatever lines it has."""

    def __init__(self, commands: Mapping[str, str]):
        """commands: that Tab completes, and what each does."""
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "  ",
            key_bindings=_keys(),
            completer=Commands(commands),
            complete_while_typing=False,
            history=_history(),
            output=create_output(stdout=sys.stderr),  # stdout has the answers alone
        )

    def question(self) -> str | None:
        """The next text; None at the end of input. NectarError unless it is Unicode.

        Ctrl-C clears what is typed, and is a KeyboardInterrupt where nothing is.
        """
        while True:
            try:
                return terminal.typed(self._session.prompt(), "the question")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class Commands(Completer):
    """Completes a command at the start of the text."""

    def __init__(self, commands: Mapping[str, str]):
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        for name, what in self._commands.items():
            if typed.startswith("/") and name.startswith(typed):
                yield Completion(name, start_position=-len(typed), display_meta=what)


class _FileHistory(FileHistory):
    """A history that never stops a chat: what cannot be kept is forgotten."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeEncodeError):
            super().store_string(string)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []


def _history() -> History:
    """Questions of earlier sessions, in a file that only its owner may read; of this one alone, without such a file."""
    path = state_folder() / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        os.fchmod(handle, 0o600)
        os.close(handle)
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path))
