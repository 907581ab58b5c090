"""`nectar chat`: several turns, what is re-read of them, and the commands, over a pipe."""

import argparse
import io
import subprocess
import sys

import mlx_lm
import pytest

from nectar_mlx import Nectar, NectarError, chat, cli
from nectar_mlx.conversation import LocalConversation
from nectar_mlx.mlxlm.window import NoRoom
from tests import toys

QUESTIONS = ["who is the fox?", "and the dog?", "the answer"]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return toys.book(tmp_path_factory.mktemp("book"))


def options(**changed):
    return argparse.Namespace(
        **{
            "max_tokens": 9,
            "temp": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "think": False,
            "kv_bits": None,
            "exact": None,
            "whole": False,
            "allow_loops": True,
            "recall": True,
            **changed,
        }
    )


UNTRIMMED = ["qwen3_next", "lfm2"]  # their caches cannot be trimmed
MORE = [pytest.param(family, marks=pytest.mark.slow) for family in ("falcon_h1", "gemma3n", "deepseek_v3")]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", *UNTRIMMED, *MORE])
def test_turns_equal_reading_the_whole_conversation_anew(architecture):
    model, tokenizer = toys.toy(architecture), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    talk = LocalConversation(model, tokenizer, nectar, options())
    turns = []
    for question in QUESTIONS:
        turns.append({"role": "user", "content": question})
        prompt = nectar.prompt(tokenizer, turns)
        expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=9, prompt_cache=nectar.make_cache())
        found = "".join(r.text for r in talk.answer(question))
        assert found == expected
        turns.append({"role": "assistant", "content": expected.strip()})
    assert talk.messages == turns


def test_a_turn_reads_only_what_is_new():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    talk = LocalConversation(model, tokenizer, nectar, options())
    read = []
    for question in QUESTIONS[:2]:
        read.append([*talk.answer(question)][-1].ended.prompt_tokens)
    whole = nectar.prompt(tokenizer, talk.messages[:-1])
    assert read[1] < len(whole) - read[0] + 12  # the first question and most of its answer are not read again


@pytest.mark.parametrize("architecture", ["llama", *UNTRIMMED])
def test_an_interrupted_answer_does_not_confuse_the_next(architecture):
    model, tokenizer = toys.toy(architecture), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    talk = LocalConversation(model, tokenizer, nectar, options())
    for number, _ in enumerate(answer := talk.answer(QUESTIONS[0])):
        if number == 3:
            answer.close()
    assert len(talk.messages) == 2
    found = "".join(r.text for r in talk.answer(QUESTIONS[1]))
    prompt = nectar.prompt(tokenizer, talk.messages[:3])
    assert found == mlx_lm.generate(model, tokenizer, prompt, max_tokens=9, prompt_cache=nectar.make_cache())


def test_reset():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    talk = LocalConversation(model, tokenizer, nectar, options())
    first = "".join(r.text for r in talk.answer(QUESTIONS[0]))
    assert talk.nbytes > 0
    talk.reset()
    assert talk.messages == [] and talk.nbytes == 0
    assert "".join(r.text for r in talk.answer(QUESTIONS[0])) == first


def test_a_conversation_that_passes_the_window_is_refused_and_goes_on_anew():
    window, tokenizer = 200, toys.tokenizer()
    model = toys.toy("llama", max_position_embeddings=window)
    talk = LocalConversation(model, tokenizer, toys.exact(model, toys.random_tokens(60), tokenizer), options())
    with pytest.raises(NoRoom, match="room for 140, the answer included"):
        while True:
            assert "".join(r.text for r in talk.answer(QUESTIONS[0]))
            assert len(talk.messages) < 40
    turns = list(talk.messages)
    with pytest.raises(NoRoom):
        next(talk.answer(QUESTIONS[1]))
    assert talk.messages == turns, "what was refused is no turn"
    talk.reset()
    assert list(talk.answer(QUESTIONS[0]))


def test_thoughts_that_the_template_opens_are_kept_apart_from_the_answer():
    """Its next rendering drops them; without what opens them they would be text."""
    opens = toys.CHAT.replace("assistant\n{%", "assistant\n<think>\n{%")
    drops = opens.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    model, tokenizer = toys.toy("llama"), toys.tokenizer(drops)
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    talk = LocalConversation(model, tokenizer, nectar, options(think=True))
    answer = "".join(r.text for r in talk.answer(QUESTIONS[0]))
    assert talk.messages[-1]["content"] == f"<think>\n{answer}".strip()
    talk.messages[-1]["content"] = "<think>\nhm</think>the fox"
    talk.messages.append({"role": "user", "content": QUESTIONS[1]})
    prompt = tokenizer.decode(nectar.prompt(tokenizer, talk.messages))
    assert "hm" not in prompt and "assistant\nthe fox" in prompt


@pytest.fixture
def run(book, monkeypatch, capsys):
    """The command with these lines on stdin: exit code, stdout and stderr."""

    def run(lines):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = chat.main([str(book.path), "--max-tokens", "6"])
        return code, *capsys.readouterr()

    return run


def test_commands_and_answers(book, run):
    lines = f"{QUESTIONS[0]}\n\n/history\n/reset\n/history\n/nonsense\n{QUESTIONS[0]}\n/quit\nnot reached\n"
    code, out, err = run(lines)
    assert code == 0, err
    model, tokenizer = mlx_lm.load(str(book.folder))
    nectar = Nectar.load(book.path, model, tokenizer)
    answer = mlx_lm.generate(
        model, tokenizer, nectar.prompt(tokenizer, QUESTIONS[0]), max_tokens=6, prompt_cache=nectar.make_cache()
    )
    history = f"user: {QUESTIONS[0]}\nassistant: {answer.strip()}\n"
    assert out == f"{answer}\n{history}{answer}\n"
    assert err.count("tokens/s") == 2 and "there is no /nonsense" in err


def test_the_end_of_input_ends_the_chat(run):
    assert run(QUESTIONS[0])[:2] == run(f"{QUESTIONS[0]}\n")[:2], "with and without a last newline"


@pytest.mark.process
def test_over_a_pipe(book):
    command = [sys.executable, "-m", "nectar_mlx", "chat", str(book.path), "--max-tokens", "6"]
    done = subprocess.run(command, input=QUESTIONS[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "> " not in done.stdout


def test_a_bad_file(tmp_path, capsys):
    assert chat.main([str(tmp_path / "no.nectar")]) == cli.FAULT
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no such file" in err


class Said:
    messages = ({"role": "user", "content": "who?"}, {"role": "assistant", "content": "a fox"})


def test_a_conversation_is_saved(tmp_path, capsys):
    chat._save(str(tmp_path / "notes.md"), Said())
    assert capsys.readouterr().err.endswith("notes.md: 1 question with its answer\n")
    assert (tmp_path / "notes.md").read_text() == "## who?\n\na fox\n"
    with pytest.raises(NectarError, match="exists"):
        chat._save(str(tmp_path / "notes.md"), Said())


@pytest.mark.parametrize("name", ["", "a" * 5000, "~nobody-of-this-name/notes.md", "/nowhere/notes.md"])
def test_a_name_that_cannot_be_saved_to_does_not_end_the_chat(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NectarError):
        chat._save(name, Said())
