"""Function calls: forced ones are always of the schema; others are told from the text; what is wrong is refused."""

import json

import pytest

from nectar_mlx.serving.job import Finished, Started, Written

from .running import Running, arguments

COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "of": {"$ref": "#/$defs/part"}},
    "required": ["colour", "of"],
    "$defs": {"part": {"type": "string", "maxLength": 3}},
}


def tool(name="paint", **fields):
    return {"type": "function", "function": {"name": name, "description": "Paints it.", "parameters": COLOURS} | fields}


OTHER = tool("count", parameters={"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})
ASKED = {"model": "red", "max_tokens": 120, "temperature": 0, "messages": [{"role": "user", "content": "paint it"}]}
CALL = {"id": "c12345678", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}


def checked(name, arguments):
    given = json.loads(arguments)
    if name == "count":
        return given["n"] in (1, 2) and set(given) == {"n"}
    return given["colour"] in ("red", "blue") and len(given["of"]) <= 3 and set(given) == {"colour", "of"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_forced_calls_follow_the_schema(running, choice, temperature):
    client = running.client()
    options = {**ASKED, "tools": [tool(), OTHER], "tool_choice": choice, "temperature": temperature}
    choice_made = client.chat.completions.create(**options).choices[0]
    (call,) = choice_made.message.tool_calls
    assert choice_made.finish_reason == "tool_calls" and choice_made.message.content is None
    assert checked(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "count"


def test_a_stop_string_does_not_cut_a_forced_call(running):
    options = {**ASKED, "tools": [tool()], "tool_choice": "required", "stop": ["colour", '"']}
    (call,) = running.client().chat.completions.create(**options).choices[0].message.tool_calls
    assert checked("paint", call.function.arguments)


def test_a_forced_call_that_is_cut_is_text(running):
    options = {**ASKED, "tools": [tool()], "tool_choice": "required", "max_tokens": 4}
    choice = running.client().chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls is None and choice.message.content


def test_a_turn_with_a_result_goes_on(running):
    """The whole loop: a call, its result, an answer; the same prompt whether arguments come as text or as an object."""
    turns = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "done"},
    ]
    client = running.client()
    found = client.chat.completions.create(**{**ASKED, "messages": turns, "max_tokens": 3}, tools=[tool()])
    alone = client.chat.completions.create(**{**ASKED, "messages": turns[:1], "max_tokens": 3}, tools=[tool()])
    assert found.usage.prompt_tokens > alone.usage.prompt_tokens + 20
    call = {"function": {"name": "paint", "arguments": {"colour": "red"}}}
    theirs = [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    body = {"model": "red", "stream": False, "tools": [tool()], "options": {"num_predict": 3, "temperature": 0}}
    status, ollama = running.post(
        "/api/chat", {**body, "messages": [*theirs, {"role": "tool", "tool_name": "paint", "content": "done"}]}
    )
    assert status == 200 and ollama["prompt_eval_count"] == found.usage.prompt_tokens


def test_responses_force_calls(running):
    function = {"type": "function", **tool()["function"]}
    client = running.client()
    options = {"model": "red", "max_output_tokens": 120, "tools": [function], "tool_choice": "required"}
    found = client.responses.create(input="paint it", **options)
    (call,) = found.output
    assert (call.type, found.status) == ("function_call", "completed") and checked(call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turns = [{"role": "user", "content": "paint it"}, call.model_dump(), result]
    again = client.responses.create(input=turns, model="red", max_output_tokens=3, tools=[function])
    assert again.output[0].type == "message"
    with client.responses.stream(input="paint it", **options) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert checked("paint", streamed.output[0].arguments)
    assert "response.function_call_arguments.done" in kinds and "response.output_text.delta" not in kinds


@pytest.fixture
def says(running, monkeypatch):
    """Makes the engine say some pieces of text."""

    def say(*pieces, reason="stop"):
        def submit(ticket):
            for event in [Started(1, 0, None), *(Written(p, "", []) for p in pieces), Finished(reason, 3, {})]:
                ticket.deliver(event)

        monkeypatch.setattr(running.engine, "submit", submit)

    return say


WRITTEN = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'


def test_calls_are_told_from_text(running, says):
    says("Wait. <tool", WRITTEN[5:30], WRITTEN[30:] + "\n" + WRITTEN.replace("red", "blue"), "\n")
    client = running.client()
    message = client.chat.completions.create(**ASKED, tools=[tool()]).choices[0].message
    assert message.content == "Wait. "
    assert [json.loads(c.function.arguments)["colour"] for c in message.tool_calls] == ["red", "blue"]
    one = client.chat.completions.create(**ASKED, tools=[tool()], parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1
    chunks = list(client.chat.completions.create(**ASKED, tools=[tool()], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Wait. "
    assert [call.index for delta in deltas for call in delta.tool_calls or ()] == [0, 1]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_text_behind_a_call_keeps_its_spaces(running, says):
    says(WRITTEN, "\n", "\n and", " so", " on", "\nfor ever")
    message = running.client().chat.completions.create(**ASKED, tools=[tool()]).choices[0].message
    assert message.content == "and so on\nfor ever" and len(message.tool_calls) == 1


def test_other_protocols_tell_calls_from_text(running, says):
    says("Wait. ", WRITTEN)
    status, ollama = running.post("/api/chat", {**ASKED, "stream": False, "tools": [tool()]})
    assert status == 200 and ollama["done_reason"] == "stop"
    (call,) = ollama["message"]["tool_calls"]
    assert call["function"] == {"index": 0, "name": "paint", "arguments": {"colour": "red"}}
    function = {"type": "function", **tool()["function"]}
    with running.client().responses.stream(model="red", input="paint it", tools=[function]) as stream:
        for _ in stream:
            pass
        found = stream.get_final_response()
    assert [item.type for item in found.output] == ["message", "function_call"] and found.output_text == "Wait. "


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON</tool_call>",
        '<tool_call>{"name": "erase", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "paint", "arguments": [1]}</tool_call>',
        "<tool_call>" + "[" * 50_000 + "</tool_call>",
        "<tool_call>",
        "1 <tool",
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_stays_text(running, says, text):
    says(*text)
    choice = running.client().chat.completions.create(**ASKED, tools=[tool()]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_without_tools_nothing_is_a_call(running, says):
    says(WRITTEN)
    client = running.client()
    assert client.chat.completions.create(**ASKED).choices[0].message.content == WRITTEN
    none = client.chat.completions.create(**ASKED, tools=[tool()], tool_choice="none").choices[0]
    assert (none.message.content, none.message.tool_calls) == (WRITTEN, None)


def nested(depth):
    schema = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.fixture(scope="module")
def roomy(books):
    """Takes requests of more bytes than tools may have."""
    server = Running(arguments(books, "--log-level", "WARNING"))
    yield server
    server.close()


RESULT = {"role": "tool", "tool_call_id": "unknown", "content": "x"}
DEEP_CALL = {"function": {"name": "paint", "arguments": '{"a": ' + "[" * 300 + "]" * 300 + "}"}}
BAD_CALL = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": "[1]"}}


@pytest.mark.parametrize(
    "extra, param",
    [
        ({"tools": [tool()] * 2}, "tools"),
        ({"tools": [tool(f"f{i}") for i in range(1000)]}, "tools"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool(parameters=nested(40))]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(description="a" * 300_000)]}, "tools"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "erase"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "nothing"}}})], "tool_choice": "required"},
            "tools",
        ),
        ({"tools": [tool()], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [*ASKED["messages"], RESULT]}, "messages[1].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [DEEP_CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x", "arguments": 5}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_tools_are_refused_by_name(roomy, extra, param):
    status, found = roomy.post("/v1/chat/completions", {**ASKED, **extra})
    assert (status, found["error"]["param"]) == (400, param), found
