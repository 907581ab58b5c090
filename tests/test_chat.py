"""`nectar chat`: several turns, what is re-read of them, and the commands, over a pipe."""

import argparse
import subprocess
import sys

import mlx_lm
import pytest

from nectar_mlx import Nectar
from nectar_mlx.chat import Conversation
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
            **changed,
        }
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_turns_equal_reading_the_whole_conversation_anew(architecture):
    model, tokenizer = toys.toy(architecture), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    chat = Conversation(model, tokenizer, nectar, options())
    talk = []
    for question in QUESTIONS:
        talk.append({"role": "user", "content": question})
        prompt = nectar.prompt(tokenizer, talk)
        expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=9, prompt_cache=nectar.make_cache())
        found = "".join(r.text for r in chat.answer(question))
        assert found == expected
        talk.append({"role": "assistant", "content": expected.strip()})
    assert chat.messages == talk


def test_a_turn_reads_only_what_is_new():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    chat = Conversation(model, tokenizer, nectar, options())
    read = []
    for question in QUESTIONS[:2]:
        read.append([response.prompt_tokens for response in chat.answer(question)][-1])
    whole = nectar.prompt(tokenizer, chat.messages[:-1])
    assert read[1] < len(whole) - read[0] + 12  # the first question and most of its answer are not read again


def test_an_interrupted_answer_does_not_confuse_the_next():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    chat = Conversation(model, tokenizer, nectar, options())
    for number, _ in enumerate(answer := chat.answer(QUESTIONS[0])):
        if number == 3:
            answer.close()
    assert len(chat.messages) == 2
    found = "".join(r.text for r in chat.answer(QUESTIONS[1]))
    prompt = nectar.prompt(tokenizer, chat.messages[:3])
    assert found == mlx_lm.generate(model, tokenizer, prompt, max_tokens=9, prompt_cache=nectar.make_cache())


def test_reset():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    chat = Conversation(model, tokenizer, nectar, options())
    first = "".join(r.text for r in chat.answer(QUESTIONS[0]))
    assert chat.nbytes > 0
    chat.reset()
    assert chat.messages == [] and chat.nbytes == 0
    assert "".join(r.text for r in chat.answer(QUESTIONS[0])) == first


def test_a_conversation_that_passes_the_window_is_refused_and_goes_on_anew():
    window, tokenizer = 200, toys.tokenizer()
    model = toys.toy("llama", max_position_embeddings=window)
    chat = Conversation(model, tokenizer, toys.exact(model, toys.random_tokens(60), tokenizer), options())
    with pytest.raises(NoRoom, match="room for 140, the answer included"):
        while True:
            assert "".join(r.text for r in chat.answer(QUESTIONS[0]))
            assert len(chat.messages) < 40
    talk = list(chat.messages)
    with pytest.raises(NoRoom):
        next(chat.answer(QUESTIONS[1]))
    assert chat.messages == talk, "what was refused is no turn"
    chat.reset()
    assert list(chat.answer(QUESTIONS[0]))


def test_thoughts_that_the_template_opens_are_kept_apart_from_the_answer():
    """Its next rendering drops them; without what opens them they would be text."""
    opens = toys.CHAT.replace("assistant\n{%", "assistant\n<think>\n{%")
    drops = opens.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    model, tokenizer = toys.toy("llama"), toys.tokenizer(drops)
    nectar = toys.exact(model, toys.random_tokens(60), tokenizer)
    chat = Conversation(model, tokenizer, nectar, options(think=True))
    answer = "".join(r.text for r in chat.answer(QUESTIONS[0]))
    assert chat.messages[-1]["content"] == f"<think>\n{answer}".strip()
    chat.messages[-1]["content"] = "<think>\nhm</think>the fox"
    chat.messages.append({"role": "user", "content": QUESTIONS[1]})
    prompt = tokenizer.decode(nectar.prompt(tokenizer, chat.messages))
    assert "hm" not in prompt and "assistant\nthe fox" in prompt


def run(book, lines, *arguments):
    command = [sys.executable, "-m", "nectar_mlx", "chat", str(book.path), "--max-tokens", "6", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)


def test_over_a_pipe(book):
    done = run(book, f"{QUESTIONS[0]}\n\n/history\n/reset\n/history\n/nonsense\n{QUESTIONS[0]}\n/quit\nnot reached\n")
    assert done.returncode == 0, done.stderr
    model, tokenizer = mlx_lm.load(str(book.folder))
    nectar = Nectar.load(book.path, model, tokenizer)
    answer = mlx_lm.generate(
        model, tokenizer, nectar.prompt(tokenizer, QUESTIONS[0]), max_tokens=6, prompt_cache=nectar.make_cache()
    )
    history = f"user: {QUESTIONS[0]}\nassistant: {answer.strip()}\n"
    assert done.stdout == f"{answer}\n{history}{answer}\n"
    assert "\x1b" not in done.stdout + done.stderr and "> " not in done.stdout
    assert done.stderr.count("tokens/s") == 2
    assert "there is no /nonsense" in done.stderr


def test_the_end_of_input_ends_the_chat(book):
    done = run(book, QUESTIONS[0])  # without a last newline
    assert done.returncode == 0
    assert done.stdout.strip()


def test_a_bad_file(book, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nectar_mlx.chat", str(tmp_path / "no.nectar")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr
