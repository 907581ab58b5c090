"""Function calls in prompts and answers: how a model is told of functions, and how it writes calls.

A chat template describes functions before the first message, but what stands there is already read. So its description
is taken from a rendered conversation and put behind the document. Where the template describes none, or mlx-lm cannot
read its models' calls, the description is in our words, and calls are JSON.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..core.types import JsonObject, Tokenizer
from ..errors import NectarError
from ..models.encoder import encoder
from ..models.template import render

_SYSTEM, _USER = "<<the system message stands here>>", "<<the question stands here>>"
_PROBE: JsonObject = {
    "type": "function",
    "function": {"name": "probe_function", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class CallFormat:
    """How calls stand in an answer: between the texts `start` and `end`; without an `end` to the answer's. parse: from
    the text between them and the tools to {"name", "arguments"}, or a list of them. native: whether the chat template
    describes it."""

    start: str
    end: str
    parse: Callable[[str, Any], Any]
    native: bool

    @property
    def is_json(self) -> bool:
        return not self.native or self.parse.__module__.endswith("json_tools")


def call_format(tokenizer: Tokenizer) -> CallFormat:
    """The format of a model's calls."""
    if getattr(tokenizer, "has_tool_calling", False) and _description(tokenizer, [_PROBE]):
        known: Any = tokenizer
        return CallFormat(known.tool_call_start, known.tool_call_end or "", known.tool_parser, True)
    return CallFormat("<tool_call>", "</tool_call>", lambda text, tools: json.loads(text), False)


def describe(tokenizer: Tokenizer, tools: Sequence[JsonObject]) -> str:
    """What the model is told of the tools: {"type": "function", "function": {"name", "description", "parameters"}}.

    NectarError for one without a name.
    """
    functions = [tool.get("function") for tool in tools]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise NectarError('each of the tools must have a name: {"type": "function", "function": {"name": …}}')
    form = call_format(tokenizer)
    if form.native and (told := _description(tokenizer, tools)):
        return told
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    example = '{"name": "the function\'s name", "arguments": {"an argument\'s name": "its value"}}'
    return (
        f"You may call these functions:\n{listed}\n\n"
        f"To call one, answer only with\n{form.start}\n{example}\n{form.end}\nYou are then given its result."
    )


def as_turns(tokenizer: Tokenizer, turns: Sequence[JsonObject]) -> list[JsonObject]:
    """A conversation as the template can write it: where it has no words for calls and results, they become text of
    the assistant and the user."""
    if not any("tool_calls" in turn or turn["role"] == "tool" for turn in turns) or _writes_calls(tokenizer):
        return list(turns)
    form, found = call_format(tokenizer), list[JsonObject]()
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role == "tool":
            role, content = "user", f"Result of {turn.get('name', 'the function')}:\n{content}"
        for call in turn.get("tool_calls", ()):
            content += f"{form.start}\n{json.dumps(call['function'], ensure_ascii=False)}\n{form.end}"
        if found and role == "user" == found[-1]["role"]:
            found[-1]["content"] += f"\n\n{content}"
        else:
            found.append({"role": role, "content": content})
    return found


def _description(tokenizer: Tokenizer, tools: Sequence[JsonObject]) -> str:
    """What the chat template adds before the question for tools; "" if it does not name them."""
    try:
        before, told = (_before_question(tokenizer, given) for given in (None, list(tools)))
    except NectarError:  # it takes no system message, say
        return ""
    pairs = [[_pieces(tokenizer, text) for text in pair] for pair in zip(before, told, strict=True)]
    added = [piece for plain, longer in pairs for piece in _inserted(plain, longer)]
    turns = {piece for plain, _ in pairs for piece in plain}  # control tokens that open and close turns
    text = "".join("\n" if piece in turns else piece for piece in added).strip()
    return text if all(tool["function"]["name"] in text for tool in tools) else ""


def _before_question(tokenizer: Tokenizer, tools: list[JsonObject] | None) -> tuple[str, str]:
    """What a template writes before the system message's text, and between it and the question."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    text = render(tokenizer, turns, tools=tools, add_generation_prompt=True, enable_thinking=False)
    before, _, between = text.partition(_USER)[0].partition(_SYSTEM)
    return before, between


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """A template's text, divided into control tokens and what stands between them."""
    pieces, at = list[str](), 0
    for _, (start, end) in encoder(tokenizer).control(text):
        pieces += [text[at:start], text[start:end]]
        at = end
    return [piece for piece in [*pieces, text[at:]] if piece]


def _inserted(plain: list[str], longer: list[str]) -> list[str]:
    """The pieces that a text has and another one has not, between what they begin and end with."""
    start = _common(plain, longer)
    plain, longer = plain[start:], longer[start:]
    end = _common(plain[::-1], longer[::-1])
    plain, longer = plain[: len(plain) - end], longer[: len(longer) - end]
    if len(plain) == 1 and len(longer) > 0 and longer[0].startswith(plain[0]):  # it goes on where the other one ended
        longer[0] = longer[0].removeprefix(plain[0])
    return longer


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of their common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _writes_calls(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes calls and their results."""
    call = {"id": "probecall", "type": "function", "function": {"name": "probe_function", "arguments": {"a": 1}}}
    turns: list[JsonObject] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "probe_result", "tool_call_id": "probecall", "name": "probe_function"},
    ]
    with suppress(NectarError):
        if call_format(tokenizer).native:
            text = render(tokenizer, turns, add_generation_prompt=True, enable_thinking=False)
            return "probe_function" in text and "probe_result" in text
    return False
