"""What is wrong with a request is said with 400 and the name of the field, before anything computes."""

import functools
import json
import random

import pytest

from nectar_mlx.serving.constraint import common_multiple
from nectar_mlx.serving.errors import ApiError
from nectar_mlx.serving.schema import ChatRequest, CompletionRequest, OllamaChat, ResponsesRequest, parse

from .running import QUESTIONS, ask, wait_for

DEEP = functools.reduce(lambda schema, _: {"type": "array", "items": schema}, range(400), {"type": "integer"})
# A grammar of it takes minutes, and gigabytes.
SLOW = {"allOf": [{"type": "number", "multipleOf": 7919}, {"multipleOf": 0.0001}, {"multipleOf": 7907}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}
HELLO = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hello"}, "messages"),
        ("chat/completions", {"messages": [1]}, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("chat/completions", {"messages": [IMAGE]}, "messages[0].content"),
        ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 2100}, "messages"),
        ("chat/completions", HELLO | {"tools": [{"type": "function"}]}, "tools[0].function"),
        ("chat/completions", HELLO | {"n": 2}, "n"),
        ("chat/completions", HELLO | {"stop": [5]}, "stop[0]"),
        ("chat/completions", HELLO | {"stop": ["a"] * 5}, "stop"),
        ("chat/completions", HELLO | {"stop": "a" * 257}, "stop"),
        ("chat/completions", HELLO | {"temperature": True}, "temperature"),
        ("chat/completions", HELLO | {"temperature": -1}, "temperature"),
        ("chat/completions", HELLO | {"top_k": True}, "top_k"),
        ("chat/completions", HELLO | {"xtc_probability": 1, "xtc_threshold": 1}, "xtc_threshold"),
        ("chat/completions", HELLO | {"seed": 10**400}, "seed"),
        ("chat/completions", HELLO | {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", HELLO | {"max_tokens": 10**400}, "max_tokens"),
        ("chat/completions", HELLO | {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat/completions", HELLO | {"logit_bias": {"999999": 1}}, "logit_bias"),
        ("chat/completions", HELLO | {"logit_bias": {"1": None}}, "logit_bias[...]"),
        ("chat/completions", HELLO | {"adapters": "/tmp"}, "adapters"),
        ("chat/completions", HELLO | {"draft_model": "other"}, "draft_model"),
        ("chat/completions", HELLO | {"chat_template_kwargs": {"chat_template": ""}}, "chat_template_kwargs"),
        ("chat/completions", HELLO | {"response_format": {"type": "xml"}}, "response_format.type"),
        ("chat/completions", HELLO | {"response_format": {"type": "json_schema"}}, "response_format"),
        (
            "chat/completions",
            HELLO | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format",
        ),
        (
            "chat/completions",
            HELLO | {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
            "response_format",
        ),
        (
            "chat/completions",
            HELLO | {"response_format": {"type": "json_schema", "json_schema": {"schema": SLOW}}},
            "response_format",
        ),
        ("chat/completions", HELLO | {"exact": 0.1}, None),
        ("chat/completions", HELLO | {"exact": 2}, "exact"),
        ("chat/completions", {}, "messages"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"prompt": 7}, "prompt"),
        ("completions", {"prompt": "x", "echo": True}, "echo"),
        ("responses", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"input": "x", "tools": [{}]}, "tools[0].function"),
        ("responses", {"input": 3}, "input"),
        ("embeddings", {"input": []}, "input"),
    ],
)
def test_bad_requests(running, path, body, param):
    status, found = running.post(f"/v1/{path}", {"model": "red", "max_tokens": 3, **body})
    assert status == 400
    assert set(found["error"]) == {"message", "type", "code", "param"}
    assert found["error"]["param"] == (param if param != "messages" or "messages" in body else found["error"]["param"])
    assert wait_for(lambda: running.engine.open == 0)


@pytest.mark.parametrize(
    "extra",
    [
        dict.fromkeys(("stop", "temperature", "top_p", "n", "seed", "tools", "stream", "logit_bias", "max_tokens")),
        {"stop": "", "tools": [], "n": 1, "response_format": {"type": "text"}, "stream_options": {}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"temperature": 1, "top_k": 10**9, "user": "me", "metadata": {"a": "b"}},
        {"temperature": 1, "xtc_probability": 1, "xtc_threshold": 0.5},
        {"temperature": 1, "min_p": 1, "top_p": 0},
        {"temperature": 5e-324},
        {"seed": -1, "temperature": 1},
    ],
    ids=str,
)
def test_good_requests(running, extra):
    assert running.post("/v1/chat/completions", {"model": "red", "max_tokens": 2, **HELLO, **extra})[0] == 200


def test_a_developer_is_a_system(running):
    turns = [[{"role": role, "content": "be brief"}, *HELLO["messages"]] for role in ("system", "developer")]
    found = [running.post("/v1/chat/completions", {"model": "red", "max_tokens": 4, "messages": t})[1] for t in turns]
    assert found[0]["choices"] == found[1]["choices"] and found[0]["usage"]["prompt_tokens"] > 10


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"messages": ' + b"[" * 5000),
        *(b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"prompt": "\\ud800"}', b'{"a": 1' + b"0" * 5000),
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponsesRequest, OllamaChat])
def test_bodies_that_are_no_request(body, kind):
    with pytest.raises(ApiError) as error:
        parse(body, kind)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "path, body", [("chat/completions", HELLO), ("completions", {"prompt": "x"}), ("responses", {"input": "x"})]
)
def test_an_unknown_model(running, path, body):
    status, found = running.post(f"/v1/{path}", body | {"model": "green"})
    assert (status, found["error"]["code"], found["error"]["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "method, path, status", [("POST", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/v1/models", 405)]
)
def test_an_unknown_path_or_method(running, method, path, status):
    assert running.request(method, path, {})[0] == status


