"""The server, with the client that people use: answers are those of single requests, and no client can end it."""

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import mlx.core as mx
import mlx_lm
import openai
import pytest
from mlx_lm import server as mlx_server

from nectar_mlx import Nectar, NectarError, serve
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.mlxlm import prompts
from nectar_mlx.serving.provider import ContextTokenizer, PromptCache
from tests import toys
from tests.fitting.test_fit import FAST, TEXT

QUESTIONS = [
    f"{who} is the {what}?" for who in ("who", "where", "why") for what in ("fox", "dog", "answer", "quick brown")
]
TOKENS = 10


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two contexts on one model."""
    folder = tmp_path_factory.mktemp("books")
    return [toys.book(folder, name=name, seed=seed) for seed, name in enumerate(["red", "blue"])]


@pytest.fixture(scope="module")
def answers(books):
    """What one request alone gets, by book and question."""
    model, tokenizer = mlx_lm.load(str(books[0].folder))
    found = {}
    for book in books:
        nectar = Nectar.load(book.path, model, tokenizer)
        for question in QUESTIONS:
            prompt = nectar.prompt(tokenizer, question)
            cache = nectar.make_cache()
            text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=cache)
            found[book.path.stem, question] = text
    assert all(found["red", q] != found["blue", q] for q in QUESTIONS), "or a mixed-up context would go unnoticed"
    return found


def arguments(books, *extra: str) -> argparse.Namespace:
    return serve.make_parser().parse_args([*(str(b.path) for b in books), "--port", "0", *extra])


class Running:
    """A server in this process."""

    def __init__(self, args: argparse.Namespace):
        self.httpd = serve.start(args)
        self.port = self.httpd.server_address[1]
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.05,))
        self.thread.start()

    def client(self, key: str = "key") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Authorization": "Bearer key", **headers})
        response = connection.getresponse()
        return response.status, response.read()

    def close(self) -> None:
        self.httpd.shutdown()
        self.thread.join()
        self.httpd.stop()


@pytest.fixture(scope="module")
def running(books):
    server = Running(arguments(books, "--api-key", "key", "--max-body", "5000", "--log-level", "WARNING"))
    yield server
    server.close()


def ask(client, model, question, **options):
    messages = [{"role": "user", "content": question}]
    options = {"max_tokens": TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=messages, **options)


def test_models(running):
    client = running.client()
    assert [m.id for m in client.models.list()] == ["red", "blue"]
    assert client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("green")


def test_chat_and_stream(running, answers):
    client = running.client()
    for book in ("red", "blue", "red"):
        expected = answers[book, QUESTIONS[0]]
        assert ask(client, book, QUESTIONS[0]).choices[0].message.content == expected
        pieces = [c.choices[0].delta.content or "" for c in ask(client, book, QUESTIONS[0], stream=True)]
        assert "".join(pieces) == expected
    usage = list(ask(client, "red", QUESTIONS[0], stream=True, stream_options={"include_usage": True}))[-1].usage
    assert usage.completion_tokens <= TOKENS


def test_completion_continues_the_document(running, books):
    model, tokenizer = mlx_lm.load(str(books[0].folder))
    nectar = Nectar.load(books[0].path, model, tokenizer)
    prompt = tokenizer.encode("the quick", add_special_tokens=False)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=nectar.make_cache())
    options = {"model": "red", "max_tokens": TOKENS, "temperature": 0}
    found = running.client().completions.create(prompt="the quick", **options).choices[0].text
    assert found == expected


def test_concurrent_requests_on_two_books(running, answers):
    """32 at a time, interleaved, some of them streams: no error, and never the other book's answer."""
    client = running.client()

    def one(number):
        book, question = ("red", "blue")[number % 2], QUESTIONS[number % len(QUESTIONS)]
        if number % 3:
            return book, question, ask(client, book, question).choices[0].message.content
        stream = ask(client, book, question, stream=True)
        return book, question, "".join(c.choices[0].delta.content or "" for c in stream)

    with ThreadPoolExecutor(32) as pool:
        for book, question, found in pool.map(one, range(64)):
            assert found == answers[book, question]


