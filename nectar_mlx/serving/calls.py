"""Function calls: the tools that a request offers, and the calls in an answer, told from its text."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..answering.thoughts import overlap
from ..core.types import JsonObject
from ..mlxlm.tools import CallFormat


class Call(NamedTuple):
    """A call in an answer. arguments: a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Tools:
    """What an answer may call. forced: the functions of which it must call one; none where it need not. parallel:
    whether it may call several."""

    functions: Sequence[JsonObject]
    forced: Sequence[str] = ()
    parallel: bool = True

    @property
    def schema(self) -> JsonObject | None:
        """Of a forced call: {"name", "arguments"}; None where none is forced."""
        if not self.forced:
            return None
        calls, definitions = [], {}
        for number, function in enumerate(tool["function"] for tool in self.functions):
            if function["name"] in self.forced:
                place = f"#/$defs/tool{number}"
                definitions[f"tool{number}"] = _moved(_closed(function["parameters"]), place)
                properties = {"name": {"const": function["name"]}, "arguments": {"$ref": place}}
                calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"]})
        closed_calls = [{**call, "additionalProperties": False} for call in calls]
        return {"$defs": definitions, **(closed_calls[0] if len(calls) == 1 else {"anyOf": closed_calls})}


class CallSplitter:
    """Divides a streamed answer into text and calls. What looks like a call and is none stays text."""

    def __init__(self, tools: Tools, form: CallFormat):
        self._tools, self._form = tools, form
        self._names = {tool["function"]["name"] for tool in tools.functions}
        self._inside = bool(tools.forced)
        self._held, self._trim = "", False
        self.count = 0

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Takes the next piece; holds back what may belong to a call."""
        self._held += text
        told, calls = "", list[Call]()
        while True:
            marker = self._form.end if self._inside else self._form.start
            before, found, rest = self._held.partition(marker) if marker and not self._tools.forced else ("", "", "")
            if not found:
                break
            self._held, self._inside = rest, not self._inside
            told += self._text(before) if self._inside else self._close(before, found, calls)
        if not self._inside:
            keep = len(self._held) - overlap(self._held, self._form.start)
            told, self._held = told + self._text(self._held[:keep]), self._held[keep:]
        return told, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, for an answer that has ended."""
        calls = list[Call]()
        held, self._held = self._held, ""
        return (self._close(held, "", calls) if self._inside else self._text(held)), calls

    def reason(self, reason: str) -> str:
        """Why the answer ended. reason: why its text did."""
        return "tool_calls" if self.count and (reason == "stop" or self._tools.forced) else reason

    def _close(self, body: str, end: str, calls: list[Call]) -> str:
        """Adds the calls that a text holds; returns it where it holds none."""
        found = self._parse(body)
        if not found:
            return body if self._tools.forced else self._form.start + body + end
        if not self._tools.parallel:
            found = found[: max(0, 1 - self.count)]
        self.count += len(found)
        self._trim = True  # line breaks between calls
        calls += found
        return ""

    def _text(self, text: str) -> str:
        text = text.lstrip() if self._trim else text
        self._trim = self._trim and not text
        return text

    def _parse(self, body: str) -> list[Call]:
        try:
            functions = list(self._tools.functions)
            parsed = json.loads(body) if self._tools.forced else self._form.parse(body, functions)
            return [self._call(one) for one in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # mlx-lm's parsers raise anything
            return []

    def _call(self, parsed: Mapping[str, Any]) -> Call:
        arguments = parsed.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if parsed["name"] not in self._names or not isinstance(arguments, dict):
            raise ValueError
        return Call(new_id(), parsed["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def new_id() -> str:
    """Nine letters and digits: Mistral's templates take no others."""
    return f"c{secrets.token_hex(4)}"


def _closed(parameters: JsonObject) -> JsonObject:
    """A schema of arguments without others than it names, unless it says more than names."""
    plain = "properties" in parameters and not parameters.keys() & {"$ref", "allOf", "anyOf", "oneOf"}
    return {"additionalProperties": False, **parameters} if plain else parameters


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it has become a part of another one."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(item, place) for name, item in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
