"""`nectar COMMAND ...`: each command is the module of that name."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__, cli
from .core import environment, extras
from .errors import NectarError

COMMANDS = {
    "fit": "read a context once and write a .nectar",
    "plan": "estimate time, memory and size of a fit",
    "ask": "answer a question from a .nectar",
    "chat": "talk about what a .nectar holds",
    "add": "add documents to the library",
    "list": "show the documents of the library",
    "remove": "take documents out of the library",
    "update": "bring the library, or one .nectar, up to date with its documents",
    "serve": "serve .nectar files over HTTP, OpenAI-compatible",
    "evaluate": "compare a .nectar with full attention and with other ways to shrink a cache",
    "inspect": "show what is in a .nectar, and how close it is to its text",
    "export": "write the nodes of a .nectar for other engines",
    "push": "share a .nectar on the Hugging Face hub",
    "bench": "measure speed and memory",
    "demo": "fit, save and ask on a small model that comes along",
    "doctor": "say what is installed, and what is missing",
    "completion": "write the completion of these commands for zsh, bash or fish",
}
_START = """\
nectar reads a long text once and answers about it from a small file.

  nectar demo                        see it work: five minutes, 93 MB
  nectar fit --context book.txt      read a text once: book.nectar
  nectar ask book.nectar Who is it   ask about it
  nectar chat book.nectar            talk about it
  nectar serve book.nectar           a page in the browser, and for programs
  nectar add papers/                 many documents: `nectar ask library ...`

nectar --help lists all commands; nectar doctor says what is installed here."""


def _usage() -> str:
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: nectar COMMAND ...  (nectar COMMAND --help tells more)", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, *rest = arguments or [""]
    shown = {"": _START, "-h": _usage(), "--help": _usage(), "help": _usage(), "--version": f"nectar_mlx {__version__}"}
    if command in shown:
        return cli.run(cli.Parser("", None), lambda args: print(shown[command]), [])
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        cli.complain(f"nectar: there is no command {command!r}; {advice}")
        return cli.FAULT
    try:
        environment.check()  # before any module of a command is imported
        with extras.backend_named():
            run = importlib.import_module(f".{command}", __package__).main
    except NectarError as error:
        cli.complain(f"nectar {command}: {error}")
        return cli.FAULT
    except KeyboardInterrupt:  # importing takes a second; later `cli.run` catches it
        cli.complain(f"nectar {command}: interrupted")
        return cli.INTERRUPTED
    return int(run(rest))


if __name__ == "__main__":
    sys.exit(main())
