"""Which of close documents answers."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from nectar_mlx.library.deciding import support
from nectar_mlx.retrieval.first_sentence import cut, first_sentence
from tests import toys

QUESTION = "What is the access code of the Harwick depot?"
FACT = "Tea is poured hot. The access code of the Harwick depot is 4417. Herons stand in water."
MENTION = "Nobody at the Harwick depot would tell us the access code. The code of the Velden depot is 9021."
OTHER = "The access code of the Harwick depot is not for visitors. The berth of the ferry is 12."


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("The access code of the Harwick depot is 4417.", "The access code of the Harwick depot is 9021."),
        ("4417", "9021"),
        ("It is 4417.", "Nobody would tell us the access code of the Harwick depot."),
        ("4417", "I do not know."),
        ("According to the text, the access code is 4417.", "The text does not say the access code."),
    ],
)
def test_the_text_that_says_what_is_answered_comes_first(right, wrong):
    first, *others = support(QUESTION, [right, wrong, wrong], [FACT, MENTION, OTHER])
    assert first > 0.5 and max(others) < first - 0.1


def test_what_several_texts_say_counts_less_and_equal_texts_are_equal():
    alone, _ = support(QUESTION, ["It is 4417.", ""], [FACT, OTHER])
    one, other = support(QUESTION, ["It is 4417."] * 2, [FACT] * 2)
    assert one == other == pytest.approx(alone / 2)


def test_what_no_text_says_counts_nothing():
    assert support(QUESTION, ["", "It is 5555.", "The Medical Man smiled."], [FACT, MENTION, OTHER]) == [0, 0, 0]
    assert support(QUESTION, ["", ""], ["", ""]) == [0, 0]


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("It is 4417. You asked before.", "It is 4417."),
        ("It costs 4.50 euros", "It costs 4.50 euros"),
        ("\n\n4417\nand more", "4417"),
        ("<think>Hm. What?</think>\nIt is 4417. So", "It is 4417."),
        ("<think>Hm. What", ""),
        ("", ""),
    ],
)
def test_the_first_sentence_is_cut(answer, sentence):
    assert cut(answer) == sentence


def test_the_first_sentence_is_the_likeliest():
    """As by mlx-lm, until it ends or 24 tokens are written."""
    tokenizer, model = toys.tokenizer(), toys.toy("llama")
    nectar = toys.exact(model, [3, 4, 5, 6, 7, 8])
    prompt = [9, 10, 11]
    steps = generate_step(mx.array(prompt), model, max_tokens=24, prompt_cache=nectar.make_cache())
    tokens = [token for token, _ in steps]
    ends = [n for n, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
    whole = tokenizer.decode(tokens[: ends[0]] if ends else tokens)
    assert first_sentence(model, tokenizer, nectar.make_cache(), prompt) == cut(whole) != ""
