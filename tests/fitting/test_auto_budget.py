"""The budget that is chosen, what a person may write instead, and the verdict on what came of it."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError, adapter
from nectar_mlx.fitting import auto_budget, verdict
from nectar_mlx.fitting.config import FitConfig, parse_budget, share_of
from nectar_mlx.fitting.fidelity import Divergence
from tests import toys

FLOOR = 0.8  # KL without the text
FAST = {
    "queries": 400,
    "conversations": 8,
    "steps": 20,
    "scout_steps": 3,
    "answer_tokens": 8,
    "checks": 3,
    "batch": 64,
    "samples": 200,
}


def power_law(share_at_target, exponent):
    """What a short fit leaves where KL falls with this power of the share and is on target at that share."""
    asked = []

    def measure(share):
        asked.append(share)
        kl = (1 - auto_budget.TARGET) * FLOOR * (share_at_target / share) ** exponent
        return {"kl": kl, "kl_no_context": FLOOR}

    return measure, asked


@pytest.mark.parametrize("exponent", [0.7, 1.7, 3.0, 7.0])
@pytest.mark.parametrize("wanted", [0.004, 0.0123, 0.02, 0.021, 0.037, 0.08, 0.21])
def test_a_share_on_target_is_found_that_is_hardly_too_large(wanted, exponent):
    measure, asked = power_law(wanted, exponent)
    choice = auto_budget.choose(measure)
    assert wanted * (1 - 1e-9) <= choice.share < 1.26 * wanted and choice.share in asked
    assert choice.exponent == pytest.approx(min(exponent, 4), rel=0.01)
    assert len(asked) <= 1 + np.ceil(abs(np.log2(wanted / auto_budget.FIRST))) + 1 and len(set(asked)) == len(asked)


@pytest.mark.parametrize("wanted, share", [(1e-6, auto_budget.LEAST), (50.0, auto_budget.MOST)])
def test_what_no_share_can_do_ends_at_the_bounds(wanted, share):
    measure, asked = power_law(wanted, 1.0)
    assert auto_budget.choose(measure).share == share and len(asked) < 8


def test_noise_does_not_leave_the_bracket():
    """More bytes that came out worse are taken for no better."""
    kl = {0.02: 0.011, 0.04: 0.02, 0.08: 0.006}
    choice = auto_budget.choose(lambda share: {"kl": kl[round(share, 4)], "kl_no_context": FLOOR})
    assert choice.share == 0.08 and 0.5 <= choice.exponent <= 4


def test_a_share_between_two_is_measured_before_it_is_taken():
    """With room for all keys of a head the divergence may fall at once: below it is far from any power law."""
    asked = []

    def cliff(share):
        asked.append(share)
        return {"kl": 0.0005 if share > 0.14 else 0.09 * (0.08 / share), "kl_no_context": FLOOR}

    choice = auto_budget.choose(cliff)
    assert 0.14 < choice.share <= 0.16 and len(asked) <= 4 + 3


@pytest.mark.parametrize("text, fields", [
    ("auto", {"budget": "auto"}),
    ("0.02", {"budget": 0.02}),
    (".5", {"budget": 0.5}),
    ("2e-3", {"budget": 0.002}),
    ("4%", {"budget": 0.04}),
    ("0.5 %", {"budget": 0.005}),
    ("20M", {"size": 20_000_000}),
    ("1.5GB", {"size": 1_500_000_000}),
    ("800k", {"size": 800_000}),
    ("800K", {"size": 800_000}),
])  # fmt: skip
def test_what_a_person_writes(text, fields):
    assert parse_budget(text) == fields
    FitConfig(**fields)


@pytest.mark.parametrize("text", ["", "much", "2%%", "20X", "1.2.3", "--", "%", "nan", "20M%", "inf"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(NectarError, match="2%"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0", "0%", "-3%", "150%", "-1M", "0M"])
def test_a_budget_out_of_range_is_refused(text):
    with pytest.raises(NectarError):
        FitConfig(**parse_budget(text))


def test_a_size_is_a_share_of_the_cache():
    geometry = adapter.route(toys.toy("llama"))
    config = FitConfig(size=geometry.cache_bytes(100) // 4)
    assert share_of(config, geometry, 100) == pytest.approx(0.25)
    assert share_of(FitConfig(), geometry, 100) is None and share_of(FitConfig(budget=0.1), geometry, 100) == 0.1


@pytest.mark.parametrize("layerwise", [None, True])
def test_the_default_fits_a_text_and_says_how_well(layerwise):
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(16))
    nectar = toys.fit(toys.toy("llama"), toys.tokenizer(), text, config=FitConfig(**FAST, layerwise=layerwise))
    report = nectar.report
    assert auto_budget.LEAST <= report["budget"] <= auto_budget.MOST
    assert report["verdict"] == nectar.verdict and "%" in nectar.verdict
    assert report["gap_closed"] == pytest.approx(1 - report["kl"] / report["kl_no_context"], abs=2e-4)


@pytest.mark.parametrize("text", ["Hi.", "One short note.", "Anna's tram leaves at 8:14."])
def test_a_short_note_never_fails_on_the_default(text):
    nectar = toys.fit(toys.toy("llama"), toys.tokenizer(), text, config=FitConfig(**FAST))
    assert nectar.report["gap_closed"] is not None and mx.isfinite(nectar.banks[0].parameters["keys"]).all().item()


def test_what_was_left_out_is_counted():
    tokenizer = toys.tokenizer()
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(30))
    whole = toys.fit(toys.toy("llama"), tokenizer, text, config=FitConfig(**FAST, kind="exact"))
    cut = toys.fit(toys.toy("llama"), tokenizer, text, config=FitConfig(**FAST, kind="exact", context_tokens=100))
    assert "left_out_tokens" not in whole.report
    assert cut.report["left_out_tokens"] == len(whole.prefix) - len(cut.prefix) > 100


def test_a_size_is_kept_to(tmp_path):
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(30))
    nectar = toys.fit(toys.toy("llama"), toys.tokenizer(), text, config=FitConfig(**FAST, size=60_000))
    assert 45_000 < nectar.nbytes <= 60_000


def divergence(kl, agree=True):
    kl = np.asarray(kl, float)
    tokens = len(kl)
    return Divergence(kl, np.full(tokens, agree), *(np.zeros(tokens, int) for _ in range(3)))


@pytest.mark.parametrize("kl, grade, words", [
    (0.001, "close", "Close to the full text"),
    (0.015, "close", "Close to the full text"),
    (0.03, "usable", "Usable"),
    (0.3, "not faithful", "Not faithful to the text"),
])  # fmt: skip
def test_the_verdict(kl, grade, words):
    report = verdict.measured(divergence([kl] * 4), divergence([FLOOR] * 4))
    assert verdict.grade(report) == grade
    sentence = verdict.sentence(report, share=0.02)
    assert sentence.startswith(words) and sentence.count("\n") == 0
    assert ("budget" in sentence) == (grade != "close")


def test_the_budget_that_is_advised_grows_with_what_is_lost():
    worse, bad = (
        verdict.sentence(verdict.measured(divergence([kl]), divergence([FLOOR])) | {"exponent": 2.0}, share=0.02)
        for kl in (0.064, 0.256)
    )
    assert "about 4%" in worse and "about 8%" in bad  # KL four and sixteen times the wanted, the square of the bytes


def test_where_a_text_changes_little_its_share_says_nothing():
    report = verdict.measured(divergence([0.004]), divergence([0.01]))
    assert report["gap_closed"] == 0.6 and verdict.grade(report) == "close"


@pytest.mark.parametrize("kl, floor", [(float("nan"), 1.0), (0.1, float("inf"))])
def test_a_check_that_is_not_finite_is_refused(kl, floor):
    with pytest.raises(NectarError, match="not finite, so nothing is written"):
        verdict.measured(divergence([kl]), divergence([floor]))


def test_files_that_were_not_checked_have_no_verdict():
    assert verdict.grade({"kl": 0.1}) is None and verdict.sentence({}, share=0.1) == ""
