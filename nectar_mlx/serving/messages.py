"""Messages of requests, and as chat templates take them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..core.types import JsonObject
from .calls import new_id
from .errors import ApiError, refused
from .tools import MAX_DEPTH, MAX_TOOLS, depth, invalid

Name = Annotated[str, Meta(max_length=512)]
MAX_MESSAGES = 2048


class Part(Struct):
    """A piece of a message."""

    type: str
    text: str | None = None


class CalledFunction(Struct):
    name: Name
    arguments: str | dict[str, Any] | None = None  # an object is Ollama's


class ToolCall(Struct):
    """A call in an earlier answer."""

    function: CalledFunction
    id: Name | None = None

    def plain(self, param: str) -> JsonObject:
        """As chat templates take it."""
        arguments = self.function.arguments or {}
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments, type=dict[str, Any])
            except (ValueError, RecursionError):
                raise invalid(f"{param}.function.arguments", "not a JSON object") from None
        if depth(arguments) > MAX_DEPTH:
            raise invalid(f"{param}.function.arguments", f"deeper than {MAX_DEPTH} levels")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id or new_id(), "type": "function", "function": function}


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    tool_name: Name | None = None  # Ollama's
    images: Any = None  # Ollama's

    def plain(self, param: str) -> JsonObject:
        """As chat templates take it."""
        if self.images:
            raise refused(f"{param}.images", "only text is supported in messages")
        role = "system" if self.role == "developer" else self.role
        calls = [call.plain(f"{param}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls or ())]
        if calls and role != "assistant":
            raise invalid(f"{param}.tool_calls", "only an assistant calls tools")
        content = "" if calls and self.content is None else text_of(self.content, f"{param}.content")
        message: JsonObject = {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})
        if role == "tool":
            message |= {"tool_call_id": self.tool_call_id, "name": self.tool_name}
        return message


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]


def conversation(messages: Sequence[Message], param: str = "messages") -> list[JsonObject]:
    """Messages as chat templates take them, each result of a call with its function's name; ApiError 400 for a result
    without a call."""
    found, called = list[JsonObject](), dict[str, str]()
    for i, message in enumerate(messages):
        found.append(plain := message.plain(f"{param}[{i}]"))
        called |= {call["id"]: call["function"]["name"] for call in plain.get("tool_calls", ())}
        if plain["role"] == "tool" and not plain["name"]:
            plain["name"] = called.get(plain["tool_call_id"])
            if plain["name"] is None:
                raise invalid(f"{param}[{i}].tool_call_id", "no call before has this id")
    return found


def text_of(content: str | list[Part] | None, param: str) -> str:
    """The text of a message's content."""
    if content is None:
        raise ApiError(400, f"{param} is missing", code="invalid_value", param=param)
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise refused(param, "only text is supported in messages")
    return "\n".join(part.text or "" for part in content)


class InputItem(Struct):
    """A message, a call, a call's result, or thoughts, which are not used."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None

    def message(self, param: str) -> Message | None:
        """None for thoughts."""
        if self.type == "reasoning":
            return None
        if self.type == "function_call_output":
            return Message("tool", text_of(self.output, f"{param}.output"), tool_call_id=self.call_id)
        if self.type == "function_call":
            if not self.name or not self.call_id:
                raise invalid(f"{param}.{'call_id' if self.name else 'name'}", "missing")
            return Message("assistant", tool_calls=[ToolCall(CalledFunction(self.name, self.arguments), self.call_id)])
        if self.role is None:
            raise invalid(f"{param}.role", "missing")
        return Message(self.role, self.content)


InputItems = Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]


def from_items(items: Sequence[InputItem]) -> list[JsonObject]:
    """Those of /v1/responses; calls that follow each other are of one answer."""
    messages = list[Message]()
    for i, item in enumerate(items):
        message = item.message(f"input[{i}]")
        if message and message.tool_calls and messages and messages[-1].role == "assistant":
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), *message.tool_calls]
        elif message:
            messages.append(message)
    return conversation(messages, "input")
