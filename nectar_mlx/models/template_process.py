"""The process that renders chat templates: run as a script, it imports Jinja and nothing of this package.

A template comes with a model from anyone, and is a program: it may loop, or build a text of any length. Jinja's sandbox
keeps it from files and Python; this process has limits of memory and is stopped when it takes too long (`template`).
Requests and answers are one line of JSON each. The environment is what transformers gives templates.
"""

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_BYTES = 512 << 20  # of memory
MOST_TEXT = 64 << 20  # characters of a rendered conversation


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks an answer: its contents, as they are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's, without names that Python itself uses."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        fields = dict(*values, **kwargs)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise TemplateError("a namespace has no names with an underscore in front")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _Namespace
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _answer(environment: ImmutableSandboxedEnvironment, compiled: dict[str, Template], line: str) -> dict[str, str]:
    request = json.loads(line)
    try:
        template = compiled.get(request["template"])
        if template is None:
            compiled.clear()
            template = compiled[request["template"]] = environment.from_string(request["template"])
        pieces, length = list[str](), 0
        for piece in template.generate(**request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_TEXT:
                return {"error": "it makes a text without end"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever a template does wrong
        return {"error": (str(error) or type(error).__name__).splitlines()[0][:300]}


def main() -> None:
    with suppress(ValueError, OSError):  # macOS takes no limit of memory: there the limit of time is one, too
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    environment, compiled = _environment(), dict[str, Template]()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(environment, compiled, line)), flush=True)


if __name__ == "__main__":
    main()
