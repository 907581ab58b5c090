"""The model's window, and the room that is left in it for an answer."""

import mlx.nn as nn
import pytest

from nectar_mlx.mlxlm.window import ANSWER_TOKENS, NoRoom, answer_tokens, window
from tests import toys


def test_the_window_is_the_configurations_or_its_text_parts():
    assert window(toys.toy("llama", max_position_embeddings=300)) == 300
    assert window(toys.toy("gemma3")) == 4096
    assert window(toys.toy("kimi_vl")) == 4096, "its text part is not a dictionary"
    assert window(toys.toy("gpt2")) == 128, "by another name"
    assert window(toys.toy("plamo3")) == 4096, "which keeps its configuration under another name"
    assert window(nn.Linear(2, 2)) is None


def test_the_default_is_cut_to_the_room():
    model = toys.toy("llama", max_position_embeddings=1000)
    assert answer_tokens(model, start=100, prompt=50) == ANSWER_TOKENS
    assert answer_tokens(model, start=900, prompt=50) == 50
    assert answer_tokens(model, start=900, prompt=99) == 1
    assert answer_tokens(model, start=900, prompt=50, default=20) == 20


def test_what_was_chosen_is_kept_or_refused():
    model = toys.toy("llama", max_position_embeddings=1000)
    assert answer_tokens(model, start=900, prompt=50, chosen=50) == 50
    with pytest.raises(NoRoom, match=r"of 51 tokens does not .* 1,000: .* prompt of 50 tokens .* room for 50"):
        answer_tokens(model, start=900, prompt=50, chosen=51)


@pytest.mark.parametrize("start, prompt, room", [(900, 100, 100), (900, 2000, 100), (1200, 1, 0)])
def test_a_prompt_that_leaves_no_room_is_refused(start, prompt, room):
    model = toys.toy("llama", max_position_embeddings=1000)
    with pytest.raises(NoRoom, match=rf"{prompt:,} tokens; .* window of 1,000 .* room for {room}, the answer included"):
        answer_tokens(model, start=start, prompt=prompt)


def test_a_model_without_a_window_is_not_limited():
    assert answer_tokens(nn.Linear(2, 2), start=10**6, prompt=10**6, chosen=10**6) == 10**6
    assert answer_tokens(nn.Linear(2, 2), start=10**6, prompt=10**6) == ANSWER_TOKENS
