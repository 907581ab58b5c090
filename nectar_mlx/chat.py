"""`nectar chat book.nectar`: a conversation with a .nectar, at a terminal or over a pipe."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from . import cli, remote, writing
from .core import terminal
from .core.files import write_atomically
from .errors import NectarError
from .writing import Ended, Written

_COMMANDS = {
    "/help": "shows this",
    "/sources": "shows the passages that say what the last answer says",
    "/doc": "says what the text is and how close the file is to it",
    "/history": "shows the conversation",
    "/save": "FILE writes the conversation as Markdown",
    "/reset": "clears the conversation; the text is kept",
    "/quit": "ends, as Ctrl-D does",
}


class Conversation(Protocol):
    """With the model here (`conversation`) or with a server (`remote`)."""

    messages: list[dict[str, str]]

    def answer(self, question: str) -> Iterator[Written]: ...
    def reset(self) -> None: ...
    def sources(self) -> list[str]: ...
    def describe(self) -> str: ...
    def figures(self, ended: Ended) -> str: ...


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("chat", f"A conversation with a .nectar. In it: {', '.join(_COMMANDS)}.")
    cli.add_nectar(parser, what=cli.ASKED)
    cli.add_generation(parser)
    cli.add_retrieval(parser)
    cli.add_sources(parser, cite=False)
    cli.add_chunks(parser)
    cli.add_library(parser)
    remote.add_options(parser)
    cli.add_quiet(parser)
    return parser


def _work(args: argparse.Namespace) -> None:
    conversation = remote.conversation(args) or _here(args)
    at_terminal = terminal.at_terminal()
    if at_terminal:
        cli.say("Enter asks, Alt-Enter starts a new line, /help shows the rest.")
    for text in _typed(at_terminal):
        try:
            name, argument = _command(text)
            if name == "/quit":
                break
            elif name:
                _obey(name, argument, conversation)
            else:
                _turn(conversation, text, args, at_terminal)
        except NectarError as error:
            cli.complain(str(error))


def _here(args: argparse.Namespace) -> Conversation:
    """A conversation with the model loaded here."""
    from .conversation import LocalConversation
    from .from_library import Questions

    library = Questions.open(args)
    model, tokenizer, nectar = library.start() if library else cli.load(args.nectar, args)
    return LocalConversation(model, tokenizer, nectar, args, library)


def _typed(at_terminal: bool) -> Iterator[str]:
    """What is typed, without blanks around it: at a terminal a text of several lines, else each line."""
    if at_terminal:
        from .editor import Editor

        editor = Editor(_COMMANDS)
        read = editor.question
    else:
        read = _line
    while (text := read()) is not None:
        if text.strip():
            yield text.strip()


def _line() -> str | None:
    return terminal.standard_input(line=True) or None


def _command(text: str) -> tuple[str, str]:
    """The command that a text is, and its argument; ("", "") for a question, which may begin with a path.

    NectarError for a single word that looks like a command and is none.
    """
    name, _, argument = text.partition(" ")
    name = {"/exit": "/quit", "/?": "/help"}.get(name, name)
    if name == "/save" or (name in _COMMANDS and not argument):
        return name, argument.strip()
    if re.fullmatch(r"/[a-z]+", text):
        raise NectarError(f"there is no {text}: /help shows the commands")
    return "", ""


def _obey(name: str, argument: str, conversation: Conversation) -> None:
    if name == "/help":
        for command, what in _COMMANDS.items():
            cli.say(f"  {command:<10}{what}")
    elif name == "/reset":
        conversation.reset()
        cli.say("the conversation is cleared, the text is kept")
    elif name == "/history":
        for message in conversation.messages:
            cli.show_answer(f"{message['role']}: {message['content']}")
    elif name == "/sources":
        _show_sources(conversation)
    elif name == "/doc":
        cli.say(conversation.describe())
    elif name == "/save":
        _save(argument, conversation)


def _show_sources(conversation: Conversation) -> None:
    if not conversation.messages:
        cli.say("there is no answer yet")
        return
    for source in conversation.sources() or [cli.NO_SOURCE]:
        cli.say(source)


def _save(name: str, conversation: Conversation) -> None:
    """Writes the conversation as Markdown. NectarError where there is a file already, or none can be written."""
    path = Path(os.path.expanduser(name))
    if not name:
        raise NectarError("/save takes the name of a file: /save notes.md")
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise NectarError(f"{path}: {error.strerror}") from None
    if exists:
        raise NectarError(f"{path} exists: take another name")
    titles = {"user": "## ", "assistant": ""}
    text = "\n\n".join(titles.get(m["role"], "") + m["content"] for m in conversation.messages)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))
    count = len(conversation.messages) // 2
    cli.say(f"{path}: 1 question with its answer" if count == 1 else f"{path}: {count} questions with their answers")


def _turn(conversation: Conversation, question: str, args: argparse.Namespace, at_terminal: bool) -> None:
    """Streams one answer to stdout, then its figures to stderr. At a terminal Ctrl-C ends only the answer."""
    try:
        ended = writing.show(conversation.answer(question))
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        print(flush=True)
        return
    if ended is not None:
        writing.say_how_it_ended(ended, args)
        cli.say(conversation.figures(ended))
        if args.sources:
            _show_sources(conversation)


if __name__ == "__main__":
    sys.exit(main())
