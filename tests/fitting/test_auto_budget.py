"""The budget that is chosen, what a person may write instead, and the verdict on what came of it."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError, cli, fit
from nectar_mlx.fitting import auto_budget, verdict
from nectar_mlx.fitting.budget import share_of
from nectar_mlx.fitting.config import FitConfig, parse_budget, parse_size
from nectar_mlx.fitting.fidelity import Divergence
from nectar_mlx.mlxlm import attention_patch
from tests import toys
from tests.fitting.toy_fit import shallow

FLOOR = 0.8  # KL without the text
FAST = {
    "queries": 400,
    "conversations": 8,
    "steps": 20,
    "trial_steps": 3,
    "answer_tokens": 8,
    "checks": 3,
    "batch": 64,
    "matching_samples": 200,
}


def power_law(share_at_target, exponent):
    """What a short fit leaves where KL falls with this power of the share and is on target at that share."""
    measured = []

    def measure(share):
        measured.append(share)
        kl = (1 - auto_budget.TARGET) * FLOOR * (share_at_target / share) ** exponent
        return {"kl": kl, "kl_no_context": FLOOR}

    return measure, measured


@pytest.mark.parametrize("exponent", [0.7, 1.7, 3.0, 7.0])
@pytest.mark.parametrize("wanted", [0.004, 0.0123, 0.02, 0.021, 0.037, 0.08, 0.21])
def test_a_share_on_target_is_found_that_is_hardly_too_large(wanted, exponent):
    measure, measured = power_law(wanted, exponent)
    choice = auto_budget.choose(measure)
    assert wanted * (1 - 1e-9) <= choice.share < 1.3 * wanted and choice.share in measured
    assert choice.exponent == pytest.approx(min(exponent, 4), rel=0.01)
    most = 1 + np.ceil(abs(np.log2(wanted / auto_budget.FIRST))) + 1
    assert len(measured) <= most and len(set(measured)) == len(measured)


@pytest.mark.parametrize("wanted, share", [(1e-6, auto_budget.LEAST), (50.0, auto_budget.MOST)])
def test_what_no_share_can_do_ends_at_the_bounds(wanted, share):
    measure, measured = power_law(wanted, 1.0)
    assert auto_budget.choose(measure).share == share and len(measured) < 8


@pytest.mark.parametrize("kl", [(0.06, 0.06, 0.06), (0.06, 0.0600001, 0.06), (0.0080001, 0.008, 0.008)])
def test_bytes_that_change_next_to_nothing(kl):
    choice = auto_budget.choose(lambda share: {"kl": kl[min(2, round(share / 0.02) - 1)], "kl_no_context": FLOOR})
    assert choice.share in (0.04, auto_budget.MOST) and choice.exponent == 0.5


def test_noise_does_not_leave_the_bracket():
    """More bytes that came out worse are taken for no better."""
    kl = {0.02: 0.011, 0.04: 0.02, 0.08: 0.006}
    choice = auto_budget.choose(lambda share: {"kl": kl[round(share, 4)], "kl_no_context": FLOOR})
    assert choice.share == 0.08 and 0.5 <= choice.exponent <= 4


def test_a_share_between_two_is_measured_before_it_is_taken():
    """With room for all keys of a head the divergence may fall at once: below it is far from any power law."""
    measured = []

    def cliff(share):
        measured.append(share)
        return {"kl": 0.0005 if share > 0.14 else 0.09 * (0.08 / share), "kl_no_context": FLOOR}

    choice = auto_budget.choose(cliff)
    assert 0.14 < choice.share <= 0.16 and len(measured) <= 4 + 3


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
    geometry = attention_patch.route(shallow())
    config = FitConfig(size=geometry.cache_bytes(100) // 4)
    assert share_of(config, geometry, 100) == pytest.approx(0.25)
    assert share_of(FitConfig(), geometry, 100) is None and share_of(FitConfig(budget=0.1), geometry, 100) == 0.1


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("layerwise", [None, True])
def test_the_default_fits_a_text_and_says_how_well(tokenizer, layerwise):
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(16))
    nectar = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST, layerwise=layerwise))
    report = nectar.report
    assert auto_budget.LEAST <= report["budget"] <= auto_budget.MOST
    assert report["verdict"] == nectar.verdict and "%" in nectar.verdict
    assert report["gap_closed"] == pytest.approx(1 - report["kl"] / report["kl_no_context"], abs=2e-4)


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("text", ["Hi.", "One short note.", "Anna's tram leaves at 8:14."])
def test_a_short_note_never_fails_on_the_default(tokenizer, text):
    nectar = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST))
    assert np.isfinite(nectar.report["kl"]) and nectar.report["kl"] < max(0.05, nectar.report["kl_no_context"])
    assert all(mx.isfinite(bank.parameters["keys"]).all().item() for bank in nectar.banks)


def test_what_was_left_out_is_counted(tokenizer):
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(30))
    whole = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST, kind="exact"))
    cut = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST, kind="exact", context_tokens=100))
    assert "left_out_tokens" not in whole.report
    assert cut.report["left_out_tokens"] == len(whole.prefix) - len(cut.prefix) > 100


def test_a_size_is_kept_to(tokenizer):
    text = " ".join(f"The brig number {i} left with {i * 37 % 91} casks." for i in range(30))
    nectar = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST, size=60_000))
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
    assert "KL 0.0040, where the whole text changes answers by 0.0100" in verdict.sentence(report, share=0.1)


@pytest.mark.parametrize("kl, floor", [(float("nan"), 1.0), (0.1, float("inf"))])
def test_a_check_that_is_not_finite_is_refused(kl, floor):
    with pytest.raises(NectarError, match="not finite, so nothing is written"):
        verdict.measured(divergence([kl]), divergence([floor]))


@pytest.mark.parametrize(
    "share, larger", [(0.0195, "3%"), (0.02, "3%"), (0.004, "0.5%"), (0.005, "0.7%"), (0.08, "10%"), (0.9, "100%")]
)
def test_the_budget_that_is_recommended_is_larger_than_that_of_the_file(share, larger):
    # 0.97 of the gap is closed: a power law alone would ask for 1.24 times the bytes, and 1.25 are asked for at least
    report = {"gap_closed": 0.97, "kl": 0.0285, "kl_no_context": 0.98, "agree": 0.9}
    assert verdict.sentence(report, share=share).endswith(f"a budget of about {larger} would be close to it.")


def test_files_that_were_not_checked_have_no_verdict():
    assert verdict.grade({"kl": 0.1}) is None and verdict.sentence({}, share=0.1) == ""


def test_sizes_that_no_disk_has_are_very_large_and_no_traceback():
    assert parse_budget("1e308G") == {"size": 10**18} and cli.size("9" * 400) == 10**18
    for text in ("1e400", "1e400M", "-1e400"):
        with pytest.raises(NectarError, match="2%"):
            parse_budget(text)


def test_a_seed_has_63_bits():
    assert FitConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(NectarError, match=r"seed must be below 2\^63"):
        FitConfig(seed=2**63)


@pytest.mark.parametrize("kl, floor", [(0.0, 0.0), (-2e-7, -3e-9), (2e-7, -1e-9), (1e-6, 0.0)])
def test_where_a_text_changes_nothing_but_rounding_errors_all_of_it_is_kept(kl, floor):
    report = verdict.measured(divergence([kl]), divergence([floor]))
    assert report["gap_closed"] == 1.0 and report["kl"] >= 0 and "100.0%" in verdict.sentence(report, share=0.1)


def test_what_is_kept_is_no_less_than_nothing():
    report = verdict.measured(divergence([2 * FLOOR]), divergence([FLOOR]))
    assert report["gap_closed"] == -1.0 and ": 0.0% of what the text changes" in verdict.sentence(report, share=0.1)


NOTES = [
    "One short note.",
    "Anna's tram leaves at 8:14 from the old harbour, and the brig has 37 casks of rum.",
    "The brig number 7 left with 37 casks. " * 4,
]


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("text", NOTES)
def test_the_default_for_a_short_note_is_close_to_it(tokenizer, text):
    """Where all keys are kept, rounding alone is what separates them from the full cache."""
    nectar = toys.fit(shallow(), tokenizer, text, config=FitConfig(**FAST))
    assert nectar.verdict.startswith("Close to the full text") and nectar.report["gap_closed"] > verdict.CLOSE
    assert nectar.nbytes < 0.5 * nectar.cache_nbytes


def test_the_largest_budget_keeps_all_keys_in_eleven_bits(tokenizer):
    nectar = toys.fit(shallow(), tokenizer, NOTES[1], config=FitConfig(**FAST, budget=auto_budget.MOST))
    assert all(size == (len(nectar.prefix),) for bank in nectar.banks for size in bank.sizes)
    assert nectar.bits == pytest.approx(11, abs=0.5) and nectar.report["gap_closed"] > 0.999


@pytest.mark.parametrize("wanted", [0.33, 0.4, 0.5, 0.63, 0.7])
def test_more_bits_of_the_same_keys_are_found_too(wanted):
    """KL falls by a factor of 4 with each bit, 14 bits a number where the share is 1."""
    choice = auto_budget.choose(
        lambda share: {"kl": (1 - auto_budget.TARGET) * FLOOR * 4 ** (14 * (wanted - share)), "kl_no_context": FLOOR}
    )
    assert wanted <= choice.share < 1.44 * wanted


@pytest.mark.parametrize("floor", [1e-9, 1e-4, 0.02, 0.099])
def test_where_a_text_changes_little_a_thousandth_of_a_nat_is_enough(floor):
    choice = auto_budget.choose(lambda share: {"kl": 1e-3 * (0.03 / share) ** 1.7, "kl_no_context": floor})
    assert 0.03 <= choice.share < 1.2 * 0.03
    assert auto_budget.choose(lambda share: {"kl": 1e-6, "kl_no_context": floor}).share == auto_budget.LEAST


def test_no_more_is_advised_than_would_be_called_close():
    report = verdict.measured(divergence([0.04]), divergence([0.1])) | {"exponent": 1.0}
    assert "about 8%" in verdict.sentence(report, share=0.02), "a KL of 0.01 is close, four times the bytes away"


@pytest.mark.parametrize("kl, floor, grade", [
    (0.045, 0.05, "not faithful"),
    (0.03, 0.05, "not faithful"),
    (0.025, 0.05, "usable"),
    (0.06, 0.15, "not faithful"),
    (0.009, 0.01, "close"),
])  # fmt: skip
def test_a_small_divergence_is_usable_where_most_of_the_text_is_kept(kl, floor, grade):
    report = verdict.measured(divergence([kl]), divergence([floor]))
    assert verdict.grade(report) == grade
    assert ("of what the text changes is kept" in verdict.sentence(report, share=0.02)) == (grade == "not faithful")


def test_a_size_has_a_unit():
    assert [parse_size(text) for text in ("5000B", "20M", "500 kB", "1.5G")] == [
        5000,
        20_000_000,
        500_000,
        1_500_000_000,
    ]
    assert parse_budget("5000B") == {"size": 5000}
    for text in ("1", "5000", "2%", "auto", "0.02", "20X", "", "inf"):
        with pytest.raises(NectarError, match="a size is a number with a unit") as error:
            parse_size(text)
        assert repr(text) in str(error.value) and "budget" not in str(error.value)


@pytest.mark.parametrize("size", ["1", "5000", ""])
def test_the_command_asks_for_a_unit(tmp_path, capsys, size):
    (tmp_path / "note.txt").write_text(NOTES[0])
    arguments = ["--model", "none", "--context", str(tmp_path / "note.txt"), "--output", str(tmp_path / "x.nectar")]
    assert fit.main([*arguments, "--size", size]) == cli.FAULT
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"a size is a number with a unit, such as 20M, 500K or 5000B, not {size!r}" in err
