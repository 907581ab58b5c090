"""Questions behind a talk: what stands before them, how many there are, and that the other figures stay as they are."""

import pytest

from nectar_mlx import NectarError
from nectar_mlx.evaluation import questions
from nectar_mlx.evaluation.run import Options, QuestionOptions, evaluate
from nectar_mlx.mlxlm import prompts
from tests import test_evaluate, toys

TEXT = "The brig left Ostend on 4 May 1847. Her master was Anna Velde, and she carried 299 casks of amber. " * 4
TOKENIZER = toys.tokenizer()
PREFIX = prompts.prefix(TOKENIZER, TEXT)
ANSWERS = [f"Answer number {i} is here." for i in range(8)]
FAST = Options(answer_tokens=8, samples=300, baselines="none", answers=False, questions=QuestionOptions(count=4))


def make_context(**arguments):
    return test_evaluate.make_context(toys.toy("llama", **arguments), PREFIX)


@pytest.fixture(scope="module")
def ctx():
    return make_context()


def answered(ctx, count, samples=1):
    """First turns whose answers are known."""
    asked = questions.numbered(questions.held_out(ctx, count=count, seed=1), samples=samples)
    for i, question in enumerate(asked):
        question.conversation.answer = prompts.encode(TOKENIZER, ANSWERS[i % len(ANSWERS)])
    return asked


def test_the_prompt_holds_the_earlier_turns_and_their_answers(ctx):
    asked = answered(ctx, 8)
    later = questions.later_turns(ctx, asked, count=2, samples=1, seed=1)
    assert [q.kind for q in later] == ["later turn"] * 2
    for q, first in zip(later, (0, 3), strict=True):
        messages = []
        for turn in asked[first : first + 3]:
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": ANSWERS[asked.index(turn)]})
        assert q.conversation.prompt == prompts.prompt(TOKENIZER, [*messages, {"role": "user", "content": q.text}])
        shown = TOKENIZER.decode(q.conversation.prompt)
        said = [shown.index(part) for part in [m["content"] for m in messages] + [q.text]]
        assert said == sorted(said)
    assert not {q.text for q in later} & {q.text for q in asked}, "they ask something else than the first turns"


@pytest.mark.parametrize(("count", "later", "turns"), [(1, 1, 1), (2, 1, 2), (4, 1, 3), (8, 2, 3), (15, 3, 3)])
def test_there_are_a_quarter_as_many(ctx, count, later, turns):
    assert QuestionOptions(count=count).later == later
    asked = answered(ctx, count)
    found = questions.later_turns(ctx, asked, count=later, samples=1, seed=1)
    assert len(found) == later
    assert all(q.conversation.prompt.count(TOKENIZER.eos_token_id) == 2 * turns + 1 for q in found)


def test_every_sample_has_its_number(ctx):
    asked = answered(ctx, 8, samples=3)
    found = questions.later_turns(ctx, asked, count=2, samples=3, seed=1)
    last = asked[-1].number
    assert [q.number for q in found] == [last + 1] * 3 + [last + 2] * 3
    assert found[0].conversation.prompt == found[1].conversation.prompt
    assert found[0].conversation is not found[1].conversation


def test_a_talk_fits_the_window(ctx):
    whole = questions.later_turns(ctx, answered(ctx, 4), count=1, samples=1, seed=1)[0].conversation.prompt
    room = len(PREFIX) + 8  # for the text and an answer
    exact = make_context(max_position_embeddings=room + len(whole))
    assert questions.later_turns(exact, answered(ctx, 4), count=1, samples=1, seed=1)[0].conversation.prompt == whole
    less = make_context(max_position_embeddings=room + len(whole) - 1)
    asked = answered(ctx, 4)
    (found,) = questions.later_turns(less, asked, count=1, samples=1, seed=1)
    shown = TOKENIZER.decode(found.conversation.prompt)
    assert ANSWERS[0] not in shown and ANSWERS[1] in shown and found.text in shown
    none = make_context(max_position_embeddings=room + 40)
    with pytest.raises(NectarError, match="no room for a talk"):
        questions.later_turns(none, asked, count=1, samples=1, seed=1)


def test_without_room_the_kind_is_left_out():
    model, said = toys.toy("llama", max_position_embeddings=len(PREFIX) + 40), []
    files = {"it": toys.exact(model, PREFIX, TOKENIZER)}
    result = evaluate(model, TOKENIZER, files, options=FAST, log=said.append)
    assert "later turn" not in result["methods"][0]["kinds"]
    assert said[-1] == "later turns are left out: behind the text the model's window has no room for a talk"


def test_an_exact_file_answers_later_turns_as_the_full_cache(ctx):
    files = {"exact": toys.exact(ctx.model, PREFIX, TOKENIZER)}
    exact, nothing = (m["kinds"]["later turn"] for m in evaluate(ctx.model, TOKENIZER, files, options=FAST)["methods"])
    assert exact["kl"] < 1e-6 and exact["agree"] == 1
    assert nothing["kl"] > 1e-3 and nothing["gap_closed"] == 0


def test_all_other_figures_are_as_without_it(ctx, monkeypatch):
    files = {"it": toys.picked(ctx.model, PREFIX, 20, TOKENIZER)}
    options = Options(answer_tokens=8, samples=300, baselines="sinks-window,bm25-passages", answers=False)
    result = evaluate(ctx.model, TOKENIZER, files, options=options)
    monkeypatch.setattr(QuestionOptions, "later", 0)
    before = evaluate(ctx.model, TOKENIZER, files, options=options)
    assert [q["kind"] for q in result["questions"]].count("later turn") == 2
    assert [q for q in result["questions"] if q["kind"] != "later turn"] == before["questions"]
    for method in (*result["methods"], *before["methods"]):
        method.pop("seconds")
    assert all(m["kinds"].pop("later turn")["tokens"] for m in result["methods"])
    for key in ("methods", "heads", "entropy", "correlation"):
        assert result[key] == before[key]


def test_questions_of_ones_own_have_no_later_turns(ctx, tmp_path):
    own = tmp_path / "questions.txt"
    own.write_text("Who was master?\n")
    options = Options(answer_tokens=8, baselines="none", answers=False, questions=QuestionOptions(file=own))
    result = evaluate(ctx.model, TOKENIZER, {"it": toys.exact(ctx.model, PREFIX, TOKENIZER)}, options=options)
    assert "later turn" not in result["methods"][0]["kinds"]
