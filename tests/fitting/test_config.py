from types import SimpleNamespace

import pytest

from nectar_mlx.fitting import config as configuration
from nectar_mlx.fitting.config import FitConfig, layout_for, rows_for
from nectar_mlx.fitting.samples.sample_store import SampleStore
from nectar_mlx.mlxlm.attention_patch import Geometry

HEADS, DIM = 224, 128


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(configuration, "_FEWEST_ROWS", 20_000)
    monkeypatch.setattr(configuration, "_MOST_ROWS", 120_000)
    return lambda total: monkeypatch.setattr(configuration, "_machine", lambda: SimpleNamespace(total=total))


@pytest.mark.parametrize(
    "total, rows", [(16 << 30, 20_000), (64 << 30, (8 << 30) // SampleStore.nbytes(HEADS, 1, DIM)), (1 << 40, 120_000)]
)
def test_as_many_rows_as_the_memory_easily_holds(memory, total, rows):
    memory(total)
    assert rows_for(FitConfig(), heads=HEADS, head_dim=DIM) == rows
    assert rows_for(FitConfig(queries=7), heads=HEADS, head_dim=DIM) == 7


def test_a_memory_that_is_told_counts_instead(memory):
    memory(1 << 40)
    one = SampleStore.nbytes(HEADS, 1, DIM)
    assert rows_for(FitConfig(memory=30_000 * one), heads=HEADS, head_dim=DIM) == 30_000
    assert rows_for(FitConfig(memory=10 * one), heads=HEADS, head_dim=DIM) == 20_000


@pytest.mark.parametrize(
    "options, bits",
    [
        ({}, None),
        ({"kind": "quadrature", "bits": 6}, 6),
        ({"budget": 0.005, "bits": 8}, 8),
        ({"budget": 0.005, "kind": "hybrid"}, 6),
        ({"budget": 0.005, "kind": "mlp"}, 8),
        ({"kind": "exact"}, 16),
    ],
)
def test_each_kind_has_its_bits(options, bits):
    geometry = Geometry(model_type="llama", n_heads=4, n_kv_heads=2, head_dim=DIM, scale=0.1, windows=(0, 0))
    assert layout_for(FitConfig(**options), geometry, n_layers=2).bits == bits
