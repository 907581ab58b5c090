"""Tools as requests offer them, with bounds."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..core.types import JsonObject
from .calls import Tools
from .errors import ApiError, refused

MAX_TOOLS, MAX_BYTES, MAX_DEPTH = 128, 256_000, 64
FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Struct):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    """A function, as chat completions and Ollama write it, and as /v1/responses does: beside the type."""

    type: str = "function"
    function: Function | None = None
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def plain(self, param: str) -> JsonObject:
        """As chat templates take it."""
        if self.type != "function":
            raise refused(f"{param}.type", "only functions are supported")
        function = self.function or (Function(self.name, self.description, self.parameters) if self.name else None)
        if function is None:
            raise invalid(f"{param}.function", "missing")
        parameters = function.parameters or {"type": "object", "properties": {}}
        if parameters.get("type", "object") != "object":
            raise invalid(f"{param}.function.parameters", "the schema must be of an object")
        if depth(parameters) > MAX_DEPTH:
            raise invalid(f"{param}.function.parameters", f"deeper than {MAX_DEPTH} levels")
        described = {"name": function.name, "description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": described}


class Chosen(Struct):
    """The function that must be called: `name` in /v1/responses."""

    type: Literal["function"]
    function: Function | None = None
    name: str | None = None


Choice = Literal["none", "auto", "required"] | Chosen | None


def tools_of(tools: Sequence[Tool] | None, choice: Choice, parallel: bool | None) -> Tools | None:
    """The tools of a request; None where it offers none. ApiError for what is wrong with them."""
    functions = [tool.plain(f"tools[{i}]") for i, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in functions]
    if len(set(names)) < len(names):
        raise invalid("tools", "two functions have the same name")
    if len(msgspec.json.encode(functions)) > MAX_BYTES:
        raise invalid("tools", f"more than {MAX_BYTES:,} bytes")
    if isinstance(choice, Chosen):
        chosen = choice.function.name if choice.function else choice.name
        if chosen not in names:
            raise invalid("tool_choice", "there is no tool with this name")
        return Tools(functions, [str(chosen)], False)
    if choice == "required" and not functions:
        raise invalid("tool_choice", "there are no tools")
    if not functions or choice == "none":
        return None
    return Tools(functions, names if choice == "required" else (), parallel is not False)


def invalid(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", code="invalid_value", param=param)


def depth(value: Any) -> int:
    """Of nested objects and lists."""
    levels, level = 0, [value]
    while level:
        levels += 1
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for items in inner for item in items]
    return levels
