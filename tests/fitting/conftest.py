"""What the tests of fitting share: a tokenizer, and fits that several of them look at."""

from dataclasses import replace
from functools import cache

import pytest

from nectar_mlx.core.device import device, using
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.samples import self_study
from nectar_mlx.fitting.samples.conversation import FEWEST_TOGETHER
from tests import toys
from tests.fitting.toy_fit import FAST, FEW_TOGETHER, TEXT, shallow


@pytest.fixture(scope="session")
def tokenizer():
    return toys.tokenizer()


@pytest.fixture(scope="session")
def toy_fit(tokenizer):
    """The fit of a toy to TEXT, made once for each architecture and configuration; nobody changes what it returns."""

    @cache
    def fit(architecture="llama", **options):
        return toys.fit(shallow(architecture), tokenizer, TEXT, config=FitConfig(**FAST | options))

    return fit


# Whose subject is how many conversations there are, or what is seen of them.
WHOLE_STUDY = ["ahead", "distillation", "distributed", "estimate", "recording", "samples", "sharded", "study_cache"]


@pytest.fixture(scope="module", autouse=True)
def few_conversations(request):
    """Elsewhere fits ask for fewer than would be worth a batch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem.removeprefix("test_") not in WHOLE_STUDY:
            patch.setattr(self_study, "FEWEST_TOGETHER", FEW_TOGETHER)
        yield


@pytest.fixture
def many_conversations(monkeypatch):
    """As many as outside of tests, for one test."""
    monkeypatch.setattr(self_study, "FEWEST_TOGETHER", FEWEST_TOGETHER)


@pytest.fixture(scope="module")
def short_trials(few_conversations):
    """For modules whose subject is not how well a budget is chosen."""
    with using(replace(device(), trial_steps=10, trial_checks=4)):
        yield
