"""The other APIs: OpenAI's responses through its client, Ollama's as its front ends use it, embeddings, metrics."""

import json

import numpy as np
import pytest

from nectar_mlx.evaluation import similarity

from .running import QUESTIONS, TOKENS, wait_for

ENDS = {"logit_bias": {"1": 100}}


def test_responses(running, answers):
    client, expected = running.client(), answers["red", QUESTIONS[0]]
    options = {"model": "red", "max_output_tokens": TOKENS, "temperature": 0}
    found = client.responses.create(input=QUESTIONS[0], **options)
    assert (found.output_text, found.status) == (expected, "incomplete")
    turns = [{"role": "user", "content": [{"type": "input_text", "text": QUESTIONS[0]}]}]
    assert client.responses.create(input=turns, **options).output_text == expected
    told = client.responses.create(input=QUESTIONS[0], instructions="be brief", **options)
    assert told.usage.input_tokens > found.usage.input_tokens


def test_streamed_responses(running, answers):
    client = running.client()
    options = {"model": "red", "input": QUESTIONS[0], "max_output_tokens": TOKENS, "temperature": 0}
    events = list(client.responses.create(stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answers["red", QUESTIONS[0]] == events[-1].response.output_text
    with client.responses.stream(extra_body=ENDS, **options) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().status == "completed"
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def lines(running, path, body):
    status, content, headers = running.request("POST", path, body)
    assert status == 200 and headers["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in content.splitlines()]


def test_ollama(running, answers):
    models = json.loads(running.request("GET", "/api/tags")[1])["models"]
    assert [model["name"] for model in models] == ["red", "blue"]
    assert json.loads(running.request("GET", "/api/version")[1])["version"]
    assert running.post("/api/show", {"model": "blue:latest"})[1]["capabilities"] == ["completion", "tools"]
    options = {"temperature": 0, "num_predict": TOKENS}
    body = {"model": "red", "messages": [{"role": "user", "content": QUESTIONS[0]}], "options": options}
    streamed = lines(running, "/api/chat", body)
    expected = answers["red", QUESTIONS[0]]
    assert "".join(line["message"]["content"] for line in streamed) == expected
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    assert running.post("/api/chat", {**body, "stream": False})[1]["message"]["content"] == expected
    generated = {"model": "red", "prompt": QUESTIONS[0], "options": options}
    assert "".join(line["response"] for line in lines(running, "/api/generate", generated)) == expected
    assert running.post("/api/generate", {"model": "red"})[1]["done_reason"] == "load"
    status, error = running.post("/api/chat", {**body, "model": "green"})
    assert status == 404 and "green" in error["error"]
    status, error = running.post("/api/chat", {**body, "options": {"num_predict": True}})
    assert status == 400 and "num_predict" in error["error"]


def test_ollama_answers_of_a_schema(running):
    body = {"model": "red", "messages": [{"role": "user", "content": "x"}], "stream": False}
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    assert running.post("/api/chat", {**body, "format": schema})[1]["message"]["content"] == '{"a": 1}'


def test_embeddings(running, monkeypatch, tmp_path):
    """Without the encoder a word about it; a stand-in shows the rest."""
    monkeypatch.setattr(similarity, "minilm_folder", lambda: tmp_path / "absent")
    status, found = running.post("/v1/embeddings", {"input": "x"})
    assert status == 400 and found["error"]["code"] == "encoder_missing"

    class Encoder:
        def __init__(self, folder):
            pass

        def embed(self, texts):
            return np.array([[len(text), 0.5] for text in texts])

    monkeypatch.setattr(similarity, "minilm_folder", lambda: tmp_path)
    monkeypatch.setattr(similarity, "MiniLM", Encoder)
    client = running.client()
    found = client.embeddings.create(model="any", input=["a", "bcd"])
    assert [entry.embedding for entry in found.data] == [[1, 0.5], [3, 0.5]]
    assert running.post("/v1/embeddings", {"input": "abcd"})[1]["data"][0]["embedding"] == [4, 0.5]


def test_metrics(running):
    before = metrics(running)
    running.client().responses.create(model="red", input=QUESTIONS[3], max_output_tokens=3)
    expected = before["nectar_answer_tokens_total"] + 3  # counted when the answer has gone out
    wait_for(lambda: metrics(running)["nectar_answer_tokens_total"] == expected)
    after = metrics(running)
    path = 'nectar_requests_total{path="/v1/responses",status="200"}'
    assert after[path] == before.get(path, 0) + 1
    assert after["nectar_open_files"] >= 1


def metrics(running) -> dict[str, float]:
    text = running.request("GET", "/metrics")[1].decode()
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("path, kind", [("/", "text/html"), ("/page/it.js", "javascript")])
def test_a_page(books, tmp_path, path, kind, monkeypatch):
    """A folder of static files is shown at /, under a strict policy."""
    from starlette.testclient import TestClient

    from nectar_mlx.serving.app import make_app
    from nectar_mlx.serving.guard import Access
    from nectar_mlx.serving.metrics import Metrics

    (tmp_path / "index.html").write_text("<script src=/page/it.js></script>")
    (tmp_path / "it.js").write_text("1")

    class Engine:
        metrics = Metrics()

    class Service:
        engine = Engine()

    app = make_app(Service(), Access(), max_body=1000, page=tmp_path)
    found = TestClient(app, base_url="http://localhost").get(path)
    assert found.status_code == 200 and kind in found.headers["Content-Type"]
    assert "script-src 'self'" in found.headers["Content-Security-Policy"]
    assert TestClient(app, base_url="http://localhost").get("/page/../app.py").status_code == 404
