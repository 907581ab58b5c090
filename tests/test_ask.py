"""`nectar ask`: the answer, the JSON, and every way its input can be wrong."""

import io
import json
import re
import subprocess
import sys

import mlx_lm
import pytest

from nectar_mlx import Nectar, __main__, ask, cli, store
from tests import toys

QUESTION = "who is the fox?"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A toy model's folder and a .nectar on it."""
    return toys.book(tmp_path_factory.mktemp("book"))


def test_the_answer_is_that_of_the_library(book, capsys):
    model, tokenizer = mlx_lm.load(str(book.folder))
    nectar = Nectar.load(book.path, model, tokenizer)
    expected = mlx_lm.generate(
        model, tokenizer, nectar.prompt(tokenizer, QUESTION), max_tokens=12, prompt_cache=nectar.make_cache()
    )
    assert ask.main([str(book.path), QUESTION, "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_json(book, capsys):
    assert ask.main([str(book.path), QUESTION, "--json", "--max-tokens", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == QUESTION
    assert answer["context_tokens"] == toys.CONTEXT
    assert 1 <= answer["answer_tokens"] <= 5
    assert answer["finish_reason"] in ("length", "stop")
    assert answer["tokens_per_second"] > 0 and answer["seconds_to_first_token"] > 0


def test_question_from_stdin(book, monkeypatch, capsys):
    assert ask.main([str(book.path), QUESTION, "--max-tokens", "4"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert ask.main([str(book.path), "-", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == expected


WINDOW = 200


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A book on a model with a small window."""
    return toys.book(tmp_path_factory.mktemp("narrow"), max_position_embeddings=WINDOW)


def test_an_answer_ends_where_the_window_does(narrow, capsys):
    """The default is cut to the room; what was chosen is refused where it passes the window."""
    assert ask.main([str(narrow.path), QUESTION, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    room = WINDOW - toys.CONTEXT - answer["prompt_tokens"]
    assert answer["answer_tokens"] == room and answer["finish_reason"] == "length"
    assert ask.main([str(narrow.path), QUESTION, "--json", "--max-tokens", str(room)]) == 0
    assert json.loads(capsys.readouterr().out)["answer_tokens"] == room
    assert ask.main([str(narrow.path), QUESTION, "--max-tokens", str(room + 1)]) == cli.FAULT
    assert_one_line(capsys, f"room for {room}")


def test_a_question_that_passes_the_window(narrow, capsys):
    assert ask.main([str(narrow.path), QUESTION * 40]) == cli.FAULT
    assert_one_line(capsys, f"window of {WINDOW} .* room for {WINDOW - toys.CONTEXT}, the answer included")


def test_quantized_conversation_cache(book, capsys):
    assert ask.main([str(book.path), QUESTION, "--max-tokens", "4", "--kv-bits", "8"]) == 2
    assert "cannot be quantized" in capsys.readouterr().err  # the toy's heads are too narrow


def cut(path, folder):
    (folder / "cut.nectar").write_bytes(path.read_bytes()[:-100])
    return folder / "cut.nectar"


def altered(path, folder):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    (folder / "altered.nectar").write_bytes(content)
    return folder / "altered.nectar"


def text(path, folder):
    (folder / "text.nectar").write_text("no safetensors at all")
    return folder / "text.nectar"


def missing(path, folder):
    return folder / "missing.nectar"


def a_folder(path, folder):
    return folder


@pytest.mark.parametrize(
    "make, complaint",
    [
        (cut, "cut short"),
        (altered, "does not match|do not match"),
        (text, "not a .nectar"),
        (missing, "no such file"),
        (a_folder, "is a folder, not a .nectar"),
    ],
)
def test_bad_files(book, make, complaint, tmp_path, capsys):
    assert ask.main([str(make(book.path, tmp_path)), QUESTION]) == cli.FAULT
    assert_one_line(capsys, complaint)


def test_another_model(book, tmp_path, capsys):
    other = toys.save_model(toys.toy("llama", seed=5), tmp_path / "other", toys.tokenizer())
    assert ask.main([str(book.path), QUESTION, "--model", str(other)]) == cli.FAULT
    assert_one_line(capsys, "fitted on .* which is not the model in use")


def test_another_tokenizer(book, tmp_path, capsys):
    other = toys.save_model(toys.toy("llama"), tmp_path / "other", toys.tokenizer(toys.CHAT + " "))
    assert ask.main([str(book.path), QUESTION, "--model", str(other)]) == cli.FAULT
    assert_one_line(capsys, "another tokenizer or chat template")


def test_a_model_that_is_not_there(book, tmp_path, capsys):
    assert ask.main([str(book.path), QUESTION, "--model", str(tmp_path / "nothing")]) == cli.FAULT
    assert_one_line(capsys, "nothing")


def test_an_empty_question(book, capsys):
    assert ask.main([str(book.path), "  "]) == cli.FAULT
    assert_one_line(capsys, "empty")


@pytest.mark.parametrize("argv", [[], ["book.nectar"], ["b", "q", "--max-tokens", "0"], ["b", "q", "--maxtokens", "3"]])
def test_bad_arguments(argv, capsys):
    assert ask.main(argv) == cli.FAULT
    assert_one_line(capsys, "nectar ask")


def test_a_path_of_a_user_who_is_not_there(book, capsys):
    assert ask.main([str(book.path), QUESTION, "--adapter", "~nobody-of-this-name/adapter"]) == cli.FAULT
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt(book, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert ask.main([str(book.path), QUESTION]) == cli.INTERRUPTED
    assert_one_line(capsys, "interrupted")


@pytest.mark.process
def test_a_reader_that_leaves(book):
    command = f"{sys.executable} -m nectar_mlx.ask {book.path} fox --max-tokens 4 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "0\n"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_the_nectar_command(book, capsys):
    assert __main__.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in __main__.COMMANDS)
    assert __main__.main(["--version"]) == 0
    assert __main__.main(["ask", str(book.path), QUESTION, "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert __main__.main(["asj"]) == 2
    assert_one_line(capsys, "no command 'asj'")


def test_metadata_is_read_without_the_tensors(book):
    assert store.model_name(book.path) == str(book.folder)


def assert_one_line(capsys, complaint: str) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert re.search(complaint, last), err
    assert "Traceback" not in err
    assert sum(line.startswith("nectar") for line in err.splitlines()) == 1


def test_words_without_quotes_are_one_question(book, capsys):
    expected = None
    for words in ([QUESTION], QUESTION.split(), ["--seed", "0", "who", "--top-p", "1", "is", "the", "fox?"]):
        assert ask.main([str(book.path), *words, "--json", "--max-tokens", "4"]) == 0
        told = json.loads(capsys.readouterr().out)
        expected = expected or told["answer"]
        assert told["question"] == QUESTION and told["answer"] == expected
    assert ask.main([str(book.path), "--json", "--max-tokens", "4", "--", "-x", "is", "--what"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "-x is --what"


@pytest.mark.parametrize("option", ["--temp=-1", "--temp=nan", "--temp=inf", "--top-p=0", "--top-p=1.1", "--seed=-1"])
def test_numbers_out_of_range(option, capsys):
    assert ask.main(["b.nectar", option, "q"]) == cli.FAULT
    name, value = option.split("=")
    assert_one_line(capsys, f"argument {name}: '{value}' is not ")


def test_an_answer_that_is_cut_says_so_and_quiet_says_nothing(book, capsys):
    assert ask.main([str(book.path), "who", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert "the answer is cut at 3 tokens: --max-tokens 6 allows more" in err
    assert ask.main([str(book.path), "who", "--max-tokens", "3", "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")


def test_an_answer_that_repeats_itself_ends(book, capsys, monkeypatch):
    from nectar_mlx import writing

    monkeypatch.setattr(writing.Repetition, "add", lambda self, piece: True)
    assert ask.main([str(book.path), "who", "--json", "--max-tokens", "9"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finish_reason"] == "repetition" and told["answer_tokens"] == 1
    assert ask.main([str(book.path), "who", "--json", "--max-tokens", "9", "--allow-loops"]) == 0
    assert json.loads(capsys.readouterr().out)["answer_tokens"] > 1


def test_thoughts_are_apart_from_the_answer(book, capsys, monkeypatch):
    from nectar_mlx import writing

    pieces = [writing.Written("", "hm, "), writing.Written("", "well"), writing.Written("the fox")]
    ended = writing.Ended(reason="stop", tokens=3, prompt_tokens=1, tokens_per_second=1.0)
    monkeypatch.setattr(writing, "write", lambda *_, **__: iter([*pieces, writing.Written(ended=ended)]))
    assert ask.main([str(book.path), "who"]) == 0
    out, err = capsys.readouterr()
    assert out == "the fox\n" and err.endswith("hm, well\n\n")
    assert ask.main([str(book.path), "who", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == "the fox" and told["thoughts"] == "hm, well"