def test_several_turns_reuse_what_was_read(running, books):
    client = running.client()
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    options = {"model": "red", "max_tokens": TOKENS, "temperature": 0}
    first = client.chat.completions.create(messages=messages, **options)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    second = client.chat.completions.create(messages=messages, **options)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 2
    model, tokenizer = mlx_lm.load(str(books[0].folder))
    nectar = Nectar.load(books[0].path, model, tokenizer)
    prompt = nectar.prompt(tokenizer, messages)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=nectar.make_cache())
    assert second.choices[0].message.content == expected
    assert second.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("architecture, read", [("llama", 7), ("gemma3_text", 0)])
def test_a_prompt_that_is_wholly_cached(architecture, read):
    """mlx-lm keeps prompt and answer: sent back as a prompt, nothing would be left to read, which ends its thread."""
    model = toys.toy(architecture)
    cache = toys.exact(model, toys.random_tokens(60)).make_cache()
    tokens = toys.random_tokens(8, seed=1)
    model(mx.array([tokens]), cache=cache)
    kept = PromptCache(10)
    kept.insert_cache("red", tokens, cache)
    found, rest = kept.fetch_nearest_cache("red", tokens)
    assert rest == tokens[read:]
    assert (found is None) == (read == 0)
    if found is not None:
        assert [layer.size() for layer in found] == [read] * toys.LAYERS
    assert [layer.offset for layer in cache] == [68] * toys.LAYERS


def test_a_seeded_request_is_reproducible(running):
    client = running.client()
    found = [ask(client, "red", QUESTIONS[2], seed=7, temperature=1.0).choices[0].message.content for _ in range(2)]
    assert found[0] == found[1]


def test_an_aborted_stream_leaves_the_server_well(running, answers):
    client = running.client()
    for _ in range(3):
        stream = ask(client, "red", QUESTIONS[0], stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    assert ask(client, "red", QUESTIONS[0]).choices[0].message.content == answers["red", QUESTIONS[0]]
    assert wait_for(lambda: running.httpd.open_requests == 0)


def test_memory_returns_to_where_it_was(running):
    client, cache = running.client(), running.httpd.generator.prompt_cache
    batch = [(book, q) for book in ("red", "blue") for q in QUESTIONS]

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda pair: ask(client, *pair), batch))
        ask(client, *batch[0])  # alone: what the last batch leaves behind is always the same
        cache.trim_to(n_sequences=0)

    def used():
        """Once it has settled: the generation thread still frees some after its last answer."""
        readings = []

        def settled():
            mx.clear_cache()
            readings.append(mx.get_active_memory())
            return readings[-4:].count(readings[-1]) == 4

        assert wait_for(settled)
        return readings[-1]

    work()
    work()
    before = used()
    for _ in range(3):
        work()
    assert used() <= before + 100_000, "a sequence that was kept would be of this size"


def test_a_wrong_key(running):
    with pytest.raises(openai.AuthenticationError):
        ask(running.client("wrong"), "red", QUESTIONS[0])
    with pytest.raises(openai.AuthenticationError):
        running.client("x").models.list()
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_an_unknown_model(running):
    with pytest.raises(openai.NotFoundError, match="green"):
        ask(running.client(), "green", QUESTIONS[0])


def test_an_oversized_body(running):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(running.client(), "red", "x" * 40_000)
    assert refused.value.status_code == 413


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("chat/completions", {"messages": []}, 400),
        ("chat/completions", {"messages": "hello"}, 400),
        ("chat/completions", {"messages": [1]}, 400),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": [5]}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": ""}, 200),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_k": 10**9}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"999999": 1}}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "adapters": "/tmp"}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "draft_model": "other"}, 400),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "stream": True, "stream_options": {}},
            200,
        ),
        ("chat/completions", {}, 400),
        ("completions", {"prompt": ""}, 400),
        ("completions", {"prompt": ["a", "b"]}, 400),
        ("completions", {"prompt": 7}, 400),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("nonsense", {}, 404),
    ],
)
def test_bad_requests(running, path, body, status):
    found, _ = running.post(f"/v1/{path}", json.dumps({"model": "red", "max_tokens": 3, **body}).encode())
    assert found == status
    assert running.httpd.generator.is_healthy


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_bodies_that_are_no_json(running, body):
    status, _ = running.post("/v1/chat/completions", body)
    assert status == 400
    assert running.httpd.generator.is_healthy


@pytest.mark.parametrize("length", ["-5", "many", "1e3", "9" * 40])
def test_lying_lengths(running, length):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        head = f"POST /v1/completions HTTP/1.0\r\nAuthorization: Bearer key\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 400 " in connection.recv(200)


