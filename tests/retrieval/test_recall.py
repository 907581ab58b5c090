"""Recall: exact matches, the mixture against float64 numpy, its calibration, and damaged reports."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate

from nectar_mlx.retrieval.recall import SHORTEST, Calibration, Copy, Matcher, Recall, copies
from tests import toys

TEXT = [*range(100, 160), 7, 8, 9, *range(100, 120), 55, 56]


def after(tokens):
    matcher = Matcher(TEXT)
    for token in tokens:
        matcher.feed(token)
    return matcher.copy()


def test_what_follows_the_longest_match():
    assert after(TEXT[20 : 20 + SHORTEST - 1]) is None
    copy = after(TEXT[20 : 20 + SHORTEST])
    assert (copy.tokens.tolist(), copy.probabilities.tolist()) == ([120 + SHORTEST], [1.0])
    # Twice in the text, followed by different tokens; with the token before, only once.
    copy = after(range(110, 120))
    assert copy.tokens.tolist() == [55, 120] and copy.probabilities.tolist() == [0.5, 0.5]
    assert after([7, 8, 9, *range(100, 120)]).tokens.tolist() == [55]


def test_nothing_follows_the_end_and_a_slip_ends_a_match():
    assert after(TEXT[-SHORTEST:]) is None
    assert after([*TEXT[20:40], 3, 141]) is None
    assert Matcher([]).copy() is None and Matcher([5]).copy() is None


def test_it_is_the_slow_search():
    """Against a search of every suffix, on random text of few tokens."""
    rng = np.random.default_rng(0)
    text, said = rng.integers(0, 2, 300).tolist(), rng.integers(0, 2, 80).tolist()
    matcher = Matcher(text)
    for i, token in enumerate(said):
        matcher.feed(token)
        heard = said[: i + 1]
        found: dict[int, list[int]] = {}
        for end in range(1, len(text)):
            length = 0
            while length < min(end, len(heard)) and text[end - 1 - length] == heard[-1 - length]:
                length += 1
            found.setdefault(length, []).append(text[end])
        longest, copy = max(found), matcher.copy()
        assert (copy is None) == (longest < SHORTEST)
        if copy is not None:
            assert copy.tokens.tolist() == sorted(set(found[longest]))


@pytest.mark.parametrize(("weight", "exponent"), [(0.9, 0.0), (0.8, 0.5)])
def test_the_mixture(weight, exponent):
    logits = mx.random.normal((50,), key=mx.random.key(1)) * 3
    copy = Copy(np.array([4, 9], np.int32), np.array([0.25, 0.75]))
    p = np.exp(np.array(logits, np.float64))
    p /= p.sum()
    follows = np.zeros(50)
    follows[[4, 9]] = copy.probabilities
    w = weight * ((follows * p).sum() / (follows**2).sum()) ** exponent
    mixed = np.exp(np.array(Recall(weight, exponent).mixed(logits, copy), np.float64))
    np.testing.assert_allclose(mixed, (1 - w) * p + w * follows, rtol=1e-4, atol=1e-9)


def kl(reference, ours):
    p = np.exp(np.array(reference, np.float64))
    p /= p.sum(-1, keepdims=True)
    q = np.exp(np.array(ours, np.float64))
    q /= q.sum(-1, keepdims=True)
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def quoting(noise):
    """A full cache that quotes the text, and a file whose logits are off by some noise."""
    prompt, answer = [1, 2], TEXT[10:50]
    reference = mx.random.normal((len(answer), 200), key=mx.random.key(2))
    reference[mx.arange(len(answer)), mx.array(answer)] = 9.0
    ours = reference + noise * mx.random.normal(reference.shape, key=mx.random.key(3))
    return prompt, answer, reference, ours


def test_a_file_that_forgets_the_wording_gets_a_weight():
    prompt, answer, reference, ours = quoting(5.0)
    calibration = Calibration(TEXT)
    calibration.add(prompt, answer, reference, ours)
    best, before = calibration.best(), kl(reference, ours)
    assert best.weight > 0.4
    after_ = kl(reference, best.applied(TEXT, prompt, answer, ours))
    assert after_ < 0.7 * before
    report = calibration.report(before)
    assert report["kl"] == pytest.approx(after_, abs=2e-4)
    assert report["matched"] == sum(copy is not None for copy in copies(TEXT, prompt, answer)) == 40 - SHORTEST
    assert Recall.of({"recall": report}) == best


def test_a_file_that_knows_the_text_gets_none():
    """Where the full cache leaves the text's wording, and the file knows."""
    prompt, answer, reference, _ = quoting(0.0)
    reference[mx.arange(40), mx.array(answer)] = 0.0
    calibration = Calibration(TEXT)
    calibration.add(prompt, answer, reference, reference + 0.01)
    assert calibration.best().weight == 0
    assert calibration.best().applied(TEXT, prompt, answer, reference) is reference


@pytest.mark.parametrize(
    "said", [None, 3, {}, {"weight": 1.0, "exponent": 0}, {"weight": "a", "exponent": 0}, {"weight": 0.5},
             {"weight": -0.5, "exponent": 0}, {"weight": float("nan"), "exponent": 0},
             {"weight": 0.5, "exponent": float("inf")}]
)  # fmt: skip
def test_a_damaged_report_recalls_nothing(said):
    assert Recall.of({"recall": said}) == Recall(0.0, 0.0)


def test_mlx_lm_quotes_with_it():
    """A toy that never quotes goes on with the text, once the question quotes enough of it."""
    model, words = toys.toy("llama"), toys.tokenizer()
    nectar = toys.exact(model, toys.random_tokens(80), words)
    assert nectar.logits_processors() == []
    nectar.report["recall"] = {"weight": 0.999, "exponent": 0.0}
    del nectar.recall
    prompt = nectar.prefix[30 : 30 + SHORTEST]
    said = [
        response.token
        for response in stream_generate(
            model,
            words,
            prompt,
            max_tokens=12,
            prompt_cache=nectar.make_cache(),
            logits_processors=nectar.logits_processors(),
        )
    ]
    assert said == nectar.prefix[30 + SHORTEST : 42 + SHORTEST]
