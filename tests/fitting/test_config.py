"""What follows from a configuration: samples a head, and bits."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from nectar_mlx.core import device
from nectar_mlx.errors import NectarError
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.prefill import Context
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, SampleStore
from nectar_mlx.mlxlm.attention_patch import Geometry

HEADS, DIM = 224, 128
GEOMETRY = Geometry.uniform(model_type="llama", n_heads=4, n_kv_heads=2, head_dim=DIM, scale=0.1, windows=(0, 0))


def run(**options):
    return FitRun(model=None, tokenizer=None, geometry=GEOMETRY, config=FitConfig(**options))


@pytest.fixture
def memory(monkeypatch, set_device):
    set_device(fit_samples=120_000)
    return lambda total: monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=total)
    )


@pytest.mark.parametrize(
    "total, samples",
    [
        (16 << 30, 20_000),
        (64 << 30, (8 << 30) // SampleStore.nbytes(HEADS, 1, DIM)),
        (1 << 40, 9_000_000_000 // SampleStore.nbytes(HEADS, 1, DIM)),
    ],
)
def test_as_many_samples_as_the_memory_easily_holds(memory, set_device, total, samples):
    set_device(linux_cpu=True)
    memory(total)
    assert run().n_samples(HEADS) == samples
    assert run(queries=7).n_samples(HEADS) == 7


def test_samples_on_the_device_take_half_as_much(memory, set_device):
    set_device(linux_cpu=False)
    memory(64 << 30)
    assert run().n_samples(HEADS) == (8 << 30) // DeviceSampleStore.nbytes(HEADS, 1, DIM)


def test_the_memory_that_is_asked_for_counts_instead(memory, set_device):
    set_device(linux_cpu=True)
    memory(1 << 40)
    one = SampleStore.nbytes(HEADS, 1, DIM)
    assert run(memory=30_000 * one).n_samples(HEADS) == 30_000
    assert run(memory=10 * one).n_samples(HEADS) == 20_000


def test_as_many_tokens_where_many_query_heads_share_a_kv_head(memory, set_device):
    set_device(linux_cpu=False, fit_tokens=50_000)
    memory(1 << 40)
    wide = Geometry.uniform(model_type="qwen2", n_heads=14, n_kv_heads=2, head_dim=64, scale=0.1, windows=(0, 0))
    assert replace(run(), geometry=wide).n_samples(48) == 350_000
    assert run().n_samples(48) == 120_000  # two query heads a KV head


@pytest.mark.parametrize(
    "total, options, share",
    [
        (16 << 30, {}, 20_000 / 100_000),  # a small machine: some samples of many conversations
        (1 << 40, {}, 50_000 / 100_000),
        (1 << 40, {"sample_share": 0.5}, 0.5),
        (16 << 30, {"queries": 5000}, 1.0),
        (16 << 30, {"kind": "retrieval"}, 1.0),
        (1 << 40, {"distillation_steps": 1, "budget": 0.009}, 50_000 / 200_000),  # whole conversations are used, too
        (1 << 40, {"distillation_steps": 1, "budget": 0.01}, 50_000 / 100_000),
    ],
)
def test_few_samples_are_of_many_conversations(memory, set_device, monkeypatch, total, options, share):
    """Four query heads a KV head; 25,000 tokens are asked for."""
    set_device(linux_cpu=False, fit_samples=50_000, fit_tokens=0, fewest_tokens=25_000, distilled_tokens=50_000)
    memory(total)
    wide = Geometry.uniform(
        model_type="llama", n_heads=HEADS * 2, n_kv_heads=HEADS // 2, head_dim=DIM, scale=0.1, windows=(0, 0)
    )
    assert replace(run(**options), geometry=wide).density(Context([1, 2, 3], [])) == pytest.approx(share)


def test_an_effort_of_more_samples_may_take_more_memory(memory, set_device):
    set_device(linux_cpu=True)
    memory(1 << 40)
    one = SampleStore.nbytes(HEADS, 1, DIM)
    assert run(sample_share=4.0).n_samples(HEADS) == 36_000_000_000 // one
    assert run(sample_share=0.5).n_samples(HEADS) == min(60_000, 9_000_000_000 // one)


def test_a_kind_that_is_not_trained_needs_those_of_the_router_alone():
    assert run(kind="retrieval").n_samples(HEADS) == run(kind="retrieval", queries=10**6).n_samples(HEADS) == 2048
    assert run(kind="retrieval", queries=7).n_samples(HEADS) == 7


@pytest.mark.parametrize(
    "options, bits",
    [
        ({}, None),
        ({"kind": "quadrature", "bits": 6}, 6),
        ({"budget": 0.005, "bits": 8}, 8),
        ({"budget": 0.005, "kind": "hybrid"}, 6),
        ({"budget": 0.005, "kind": "mlp"}, 8),
        ({"kind": "exact"}, 16),
        ({"kind": "exact", "bits": 4}, 16),
    ],
)
def test_each_kind_has_its_bits(options, bits):
    assert run(**options).layout.bits == bits


@pytest.mark.parametrize("memory, profile", [(16e9, device.SMALL_GPU), (36e9, device.SMALL_GPU), (64e9, device.GPU)])
def test_a_small_machine_computes_less_at_a_time(memory, profile):
    """Whatever follows from how much is computed alike stays as it is: batches, steps, samples."""
    chosen = device.gpu(memory)
    assert chosen == profile
    fits = [name for name in vars(profile) if name.startswith(("fit_", "trial_", "study_"))]
    assert all(getattr(chosen, name) == getattr(device.GPU, name) for name in fits) and len(fits) > 10


@pytest.mark.parametrize("name", ["answer_tokens", "checks", "sample_share", "temperature", "rate", "steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_what_would_be_noticed_at_the_end_or_not_at_all_is_refused(name, value):
    """A temperature of 0 draws token 0; without checks the whole fit is in vain."""
    with pytest.raises(NectarError, match=f"{name} must be positive"):
        FitConfig(**{name: value})
