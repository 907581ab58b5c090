"""Answers of the server are those of single requests, whoever else asks."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import openai
import pytest

from nectar_mlx import Nectar, serve
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.samples import self_study
from nectar_mlx.mlxlm import prompts
from nectar_mlx.serving import decoding
from tests import toys
from tests.fitting.test_fit import FAST, TEXT
from tests.fitting.toy_fit import FEW_TOGETHER

from .running import ENDLESS, QUESTIONS, TOKENS, Running, alone, arguments, ask, wait_for


def test_models(running):
    client = running.client()
    assert [m.id for m in client.models.list()] == ["red", "blue"]
    assert client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError, match="green"):
        client.models.retrieve("green")


def test_chat_and_stream(running, answers):
    client = running.client()
    for book in ("red", "blue", "red"):
        expected = answers[book, QUESTIONS[0]]
        assert ask(client, book, QUESTIONS[0]).choices[0].message.content == expected
        pieces = [c.choices[0].delta.content or "" for c in ask(client, book, QUESTIONS[0], stream=True)]
        assert "".join(pieces) == expected and len(pieces) > 2
    usage = list(ask(client, "red", QUESTIONS[0], stream=True, stream_options={"include_usage": True}))[-1].usage
    assert 0 < usage.completion_tokens <= TOKENS


def test_the_request_that_the_documentation_shows(running):
    shown = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    path, body = re.findall(r"curl http://127\.0\.0\.1:8080(\S+) .*?-d '(.*?)'", shown, re.S)[0]
    status, reply = running.post(path, json.loads(body) | {"model": "red", "max_tokens": TOKENS})
    assert status == 200 and reply["choices"][0]["message"]["role"] == "assistant"


def test_completion_continues_the_document(running, books):
    model, tokenizer = mlx_lm.load(str(books[0].folder))
    nectar = Nectar.load(books[0].path, model, tokenizer)
    prompt = tokenizer.encode("the quick", add_special_tokens=False)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS, prompt_cache=nectar.make_cache())
    options = {"model": "red", "prompt": "the quick", "max_tokens": TOKENS, "temperature": 0}
    client = running.client()
    assert client.completions.create(**options).choices[0].text == expected
    pieces = client.completions.create(stream=True, **options)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_concurrent_requests_on_two_books(running, answers):
    """32 at a time, interleaved, a third of them streams that are left: never the other book's answer."""
    client = running.client()

    def one(number):
        book, question = ("red", "blue")[number % 2], QUESTIONS[number % len(QUESTIONS)]
        if number % 3:
            return book, question, ask(client, book, question).choices[0].message.content
        with ask(client, book, question, stream=True, max_tokens=300, extra_body=ENDLESS) as stream:
            next(iter(stream))
        return book, question, answers[book, question]

    with ThreadPoolExecutor(32) as pool:
        for book, question, found in pool.map(one, range(64)):
            assert found == answers[book, question]
    assert wait_for(lambda: running.engine.open == 0)


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
    assert second.choices[0].message.content == alone(books[0], messages)


def test_the_same_prompt_again_reads_one_token(running, answers):
    for _ in range(2):
        found = ask(running.client(), "blue", QUESTIONS[5])
    assert found.usage.prompt_tokens_details.cached_tokens == found.usage.prompt_tokens - 1
    assert found.choices[0].message.content == answers["blue", QUESTIONS[5]]


def test_a_prompt_in_many_pieces(books):
    server = Running(arguments(books, "--prefill-step-size", "7", "--prompt-cache-size", "0"))
    try:
        for question in (QUESTIONS[0], "fox " * 50):
            found = ask(server.client(), "red", question)
            assert found.choices[0].message.content == alone(books[0], question)
    finally:
        server.close()


def test_seeded_requests_are_reproducible_beside_others(running):
    client = running.client()

    def drawn():
        return ask(client, "red", QUESTIONS[2], seed=7, temperature=1.0).choices[0].message.content

    first = drawn()
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, client, "red", q, temperature=1.0, max_tokens=30) for q in QUESTIONS]
        assert drawn() == first
        assert all(other.result() for other in others)


