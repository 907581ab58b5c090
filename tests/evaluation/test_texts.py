"""Texts written by program: the same for a seed, as long as asked, each question with its one answer in the text."""

import json
import re

import pytest

from nectar_mlx.evaluation import texts
from nectar_mlx.evaluation.questions import contains


@pytest.mark.parametrize("words", [1, 400, 3000])
def test_the_log_is_about_as_long_as_asked(words):
    log = texts.ships_log(words=words)
    assert words <= len(log.text.split()) < words + 150


def test_a_seed_decides_the_text():
    assert texts.ships_log(words=500, seed=3) == texts.ships_log(words=500, seed=3)
    assert texts.ships_log(words=500, seed=3).text != texts.ships_log(words=500, seed=4).text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_answer_stands_where_its_depth_says(seed):
    log = texts.ships_log(words=4000, seed=seed)
    for fact in log.facts:
        at = round(fact.depth * len(log.text))
        sentence = log.text[max(0, at - 2) : at + 220]
        assert fact.answer in sentence, fact
    depths = [fact.depth for fact in log.facts]
    assert depths == sorted(depths) and depths[0] < 0.05 and depths[-1] > 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_choice_is_right_and_only_it_stands_in_the_text(seed):
    log = texts.ships_log(words=4000, seed=seed)
    places = set()
    for fact in log.facts:
        right = [contains(choice, fact.answer) for choice in fact.choices]
        assert len(set(fact.choices)) == 8 and sum(right) == 1, fact
        assert len({len(c) for c in fact.choices}) == 1 or not fact.answer.isdigit()
        places.add(right.index(True))
    assert len(places) > 4, "the right one's place tells nothing"


def test_no_question_has_two_answers():
    log = texts.ships_log(words=12_000)
    questions = [fact.question for fact in log.facts]
    assert len(set(questions)) == len(questions)
    ships = re.findall(r"spoke the (\w+ \w+(?: the \w+)?),", log.text)
    people = re.findall(r"A passenger, (\w+ \w+(?: the \w+)?), came", log.text)
    assert len(set(ships)) == len(ships) and len(set(people)) == len(people)


def test_the_manual_is_technical_and_repeatable():
    manual = texts.manual(words=3000)
    assert 3000 <= len(manual.split()) < 6000
    assert "argparse.ArgumentParser" in manual and " at 0x" not in manual
    assert manual == texts.manual(words=3000)


def test_the_command_writes_text_and_questions(tmp_path, capsys):
    text, questions = tmp_path / "log.txt", tmp_path / "log.jsonl"
    assert texts.main(["log", "--words", "300", "--output", str(text), "--questions", str(questions)]) == 0
    told = [json.loads(line) for line in questions.read_text().splitlines()]
    assert told and all(str(t["answer"]) in text.read_text() for t in told)
    assert texts.main(["manual", "--words", "0", "--output", str(text)]) == 2
    assert texts.main(["manual", "--output", str(tmp_path / "no" / "where.txt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
