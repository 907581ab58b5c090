"""Sources: characters of tokens, passages of attention, and where people see them."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from nectar_mlx import Nectar, ask, chat, cli, documents, serve
from nectar_mlx.documents import FileReport, Reading
from nectar_mlx.mlxlm import prompts
from nectar_mlx.retrieval import citing, sources
from nectar_mlx.retrieval.fitted_text import About, FittedText
from nectar_mlx.retrieval.passages import Passages
from nectar_mlx.store.chunking import ChunkedPrefix
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


def reading(text, **report):
    return documents.Reading(text, [documents.FileReport("a.txt", "text", len(text), 0, len(text), **report)])


def test_attention_and_words_choose_passages_of_whole_sentences(tokenizer):
    text = "".join(f"This is sentence number {i} of the text, which has a few words. " for i in range(60))
    prefix = prompts.prefix(tokenizer, text)
    small = sources.arrays(tokenizer, text, prefix)
    offsets = small["sources.offsets"]
    mass = np.full(len(prefix), 1e-4)
    for number, weight in ((17, 5.0), (44, 3.0)):
        start = text.index(f"sentence number {number} ")
        mass[(offsets[:, 0] >= start) & (offsets[:, 1] <= start + 30)] = weight
    mass[0] = 99  # the template's own tokens are no source
    passages = Passages(reading(text))
    attention = sources.attended(passages, small, mass)
    first, second, *others = sources.find(passages, "", "", attention=attention)
    assert "number 17 " in first.text and "number 44 " in second.text and not others
    assert first.score == 1 > second.score > 0.5
    for source in (first, second):
        assert text[source.start : source.end] == source.text
        assert source.text.startswith("This is") and source.text.endswith(".")
    (found,) = sources.find(passages, "Which number?", "It is number 44.", attention=attention, count=1)
    assert "number 44 " in found.text, "words and attention count together"
    (found,) = sources.find(passages, "Which number?", "It is number 33.", count=1)
    assert "number 33 " in found.text


def test_no_attention_no_words_no_source(tokenizer):
    prefix = prompts.prefix(tokenizer, TEXT)
    passages = Passages(reading(TEXT))
    assert sources.attended(passages, sources.arrays(tokenizer, TEXT, prefix), np.zeros(len(prefix))) is None
    assert sources.attended(passages, {}, np.ones(5)) is None
    assert sources.find(passages, "Where is Atlantis?", "Unknown.") == []
    assert sources.find(Passages(reading("")), "who?", "he") == []


PLACED = """# Dose

Take 12 drops at night. Nobody should take more.

# Storage

It keeps for 18 months. Do not freeze it.
"""


def test_a_source_names_its_place():
    lined = "\n".join(f"Line about item{n} is here and says little more than that, in some words." for n in range(50))
    (source, *_) = sources.find(Passages(reading(lined)), "What about item31?", "")
    line = int(source.place.removeprefix("line "))
    assert 28 <= line <= 32 and "item31" in source.text
    report = documents.FileReport("b.docx", "docx", len(PLACED), 0, len(PLACED))
    (source, *_) = sources.find(Passages(documents.Reading(PLACED, [report])), "How long does it keep?", "18 months.")
    assert (source.document, source.place) == ("b.docx", "section Storage") and "18 months" in source.text
    end = PLACED.index("# Storage")
    places = [documents.Place("chapter", "1 Dose", 0, end), documents.Place("chapter", "2", end, len(PLACED))]
    (source, *_) = sources.find(Passages(reading(PLACED, places=places)), "How many drops?", "12.")
    assert source.place == "chapter 1: Dose"
    assert source.quoted().startswith("a.txt, chapter 1: Dose (") and "12 drops" in source.quoted()


def test_a_passage_is_shown_as_the_document_spells_it():
    text = "The fifth room is locked."
    report = documents.FileReport("a", end=len(text))
    told = documents.Reading(text, [report], [documents.Edit(4, 6, "ﬁ")])
    (source,) = sources.find(Passages(told), "Which room is locked?", "The fifth.")
    assert source.text == "The ﬁfth room is locked."
    assert sources.sources_as_json([source])[0].keys() == {"document", "place", "score", "start", "end", "text"}


def test_chinese_and_german_sentences():
    text = "旧桥建于1867年。河水在春天上涨。\n\nDer Speicher fasst 300 Tonnen. Die Glocken läuten um sechs."
    passages = Passages(reading(text))
    assert [passages.sentence(n) for n in range(4)] == [
        "旧桥建于1867年。",
        "河水在春天上涨。",
        "Der Speicher fasst 300 Tonnen.",
        "Die Glocken läuten um sechs.",
    ]


def test_marks_behind_sentences():
    passages = Passages(
        reading("The bell was cast by Ines Okafor in 1902. It weighs 340 kg.\n\n" + "A ship came. " * 40)
    )
    found = sources.find(passages, "Who cast the bell?", "Ines Okafor.")
    answer = "The bell was cast by Ines Okafor. It was cast in 1903. It weighs 340 kg."
    cited = citing.cite(passages, "Tell me about the bell.", answer, found)
    assert cited.text == "The bell was cast by Ines Okafor. [1] It was cast in 1903. [?] It weighs 340 kg. [1]"
    assert [sentence.source for sentence in cited.sentences] == [1, None, 1] and cited.sources == found
    assert citing.cite(passages, "Who?", "Omar Okafor cast the bell.", []).text.endswith("[?]")
    assert citing.cite(passages, "Who?", "", []).text == ""


def test_a_question_alone_supports_no_short_answer():
    passages = Passages(reading("The plumber charged 140 crowns for a pipe in May.\n\n" + "A ship came. " * 40))
    question = "What did the plumber charge for a pipe in May?"
    for answer, supported in (("140 crowns.", True), ("crowns", True), ("QQQQ", False), ("Yes.", False)):
        assert bool(citing.cite(passages, question, answer, []).named) == supported, answer


def test_marks_count_the_sources_in_their_order_and_the_others_follow():
    filler = "\n\n" + "A ship came. " * 40 + "\n\n"
    texts = ["The bell was cast by Ines Okafor.", "The tower of the bell fell in 1911.", "The organ has 900 pipes."]
    passages = Passages(reading(filler.join(texts)))
    found = sources.find(passages, "Who cast the bell of the tower?", "Ines Okafor cast the bell of the tower.")
    assert [source.text[:9] for source in found][:2] == ["The bell ", "The tower"]
    cited = citing.cite(passages, "What?", "The organ has 900 pipes. The tower of the bell fell in 1911.", found)
    assert cited.text == "The organ has 900 pipes. [1] The tower of the bell fell in 1911. [2]"
    assert [source.text[:9] for source in cited.sources][:3] == ["The organ", "The tower", "The bell "]
    assert cited.named == 2 and len(cited.sources) == len(found) + 1
    assert citing.cite(passages, "What?", "No.", found).named == 0


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return Book(tmp_path_factory.mktemp("sources"))


def check(told, book):
    assert told["bytes_read_per_token"] > 0 and 1 <= len(told["sources"]) <= 3
    for source in told["sources"]:
        assert book.text[source["start"] : source["end"]] == source["text"]
        assert 0 < source["score"] <= 1


def test_ask(book, capsys):
    assert ask.main([str(book.path), "who?", "--json", "--exact", "0.5", "--max-tokens", "4"]) == 0
    check(json.loads(capsys.readouterr().out), book)
    assert ask.main([str(book.path), "who?", "--json", "--exact", "0", "--max-tokens", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "bytes_read_per_token" not in told and isinstance(told["sources"], list)
    assert ask.main([str(book.path), "who?", "--sources", "--exact", "0.5", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert "[1] tests" in err and "the quick brown fox" in err and "[" not in out
    assert ask.main([str(book.path), "who?", "--cite", "--exact", "0", "--max-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip().endswith("[?]") and cli.NO_SOURCE in err
    assert err.startswith("writing the answer: with --cite it is shown whole\n") or "\nwriting the answer: with" in err
    assert ask.main([str(book.path), "who?", "--exact", "1.5"]) == 2


def test_ask_lists_what_the_marks_name(book, capsys, monkeypatch):
    """With the answer; the others only where all sources are asked for, or no mark names one."""
    found = [sources.Source("tests", "", 0.5, number, number + 1, f"passage {number}") for number in range(2)]
    command = [str(book.path), "who?", "--cite", "--exact", "0", "--max-tokens", "2"]
    for named, options, shown, said in ((1, [], 1, 0), (0, [], 0, 2), (1, ["--sources"], 1, 1)):
        cited = citing.Cited(f"A fox. [{named or '?'}]", found, named, [])
        monkeypatch.setattr(Nectar, "cite", lambda *_, cited=cited: cited)
        assert ask.main([*command, *options]) == 0
        out, err = capsys.readouterr()
        assert (out.count("tests (50%): passage"), err.count("tests (50%): passage")) == (shown, said)


def test_chat(book, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("who?\nwhere?\n/quit\n"))
    assert chat.main([str(book.path), "--sources", "--exact", "0.5", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().err.count("the quick brown fox") >= 2


def test_chat_has_no_sources_before_an_answer(book, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("/sources\n"))
    assert chat.main([str(book.path)]) == 0
    assert "there is no answer yet" in capsys.readouterr().err


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
        status, body = post(model="book", exact=0, sources=True)
        assert status == 200 and isinstance(json.loads(body)["sources"], list)
        assert "bytes_read_per_token" not in json.loads(body)
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


def test_sources_of_an_answer_about_one_document_name_no_other():
    first, second = "# a.txt\n\nThe heron weighs three kilograms.", "# b.txt\n\nThe heron weighs nine kilograms."
    text = f"{first}\n\n{second}"
    start = len(first) + 2
    files = [FileReport("a.txt", "text", 0, 9, len(first)), FileReport("b.txt", "text", 0, start + 9, len(text))]

    class Text(FittedText):
        def passages(self, tokenizer):
            return Passages(Reading(text, files))

    fitted = Text(ChunkedPrefix([]), {}, name="")
    question = "What does the heron weigh?"
    asked = partial(fitted.sources, None, question, "Kilograms.", attention=None, chunk=None, count=3)
    assert {source.document for source in asked()} == {"a.txt", "b.txt"}
    for about, named in (("a.txt", {"a.txt"}), ("b.txt", {"b.txt"}), ("c.txt", {"a.txt", "b.txt"})):
        fitted.about = About(about)
        assert {source.document for source in asked()} == named
    fitted.about = About("renamed.txt", 1)
    assert [(source.document, "nine" in source.text) for source in asked()] == [("renamed.txt", True)]


def test_what_a_sentence_says_is_found_out_once(tmp_path, monkeypatch):
    """However many sentences of the text could support it."""
    (tmp_path / "house.txt").write_text(" ".join(f"Oakes planted {n} tall walnut trees." for n in range(40)))
    passages, asked = Passages(documents.read([tmp_path / "house.txt"])), []
    own = Passages.names_in

    def names_in(self, sentence):
        asked.append(sentence)
        return own(self, sentence)

    monkeypatch.setattr(Passages, "names_in", names_in)
    sentence = "Oakes planted tall walnut trees."
    assert (citing.support(passages, "Who planted trees?", sentence) > 0.5).all()
    assert len(passages.sentences) == 40 and asked.count(sentence) == 1


@pytest.mark.parametrize("before", ["", "Nobody came for weeks. The clock of the tower stood still.\n\n"])
def test_what_one_did_does_not_support_that_another_did_it(tmp_path, before):
    """Names that begin a sentence, and names of the sentence beside the one that tells it."""
    (tmp_path / "house.txt").write_text(
        f"{before}The harbour opened in 1902. In the spring the gardener Oakes planted forty walnut trees behind the "
        "house. A week later Filby paid the whole bill for the gravel path in cash. The cook, Brandt, left in June. "
        "Oakes sold the boat. A year later Filby bought a horse."
    )
    passages = Passages(documents.read([tmp_path / "house.txt"]))
    said = {
        "Oakes planted forty walnut trees behind the house.": True,
        "Walnut trees were planted behind the house.": True,
        "The gravel path was paid in cash by Filby, the whole bill.": True,
        "Oakes sold the boat.": True,
        "Filby planted forty walnut trees behind the house.": False,
        "The gardener Filby planted forty walnut trees behind the house.": False,
        "Brandt paid the whole bill for the gravel path in cash.": False,
        "Filby sold the boat.": False,
    }
    for sentence, supported in said.items():
        cited = citing.cite(passages, "What happened?", sentence, [])
        assert (cited.sentences[0].source is not None) == supported, sentence