def test_too_many_open_requests(books):
    server = Running(arguments(books[:1], "--max-requests", "2", "--log-level", "WARNING"))
    try:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        assert wait_for(lambda: server.httpd.open_requests == 2)
        with pytest.raises(openai.APIStatusError) as refused:
            server.client().models.list()
        assert refused.value.status_code == 503
        for connection in idle:
            connection.close()
        assert wait_for(lambda: server.httpd.open_requests == 0)
        assert [m.id for m in server.client().models.list()] == ["red"]  # and without a key, for none was set
    finally:
        server.close()


def test_a_text_read_in_chunks_answers_from_the_nearest(tmp_path):
    folder, tokenizer, words = tmp_path / "model", toys.tokenizer(), ("copper", "velvet", "marble")
    model = toys.toy("llama", max_position_embeddings=1024 + 200)
    toys.save_model(model, folder, tokenizer)
    room = 200 - prompts.preamble(tokenizer)
    filler = tokenizer.encode(TEXT)
    pieces = [
        f"{tokenizer.decode(filler[: room // 2])} The {w} is here. {tokenizer.decode(filler[: room // 3])}"
        for w in words
    ]
    fitted = toys.fit(
        model,
        tokenizer,
        "".join(pieces),
        config=FitConfig(**FAST | {"budget": 0.5, "queries": 300, "steps": 2}),
        name=str(folder),
    )
    fitted.save(tmp_path / "it.nectar")
    server = Running(serve.make_parser().parse_args([str(tmp_path / "it.nectar"), "--port", "0"]))
    try:
        client = server.client()
        model, tokenizer = mlx_lm.load(str(folder))
        fitted = Nectar.load(tmp_path / "it.nectar", model, tokenizer)
        for word in words:
            question = f"Where is the {word}?"
            chunk = fitted.nearest(tokenizer, question)
            prompt, cache = fitted.prompt(tokenizer, question), fitted.chunk(chunk).make_cache()
            expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=cache)
            found = ask(client, "it", question)
            assert (found.model, found.chunk) == ("it", chunk)
            assert found.choices[0].message.content == expected
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
        turns.append({"role": "user", "content": "zebra?"})
        options = {"model": "it", "max_tokens": 2, "temperature": 0}
        assert client.chat.completions.create(messages=turns, **options).chunk == chunk, "the question before decides"
        for more in ({"messages": turns[2:]}, {"messages": turns, "extra_body": {"whole": True}}):
            assert not hasattr(client.chat.completions.create(**more, **options), "chunk")
        assert client.completions.create(prompt="velvet", **options).chunk == fitted.nearest(tokenizer, "velvet")
    finally:
        server.close()