@pytest.mark.parametrize("start, end", [("0", "9" * 5000), ("x", "1"), ("-1", "1"), ("2", "1")])
def test_a_passage_that_cannot_be(running, start, end):
    status, found, _ = running.request("GET", f"/api/library/passage/{start}/{end}/red")
    assert status == 400 and json.loads(found)["error"]["message"] == "the text has no such passage"


@pytest.mark.parametrize(
    "numbers, expected", [([], 1), ([4, 6], 12), ([0.01, 5], 500), ([0.25, 0.1], 10), ([0, -3], 3), ([1e300], 10**300)]
)
def test_the_common_multiple_of_a_schema(numbers, expected):
    assert common_multiple({"anyOf": [{"items": {"multipleOf": number}} for number in numbers]}) == expected


def test_errors_of_a_stream_are_answers(running):
    """They are known before it begins."""
    status, found = running.post("/v1/chat/completions", {"model": "red", "stream": True, "max_tokens": 10**6, **HELLO})
    assert status == 400 and "room" in found["error"]["message"]


NUMBERS = [0, -1, 2, 0.5, 1e308, 10**400, 2**63, float("nan"), float("inf")]
VALUES = [
    *(None, True, *NUMBERS, "", "x", "\ud800", "\0", "a" * 5000),
    *([], [1], ["x"], [None], [[]], {}, {"a": 1}, {"1": 1}, {"1": float("nan")}, {"1": None}, {"-1": 1}),
]
FIELDS = [
    *ChatRequest.__struct_fields__,
    *("prompt", "input", "suffix", "echo", "best_of", "instructions", "options", "format", "think", "keep_alive"),
]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/api/chat", "/api/generate")


def test_every_field_with_a_wrong_value_is_answered(running, answers):
    """A sample of all combinations, which the slow test has."""
    for field, value, path, stream in random.Random(0).sample(combinations(), 150):
        assert 200 <= fuzzed(running, field, value, path, stream) < 500, (field, value, path)
    assert ask(running.client(), "red", QUESTIONS[0]).choices[0].message.content == answers["red", QUESTIONS[0]]


@pytest.mark.slow
def test_all_fields_with_all_wrong_values_are_answered(running):
    for field, value, path, stream in combinations():
        assert 200 <= fuzzed(running, field, value, path, stream) < 500, (field, value, path)
    assert wait_for(lambda: running.engine.open == 0)


def combinations():
    return [
        (field, value, path, number % 2 == 0)
        for path in PATHS
        for field in FIELDS
        for number, value in enumerate(VALUES)
    ]


def fuzzed(running, field, value, path, stream) -> int:
    ours = {"model": "red", "prompt": "who?", "input": "who?", "max_tokens": 2, "stream": stream, **HELLO}
    return running.request("POST", path, json.dumps({**ours, "options": {"num_predict": 2}, field: value}).encode())[0]
