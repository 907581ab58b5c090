from types import SimpleNamespace

import pytest

from nectar_mlx.fitting import config as configuration
from nectar_mlx.fitting.capture import Study
from nectar_mlx.fitting.config import FitConfig, rows_for

HEADS, DIM = 224, 128


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(configuration, "_FEWEST_ROWS", 20_000)
    monkeypatch.setattr(configuration, "_MOST_ROWS", 120_000)
    return lambda total: monkeypatch.setattr(configuration, "_machine", lambda: SimpleNamespace(total=total))


@pytest.mark.parametrize(
    "total, rows", [(16 << 30, 20_000), (64 << 30, (8 << 30) // Study.nbytes(HEADS, 1, DIM)), (1 << 40, 120_000)]
)
def test_as_many_rows_as_the_memory_easily_holds(memory, total, rows):
    memory(total)
    assert rows_for(FitConfig(), heads=HEADS, head_dim=DIM) == rows
    assert rows_for(FitConfig(queries=7), heads=HEADS, head_dim=DIM) == 7


def test_a_memory_that_is_told_counts_instead(memory):
    memory(1 << 40)
    one = Study.nbytes(HEADS, 1, DIM)
    assert rows_for(FitConfig(memory=30_000 * one), heads=HEADS, head_dim=DIM) == 30_000
    assert rows_for(FitConfig(memory=10 * one), heads=HEADS, head_dim=DIM) == 20_000