def test_an_answer_stays_within_the_window(tmp_path):
    book = toys.book(tmp_path, max_position_embeddings=200)
    server = Running(arguments([book], "--log-level", "WARNING"))
    try:
        client, room, endless = server.client(), 200 - toys.CONTEXT, {"logit_bias": {"1": -1000}}
        messages = [{"role": "user", "content": "x"}]
        cut = client.chat.completions.create(model="book", messages=messages, temperature=0, **endless)
        assert cut.usage.prompt_tokens + cut.usage.completion_tokens == room, "where nobody chose a length"
        left = cut.usage.completion_tokens
        assert ask(client, "book", "x", max_tokens=left, **endless).usage.completion_tokens == left
        for refused, message in (
            ({"max_tokens": left + 1}, f"room for {left}"),
            ({"max_completion_tokens": left + 1, "max_tokens": None, "stream": True}, f"room for {left}"),
            ({"seed": 1, "max_tokens": left + 1}, f"room for {left}"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                ask(client, "book", "x", **refused)
        with pytest.raises(openai.BadRequestError, match=f"room for {room}, the answer included"):
            ask(client, "book", "fox " * room)
        with pytest.raises(openai.BadRequestError, match=f"room for {room}, the answer included"):
            client.completions.create(model="book", prompt="fox " * room)
        assert ask(client, "book", "x", **endless).usage.completion_tokens == TOKENS
    finally:
        server.close()


def test_control_tokens_in_a_request_stay_text(running, books):
    """In a message and in a text to complete; as words that end an answer they are the tokens."""
    client = running.client()
    plain, marked = (ask(client, "red", question).usage.prompt_tokens for question in ("fox", "fox<|im_end|>"))
    written = len(prompts.encode(mlx_lm.load(str(books[0].folder))[1], "<|im_end|>"))
    assert written > 5 and marked == plain + written
    completed = client.completions.create(model="red", prompt="<|im_end|>", max_tokens=1)
    assert completed.usage.prompt_tokens == written
    assert ContextTokenizer(mlx_lm.load(str(books[0].folder))[1]).encode("<|im_end|>") == [1]


def test_a_quantised_conversation_cache(tmp_path):
    """With --kv-bits mlx-lm would put its own quantised cache in the place of ours, and lose the context."""
    book = toys.book(tmp_path, "qwen3", name="wide", head_dim=32)
    server = Running(arguments([book], "--kv-bits", "8", "--quantized-kv-start", "0"))
    try:
        found = ask(server.client(), "wide", QUESTIONS[0]).choices[0].message.content
        model, tokenizer = mlx_lm.load(str(book.folder))
        nectar = Nectar.load(book.path, model, tokenizer)
        prompt, cache = nectar.prompt(tokenizer, QUESTIONS[0]), nectar.make_cache(kv_bits=8)
        assert found == mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=cache)
    finally:
        server.close()


def test_a_draft_model(books, answers):
    """It does not see the context: its proposals may fail, the answers stay."""
    server = Running(arguments(books, "--draft-model", str(books[0].folder)))
    try:
        for book in ("red", "blue"):
            found = ask(server.client(), book, QUESTIONS[0]).choices[0].message.content
            assert found == answers[book, QUESTIONS[0]]
    finally:
        server.close()


@pytest.mark.parametrize(
    "extra, complaint",
    [
        (["--host", "0.0.0.0"], "other machines.*--api-key"),
        (["--host", "::"], "other machines"),
        (["--adapter-path", "x"], "--adapter-path"),
        (["--chat-template", "x"], "--chat-template"),
        (["--model", "/nonexistent/model"], "nonexistent"),
    ],
)
def test_refused_at_the_start(books, extra, complaint):
    with pytest.raises(NectarError, match=complaint):
        serve.start(arguments(books, *extra))


def test_every_option_of_mlx_lm_is_there_with_its_default(monkeypatch):
    """Its server reads them from our parser's result, and what was typed for it is typed for ours."""
    theirs = argparse.ArgumentParser()

    def parse_args():
        raise InterruptedError

    monkeypatch.setattr(theirs, "parse_args", parse_args)
    monkeypatch.setattr(argparse, "ArgumentParser", lambda **_: theirs)
    with pytest.raises(InterruptedError):
        mlx_server.main()
    monkeypatch.undo()
    expected, ours = vars(theirs.parse_args([])), vars(serve.make_parser().parse_args(["it.nectar"]))
    expected |= {"allowed_origins": [], "adapter_path": ""}
    assert {name: ours.get(name, "missing") for name in expected} == expected


def test_files_that_cannot_be_served(books, tmp_path):
    (tmp_path / "red.nectar").write_bytes(books[1].path.read_bytes())
    args = arguments(books)
    args.nectars = [str(books[0].path), str(tmp_path / "red.nectar")]
    with pytest.raises(NectarError, match="same name"):
        serve.start(args)
    (tmp_path / "cut.nectar").write_bytes(books[1].path.read_bytes()[:-50])
    args.nectars = [str(tmp_path / "cut.nectar")]
    with pytest.raises(NectarError, match="cut short"):
        serve.start(args)


def test_a_port_in_use(books, running):
    with pytest.raises(NectarError, match="cannot listen"):
        serve.start(arguments(books, "--port", str(running.port)))


@pytest.mark.process
def test_a_signal_ends_it_in_order(books):
    command = [sys.executable, "-m", "nectar_mlx", "serve", str(books[0].path), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("serving"):
            break
    port = int(lines[-1].rsplit(":", 1)[1].split("/")[0])
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
    stream = ask(client, "red", QUESTIONS[0], stream=True, max_tokens=20)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert len(list(stream)) > 3, "what was under way is finished"
    assert process.wait(timeout=20) == 0
    assert "Traceback" not in process.stderr.read()


def test_ctrl_c_ends_it_in_order(books, monkeypatch, capsys):
    def interrupted(server):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    assert serve.main([str(books[0].path), "--port", "0", "--log-level", "WARNING"]) == 0
    signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("serving ") and lines[-1] == "stopping"


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
