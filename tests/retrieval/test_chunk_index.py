"""The chunk that a question is about."""

import pytest

from nectar_mlx.retrieval import ChunkIndex
from tests import toys

TEXTS = ["The copper is in the old garden. ", "The velvet is in the red house. ", "The marble is in the garden. "]


@pytest.fixture(scope="module")
def index():
    tokenizer = toys.tokenizer()
    filler = "It rained on the ship all day long. " * 8
    return ChunkIndex(tokenizer, [tokenizer.encode(filler + text + filler) for text in TEXTS])


@pytest.mark.parametrize("question, number", [
    ("Where is the velvet?", 1),
    ("MARBLE?", 2),
    ("who has the old thing", 0),  # one word
    ("in the red house, or the ship", 1),  # words and phrases
    ("zebra", None),  # no chunk has it
    ("the ship in the rain all day long", None),  # every chunk has them
    ("garden", None),  # most chunks have it
    ("", None),
])  # fmt: skip
def test_words_that_few_chunks_have_decide(index, question, number):
    assert index.nearest(question) == number