def test_an_answer_ends_before_a_stop_string(running, answers):
    """Across tokens, streamed or not; generation ends there."""
    client = running.client()
    (book, question), whole = next(
        (key, text) for key, text in answers.items() if len(text) == TOKENS and text[:5].isascii()
    )
    stop = whole[3:5]
    for stops in (stop, [stop, "zzzz"], ["", stop]):
        found = ask(client, book, question, stop=stops)
        assert found.choices[0].message.content == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < TOKENS
    pieces = list(ask(client, book, question, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(running):
    client = running.client()
    found = ask(client, "red", QUESTIONS[0], logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == TOKENS
    assert all(t.logprob == t.top_logprobs[0].logprob >= t.top_logprobs[2].logprob for t in found)
    assert ask(client, "red", QUESTIONS[0], logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed = [c.choices[0].logprobs for c in ask(client, "red", QUESTIONS[0], logprobs=True, stream=True)]
    assert sum(len(piece.content) for piece in streamed if piece) == TOKENS
    completed = client.completions.create(model="red", prompt="x", max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(completed.token_logprobs) == 4 and all(len(top) <= 2 for top in completed.top_logprobs)


def test_an_answer_of_a_schema_is_json_of_it(running):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    for form in (
        {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}},
    ):
        found = ask(running.client(), "red", QUESTIONS[0], response_format=form, max_tokens=40)
        assert found.choices[0].message.content in ('{"a": "x"}', '{"a": "y"}')
        assert found.choices[0].finish_reason == "stop"
    found = ask(running.client(), "red", QUESTIONS[0], response_format={"type": "json_object"}, max_tokens=5)
    assert found.choices[0].message.content.startswith("{")


def test_thoughts_are_apart_from_the_answer(tmp_path, monkeypatch):
    """A template that opens a thought: everything is one until the end marker, which a bias provokes."""
    tokenizer = toys.tokenizer(toys.CHAT + "{% if enable_thinking %}<think>\n{% endif %}")
    model = toys.toy("llama")
    toys.save_model(model, tmp_path / "model", tokenizer)
    end = tokenizer.get_vocab()["</think>"]
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer, name=str(tmp_path / "model"))
    nectar.save(tmp_path / "it.nectar")
    server = Running(serve.make_parser().parse_args([str(tmp_path / "it.nectar"), "--port", "0"]))
    try:
        extra = {"chat_template_kwargs": {"enable_thinking": True}}
        message = ask(server.client(), "it", "who?", extra_body=extra).choices[0].message
        assert message.reasoning and not message.content
        ended = ask(server.client(), "it", "who?", extra_body=extra | {"logit_bias": {str(end): 100}})
        assert "</think>" in ended.choices[0].message.content, "the first ends the thought, the others are text"
        plain = ask(server.client(), "it", "what is <think>?").choices[0].message
        assert not hasattr(plain, "reasoning") and plain.content
    finally:
        server.close()


def test_memory_returns_to_where_it_was(books):
    server = Running(arguments(books, "--prompt-cache-size", "0", "--log-level", "WARNING"))
    client = server.client()

    def used():
        """Between two steps, when nothing is left to do."""
        assert wait_for(lambda: server.engine.open == 0)
        return server.engine.call(lambda: (mx.synchronize(), mx.get_active_memory())[1]).result(60)

    def work():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda q: ask(client, "red", q), QUESTIONS))
        ask(client, "blue", QUESTIONS[0])  # alone: what the last batch leaves behind is always the same

    try:
        work()
        before = used()
        for _ in range(3):
            work()
        assert used() <= before + 100_000, "a sequence that was kept would be of this size"
    finally:
        server.close()


def test_a_text_read_in_chunks_answers_from_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr(self_study, "FEWEST_TOGETHER", FEW_TOGETHER)
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
        likeliest = fitted.likeliest_chunk(model, tokenizer, "zebra?")
        assert client.chat.completions.create(messages=turns[2:], **options).chunk == likeliest, "no word tells"
        whole = client.chat.completions.create(messages=turns, extra_body={"whole": True}, **options)
        assert not hasattr(whole, "chunk")
        assert client.completions.create(prompt="velvet", **options).chunk == fitted.nearest(tokenizer, "velvet")
    finally:
        server.close()


def test_an_answer_stays_within_the_window(tmp_path):
    book = toys.book(tmp_path, max_position_embeddings=200)
    server = Running(arguments([book], "--log-level", "WARNING"))
    try:
        client, room = server.client(), 200 - toys.CONTEXT
        messages = [{"role": "user", "content": "x"}]
        cut = client.chat.completions.create(model="book", messages=messages, temperature=0, **ENDLESS)
        assert cut.usage.prompt_tokens + cut.usage.completion_tokens == room, "where nobody chose a length"
        assert cut.choices[0].finish_reason == "length"
        left = cut.usage.completion_tokens
        assert ask(client, "book", "x", max_tokens=left, **ENDLESS).usage.completion_tokens == left
        for refused, message in (
            ({"max_tokens": left + 1}, f"room for {left}"),
            ({"max_completion_tokens": left + 1, "max_tokens": None, "stream": True}, f"room for {left}"),
            ({"seed": 1, "max_tokens": left + 1}, f"room for {left}"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                ask(client, "book", "x", **refused)
        with pytest.raises(openai.BadRequestError, match=f"room for {room}, the answer included"):
            ask(client, "book", "fox " * (room - 8))
        with pytest.raises(openai.BadRequestError, match="longer than the model's window"):
            ask(client, "book", "fox " * 10_000)
        with pytest.raises(openai.BadRequestError, match="longer than the model's window"):
            client.completions.create(model="book", prompt="fox " * 10_000)
        assert ask(client, "book", "x", **ENDLESS).usage.completion_tokens == TOKENS
    finally:
        server.close()


def test_control_tokens_in_a_request_stay_text(running, books):
    client = running.client()
    plain, marked = (ask(client, "red", question).usage.prompt_tokens for question in ("fox", "fox<|im_end|>"))
    written = len(prompts.encode(mlx_lm.load(str(books[0].folder))[1], "<|im_end|>"))
    assert written > 5 and marked == plain + written
    completed = client.completions.create(model="red", prompt="<|im_end|>", max_tokens=1)
    assert completed.usage.prompt_tokens == written


def test_a_quantized_conversation_cache(tmp_path):
    book = toys.book(tmp_path, "qwen3", name="wide", head_dim=32)
    server = Running(arguments([book], "--kv-bits", "8"))
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda q: ask(server.client(), "wide", q).choices[0].message.content, QUESTIONS[:4]))
        assert found == [alone(book, question, kv_bits=8) for question in QUESTIONS[:4]]
    finally:
        server.close()


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss"])
def test_layers_with_a_sliding_window(tmp_path, architecture):
    book = toys.book(tmp_path, architecture)
    server = Running(arguments([book]))
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda q: ask(server.client(), "book", q).choices[0].message, QUESTIONS[:4]))
        assert [message.content for message in found] == [alone(book, question) for question in QUESTIONS[:4]]
    finally:
        server.close()


