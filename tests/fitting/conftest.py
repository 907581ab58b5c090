"""What the tests of fitting share: a tokenizer, and fits that several of them look at."""

from functools import cache

import pytest

from nectar_mlx.fitting.config import FitConfig
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT


@pytest.fixture(scope="session")
def tokenizer():
    return toys.tokenizer()


@pytest.fixture(scope="session")
def toy_fit(tokenizer):
    """The fit of a toy to TEXT, made once for each architecture and configuration; nobody changes what it returns."""

    @cache
    def fit(architecture="llama", **options):
        return toys.fit(toys.toy(architecture), tokenizer, TEXT, config=FitConfig(**FAST | options))

    return fit
