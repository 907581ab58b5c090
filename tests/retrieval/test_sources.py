"""Sources: characters of tokens, passages of attention, and where people see them."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from nectar_mlx import ask, chat, serve
from nectar_mlx.mlxlm import prompts
from nectar_mlx.retrieval import sources
from tests import toys
from tests.serving.running import Running
from tests.store.test_kv_file import Book

TEXT = "The fox ran. It was quick! A dog saw it; nobody else did.\n\nThen came the café, and the answer — naïve. " * 6


@pytest.fixture(scope="module")
def tokenizer():
    return toys.tokenizer()


def test_every_token_knows_its_characters(tokenizer):
    prefix = prompts.prefix(tokenizer, TEXT)
    arrays = sources.arrays(tokenizer, TEXT, prefix)
    offsets, text = arrays["sources.offsets"], arrays["sources.text"].tobytes().decode()
    assert text == TEXT and len(offsets) == len(prefix)
    head = len(prompts.head(tokenizer)) + len(prompts.encode(tokenizer, prompts.INTRODUCTION, specials=False))
    assert (offsets[: head - 1] == -1).all()
    for i in range(head, len(prefix)):
        start, end = offsets[i]
        piece = tokenizer.decode([prefix[i]])
        assert piece == TEXT[start:end] or "\ufffd" in piece, "a token may be part of a character"


def test_a_cut_text_keeps_what_was_read(tokenizer):
    prefix = prompts.prefix(tokenizer, TEXT, max_tokens=40)
    arrays = sources.arrays(tokenizer, TEXT, prefix)
    text = arrays["sources.text"].tobytes().decode()
    assert TEXT.startswith(text) and 20 < len(text) < len(TEXT) // 2
    assert arrays["sources.offsets"].max() == len(text)


def test_another_prefix_or_a_tokenizer_that_cannot_tell_has_no_sources(tokenizer):
    prefix = prompts.prefix(tokenizer, TEXT)
    assert sources.arrays(tokenizer, "Another " + TEXT, prefix) == {}
    assert sources.passages({}, np.ones(5)) == []


def test_passages_are_whole_sentences_where_the_attention_is(tokenizer):
    text = "".join(f"This is sentence number {i} of the text, which has a few words. " for i in range(60))
    prefix = prompts.prefix(tokenizer, text)
    small = sources.arrays(tokenizer, text, prefix)
    offsets = small["sources.offsets"]
    mass = np.full(len(prefix), 1e-4)
    for number, weight in ((17, 5.0), (44, 2.0)):
        start = text.index(f"sentence number {number} ")
        mass[(offsets[:, 0] >= start) & (offsets[:, 1] <= start + 30)] = weight
    mass[0] = 99  # the template's own tokens are no source
    first, second, *others = sources.passages(small, mass, count=3)
    assert "number 17 " in first.text and "number 44 " in second.text
    assert first.share > 2 * second.share > 0
    for source in (first, second, *others):
        assert text[source.start : source.end] == source.text
        assert source.text.startswith("This is") and source.text.endswith(".")
    spans = sorted((s.start, s.end) for s in (first, second, *others))
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_no_attention_no_source(tokenizer):
    prefix = prompts.prefix(tokenizer, TEXT)
    assert sources.passages(sources.arrays(tokenizer, TEXT, prefix), np.zeros(len(prefix))) == []


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return Book(tmp_path_factory.mktemp("sources"))


def check(told, book):
    assert told["bytes_read_per_token"] > 0 and 1 <= len(told["sources"]) <= 3
    for source in told["sources"]:
        assert book.text[source["start"] : source["end"]] == source["text"]
        assert 0 < source["share"] <= 1


def test_ask(book, capsys):
    assert ask.main([str(book.path), "who?", "--json", "--exact", "0.5", "--max-tokens", "4"]) == 0
    check(json.loads(capsys.readouterr().out), book)
    assert ask.main([str(book.path), "who?", "--json", "--exact", "0", "--max-tokens", "4"]) == 0
    assert "sources" not in json.loads(capsys.readouterr().out)
    assert ask.main([str(book.path), "who?", "--sources", "--exact", "0.5", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "the quick brown fox" in err and "[" not in out
    assert ask.main([str(book.path), "who?", "--sources", "--exact", "0", "--max-tokens", "4"]) == 2
    assert chat.main([str(book.path), "--sources", "--exact", "0"]) == 2
    assert ask.main([str(book.path), "who?", "--exact", "1.5"]) == 2


def test_chat(book, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("who?\nwhere?\n/quit\n"))
    assert chat.main([str(book.path), "--sources", "--exact", "0.5", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().err.count("the quick brown fox") >= 2


def test_serve(book):
    server = Running(serve.make_parser().parse_args([str(book.path), "--port", "0", "--log-level", "ERROR"]))

    def post(**body):
        messages = [{"role": "user", "content": "who?"}]
        request = {"messages": messages, "max_tokens": 4, "temperature": 0, **body}
        status, content, _ = server.request("POST", "/v1/chat/completions", request)
        return status, content.decode()

    try:
        answers = {}
        for exact in (0.5, 0, 0.5, 1, 0.5):
            status, body = post(model="book", exact=exact)
            told = json.loads(body)
            assert status == 200 and told["model"] == "book"
            if exact:
                check(told, book)
            else:
                assert "sources" not in told
            answers.setdefault(exact, set()).add(told["choices"][0]["message"]["content"])
        assert all(len(found) == 1 for found in answers.values())
        status, body = post(exact=0.5, stream=True)
        chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        check(chunks[-1], book)
        assert not any("sources" in chunk for chunk in chunks[:-1])
        for wrong in (-1, 2, "much", True, [1]):
            status, body = post(model="book", exact=wrong)
            assert status == 400 and "exact" in body
        assert post(model="green", exact=0.5)[0] == 404
        with ThreadPoolExecutor(8) as pool:  # side by side, each on its own; more shares than are kept
            shares = [0.5, 1, 0.5, *np.linspace(0.31, 0.92, 20).tolist()]
            for exact, (status, body) in zip(shares, pool.map(lambda share: post(exact=share), shares), strict=True):
                assert status == 200
                check(json.loads(body), book)
                text = json.loads(body)["choices"][0]["message"]["content"]
                assert exact not in answers or answers[exact] == {text}
    finally:
        server.close()
