"""`nectar completion zsh`: the script that completes commands, options and their values in zsh, bash or fish.

The scripts are written from the parsers of all commands, so they know what the commands know.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from . import cli

_FILE = "FILE"  # the kind of value that is completed from the folder
_INSTALL = {
    "zsh": "nectar completion zsh > a folder of $fpath, as _nectar; or in .zshrc: source <(nectar completion zsh)",
    "bash": "in .bashrc: source <(nectar completion bash)",
    "fish": "nectar completion fish > ~/.config/fish/completions/nectar.fish",
}


@dataclass(frozen=True)
class Option:
    """names: such as --model. help: a few words. choices: its values, if they are few. takes_value: or it is a flag."""

    names: tuple[str, ...]
    help: str
    choices: tuple[str, ...]
    takes_value: bool


@dataclass(frozen=True)
class Command:
    """choices: of the first argument, if they are few; otherwise arguments are files."""

    name: str
    help: str
    options: tuple[Option, ...]
    choices: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_parser(), _work, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        "completion", "Writes a completion script. " + " ".join(f"{k}: {v}." for k, v in _INSTALL.items())
    )
    parser.add_argument("shell", choices=_INSTALL, metavar="SHELL", help="zsh, bash or fish")
    return parser


def _work(args: argparse.Namespace) -> None:
    print(_SCRIPTS[args.shell](list(commands())))


def commands() -> Iterator[Command]:
    """Every command of `nectar` with its options."""
    from .__main__ import COMMANDS

    for name, what in COMMANDS.items():
        module = importlib.import_module(f".{name}", __package__)
        make = getattr(module, "make_parser", None) or module._parser
        actions = [a for a in make()._actions if a.help != argparse.SUPPRESS]
        first = next((a for a in actions if not a.option_strings), None)
        options = tuple(_option(a) for a in actions if a.option_strings)
        yield Command(name, what, options, tuple(map(str, (first and first.choices) or ())))


def _option(action: argparse.Action) -> Option:
    choices = tuple(map(str, action.choices or ()))
    return Option(tuple(action.option_strings), _words(action.help or ""), choices, action.nargs != 0)


def _words(text: str) -> str:
    """A help text on one line, cut at a word, without what shells treat specially."""
    text = " ".join(text.replace("%%", "%").split()).translate(str.maketrans("'", "’", '"`$\\[]:;|&<>{}'))
    return text if len(text) <= 60 else text[:60].rpartition(" ")[0] + " …"


def _zsh(commands: Sequence[Command]) -> str:
    lines = ["#compdef nectar", "", "_nectar() {", "  local -a commands", "  commands=("]
    lines += [f"    '{c.name}:{_words(c.help)}'" for c in commands]
    lines += ["  )", "  if (( CURRENT == 2 )); then", "    _describe command commands", "    return", "  fi"]
    lines += ["  local command=$words[2]", '  words=("nectar $words[2]" "${words[@]:2}")', "  (( CURRENT-- ))"]
    lines.append("  case $command in")
    for command in commands:
        lines.append(f"    {command.name}) _arguments \\")
        for option in command.options:
            value = f":value:({' '.join(option.choices)})" if option.choices else ":value:_files"
            for name in option.names:
                lines.append(f"      '{name}[{option.help}]{value if option.takes_value else ''}' \\")
        lines.append(f"      '*:argument:{f'({chr(32).join(command.choices)})' if command.choices else '_files'}' ;;")
    lines += ["  esac", "}", "", 'if [ "$funcstack[1]" = "_nectar" ]; then', '  _nectar "$@"', "else"]
    return "\n".join([*lines, "  compdef _nectar nectar", "fi"])


def _bash(commands: Sequence[Command]) -> str:
    lines = [
        "_nectar() {",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}",
        "  COMPREPLY=()",
    ]
    lines += ["  if (( COMP_CWORD == 1 )); then", f"    {_compgen([c.name for c in commands])}", "    return", "  fi"]
    lines.append("  case ${COMP_WORDS[1]} in")
    for command in commands:
        lines += [f"    {command.name})", "      case $before in"]
        for option in command.options:
            if option.takes_value:
                reply = _compgen(option.choices) if option.choices else _FILES
                lines.append(f"        {'|'.join(option.names)}) {reply}; return ;;")
        names = [name for option in command.options for name in option.names]
        lines += ["      esac", f"      if [[ $word == -* ]]; then {_compgen(names)}"]
        lines += [f"      else {_compgen(command.choices) if command.choices else _FILES}; fi ;;"]
    return "\n".join([*lines, "  esac", "}", "complete -o filenames -F _nectar nectar"])


_FILES = 'mapfile -t COMPREPLY < <(compgen -f -- "$word")'


def _compgen(words: Sequence[str]) -> str:
    return f'mapfile -t COMPREPLY < <(compgen -W "{" ".join(words)}" -- "$word")'


def _fish(commands: Sequence[Command]) -> str:
    lines = ["complete -c nectar -f"]
    for command in commands:
        lines.append(f"complete -c nectar -n __fish_use_subcommand -a {command.name} -d '{_words(command.help)}'")
        inside = f"complete -c nectar -n '__fish_seen_subcommand_from {command.name}'"
        lines.append(f"{inside} -a '{' '.join(command.choices)}'" if command.choices else f"{inside} -F")
        for option in command.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = (
                (f" -x -a '{' '.join(option.choices)}'" if option.choices else " -r -F") if option.takes_value else ""
            )
            lines.append(f"{inside} {names}{value} -d '{option.help}'")
    return "\n".join(lines)


_SCRIPTS: dict[str, Callable[[Sequence[Command]], str]] = {"zsh": _zsh, "bash": _bash, "fish": _fish}


if __name__ == "__main__":
    sys.exit(main())
