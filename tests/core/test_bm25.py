from collections import Counter

from nectar_mlx.core.bm25 import Index
from nectar_mlx.core.words import words
from tests import toys

TEXTS = ["the ship sailed", "the master was anna velde", "the casks of amber", "the wind and the sea"]
INDEX = Index([[i] for i in range(4)], [Counter(t.split()) for t in TEXTS])


def test_the_passage_with_the_rare_word_is_found():
    assert INDEX.best("Who is Anna Velde, the master?", 1) == [1]
    assert INDEX.best("the amber and the sea", 2) == [2, 3]


def test_words_that_nobody_says_or_that_do_not_count_score_nothing():
    assert INDEX.scores("zebra") == [0.0] * 4
    assert INDEX.scores("the amber", without={"amber", "the"}) == [0.0] * 4
    assert INDEX.scores("the amber", without={"the"})[2] > 0


def test_a_text_without_a_word_scores_nothing():
    assert Index([[1], [2]], [Counter(), Counter()]).scores("amber") == [0.0, 0.0]


def test_passages_are_cut_from_token_ids():
    tokenizer, text = toys.tokenizer(), "Anna was master of the ship. " * 20
    ids = tokenizer.encode(text)
    index = Index.of(tokenizer, ids, passage=16)
    assert [token for passage in index.passages for token in passage] == ids
    assert {len(p) for p in index.passages[:-1]} == {16}
    assert {"anna", "master", "ship"} <= index.vocabulary


def test_phrases_tell_more_than_their_words():
    texts = ["a library of modules, a password file", "the password of the library is silver"]
    question = "the password of the library"
    ratios = []
    for phrase in (1, 3):
        index = Index([[0], [1]], [Counter(words(t, phrase=phrase)) for t in texts], phrase)
        first, second = index.scores(question, without={"the", "of"})
        ratios.append(second / first)
    assert 0.5 < ratios[0] < 2 and ratios[1] > 3
    assert words("to be or", phrase=2) == ["to", "be", "or", "to be", "be or"]


def test_indices_are_joined_in_order():
    first, second = Index([[1]], [Counter(["a"])], 2), Index([[2], [3]], [Counter(["b"]), Counter(["c"])], 2)
    assert Index.joined([first, second]) == Index([[1], [2], [3]], [Counter("a"), Counter("b"), Counter("c")], 2)