def test_a_model_that_cannot_be_batched(tmp_path):
    """mlx-lm's code of dynamic NTK scaling takes one position."""
    book = toys.book(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    server = Running(arguments([book]))
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda q: ask(server.client(), "book", q).choices[0].message, QUESTIONS[:2]))
        assert [message.content for message in found] == [alone(book, question) for question in QUESTIONS[:2]]
    finally:
        server.close()


@pytest.mark.parametrize(
    "architecture",
    ["lfm2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3_next", "falcon_h1", "gemma3n", "deepseek_v3"))],
)
def test_turns_of_models_that_keep_more_than_keys(tmp_path, architecture):
    """Where caches cannot be trimmed, a conversation that turns off earlier is read again."""
    book = toys.book(tmp_path, architecture)
    server = Running(arguments([book]))

    def talk(first):
        messages, found = [], []
        for question in (first, *QUESTIONS[4:6]):
            messages.append({"role": "user", "content": question})
            answer = server.client().chat.completions.create(
                model="book", messages=messages, max_tokens=TOKENS, temperature=0
            )
            found.append((list(messages), answer.choices[0].message.content))
            messages.append({"role": "assistant", "content": found[-1][1]})
        edited = [*messages[:2], {"role": "user", "content": QUESTIONS[6]}]
        answer = server.client().chat.completions.create(
            model="book", messages=edited, max_tokens=TOKENS, temperature=0
        )
        return [*found, (edited, answer.choices[0].message.content)]

    try:
        with ThreadPoolExecutor(2) as pool:
            talks = list(pool.map(talk, QUESTIONS[:2]))
    finally:
        server.close()
    for messages, answer in (turn for found in talks for turn in found):
        assert answer == alone(book, messages)


def test_a_short_request_does_not_wait_for_a_long_prompt(running, answers, monkeypatch):
    """It is answered while the long prompt, which came first, is still being read."""
    client, order, pieces = running.client(), [], []

    def read_piece(*args, real=decoding.AnswerSequence.read_piece):
        assert pieces or wait_for(lambda: running.engine.open == 2), "the short one arrives behind the first piece"
        pieces.append(real(*args))
        return pieces[-1]

    monkeypatch.setattr(decoding.AnswerSequence, "read_piece", read_piece)
    long = threading.Thread(target=lambda: (ask(client, "red", "fox and dog " * 300), order.append("long")))
    with ThreadPoolExecutor(1) as pool:
        long.start()
        assert wait_for(lambda: running.engine.open == 1)
        found = pool.submit(ask, client, "blue", QUESTIONS[1], max_tokens=2)
        found.result()
        order.append("short")
    long.join()
    assert order == ["short", "long"]
