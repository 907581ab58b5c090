"""`nectar COMMAND ...`: each command is the module of that name."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "fit": "read a context once and write a .nectar",
    "plan": "estimate time, memory and size of a fit",
    "ask": "answer a question from a .nectar",
    "chat": "talk about what a .nectar holds",
    "serve": "serve .nectar files over HTTP, OpenAI-compatible",
    "evaluate": "compare a .nectar with full attention and with other ways to shrink a cache",
    "inspect": "show what is in a .nectar",
    "export": "write the nodes of a .nectar for other engines",
    "push": "share a .nectar on the Hugging Face hub",
    "bench": "measure speed and memory",
    "demo": "fit, save and ask on a small model that comes along",
}


def _usage() -> str:
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: nectar COMMAND ...  (nectar COMMAND --help tells more)", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, *rest = arguments
    if command == "--version":
        print(f"nectar_mlx {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"nectar: there is no command {command!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f".{command}", __package__).main(rest))


if __name__ == "__main__":
    sys.exit(main())
