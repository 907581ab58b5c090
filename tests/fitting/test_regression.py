import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import store
from nectar_mlx.fitting.budget import size_for
from nectar_mlx.fitting.kinds.corrected import corrected_nodes
from nectar_mlx.fitting.kinds.mlp import random_networks
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import regression
from nectar_mlx.fitting.solve.initial import Init
from nectar_mlx.heads import Quadrature
from nectar_mlx.store import Layout
from tests.oracle import attention as oracle

M, N, S, D, SCALE = 2, 600, 40, 16, 0.25


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    q, live = rng.normal(size=(M, N, D)) * [[[1.5]], [[0.5]]] + 0.3, rng.normal(size=(M, N, D))
    output, log_normalizer = oracle(q, rng.normal(size=(M, S, D)), rng.normal(size=(M, S, D)), scale=SCALE)
    return Samples(*(mx.array(x.astype(np.float32)) for x in (q, output, live, log_normalizer, log_normalizer - 1)))


def nodes(count):
    rng = np.random.default_rng(1)
    return [
        {"keys": mx.array(rng.normal(size=(count, D)).astype(np.float32)),
         "values": mx.array(rng.normal(size=(count, D)).astype(np.float32)), "bias": mx.zeros(count)}
        for _ in range(M)
    ]  # fmt: skip


def test_the_merged_error_is_that_of_the_merged_output(samples, set_device):
    bank = Quadrature.stack(nodes(6), scale=SCALE)
    part = bank(samples.queries)

    def merged(output, log_normalizer):
        gate = 1 / (
            1 + np.exp(np.array(samples.live_log_normalizer, np.float64) - np.array(log_normalizer, np.float64))
        )
        return gate[..., None] * np.array(output) + (1 - gate[..., None]) * np.array(samples.live_output)

    error = ((merged(*part) - merged(samples.output, samples.log_normalizer)) ** 2).mean((1, 2))
    truth = error / np.array(samples.output).var(1).mean(-1)
    set_device(max_batch_scores=128 * M * D)
    np.testing.assert_allclose(regression.errors(bank, samples), truth, rtol=1e-3)


def networks(sizes, samples, *, seed=0):
    return random_networks(sizes, samples, scale=SCALE, seed=seed)


def plain_nodes(sizes, samples):
    heads = [nodes(count)[i] for i, (count,) in enumerate(sizes)]
    return Init.of(Quadrature.stack(heads, scale=SCALE))


def with_correction(sizes, samples):
    return corrected_nodes(nodes(6), sizes, samples, scale=SCALE, seed=0)


@pytest.mark.parametrize(
    "make, rate, sizes",
    [
        (plain_nodes, 1.5e-2, [(6,), (9,)]),
        (with_correction, 6e-3, [(6, 4), (6, 6)]),
        (networks, 6e-3, [(16, 2, 32, 2), (24, 2, 32, 2)]),
    ],
)
def test_training_lowers_the_error(samples, make, rate, sizes):
    init = make(sizes, samples)
    before = type(init.bank)(parameters=init.to_bank(init.parameters), sizes=init.bank.sizes, scale=SCALE)
    trained = regression.train(init, samples, steps=150, batch=200, rate=rate)
    assert (regression.errors(trained, samples) < 0.5 * regression.errors(before, samples)).all()
    assert trained.sizes == tuple(sizes)


def test_training_is_deterministic(samples):
    first, second = (
        regression.train(networks([(16, 2, 32, 2)] * M, samples, seed=3), samples, steps=5, batch=100, rate=6e-3)
        for _ in range(2)
    )
    assert all(mx.array_equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_a_correction_before_training_changes_nothing(samples):
    init = with_correction([(6, 4)] * M, samples)
    corrected = init.bank.apply(init.to_bank(init.parameters), samples.queries)
    plain = Quadrature.stack(nodes(6), scale=SCALE)(samples.queries)
    np.testing.assert_allclose(corrected.output, plain.output, atol=1e-6)
    np.testing.assert_allclose(corrected.log_normalizer, plain.log_normalizer, atol=1e-6)


def test_a_network_before_training_returns_the_mean(samples):
    init = networks([(16, 2, 32, 2)] * M, samples)
    silent = {f"{part}.w_out": 0 * init.parameters[f"{part}.w_out"] for part in ("target", "score")}
    part = init.bank.apply(init.to_bank(init.parameters | silent), samples.queries)
    np.testing.assert_allclose(part.output[:, 0], samples.output.mean(1), atol=1e-4)
    np.testing.assert_allclose(part.log_normalizer[:, 0], samples.log_normalizer.mean(1), atol=1e-4)


def test_a_bank_is_the_standardized_network(samples):
    init = networks([(16, 2, 32, 2)] * M, samples)
    q = np.array(samples.queries, np.float64)
    x = (q - q.mean(1, keepdims=True)) / (q.std(1, keepdims=True) + 1e-4)
    plain = init.bank.apply(init.parameters, mx.array(x.astype(np.float32)))
    bank = init.bank.apply(init.to_bank(init.parameters), samples.queries)
    std = np.sqrt(np.array(samples.output).var(1).mean(-1))[:, None, None]
    truth = np.array(plain.output) * std + np.array(samples.output).mean(1, keepdims=True)
    np.testing.assert_allclose(bank.output, truth, atol=2e-4)


@pytest.mark.parametrize("nbytes", [600, 5_000, 50_000])
@pytest.mark.parametrize("kind", ["quadrature", "corrected", "mlp"])
def test_sizes_are_the_largest_that_the_bytes_buy(kind, nbytes):
    layout = Layout(kind=kind, n_layers=1, n_kv_heads=M, head_dim=D, scale=SCALE, bits=8)
    size, smallest = size_for(layout, nbytes, bits=4, most=10_000), size_for(layout, 0, bits=4, most=10_000)
    assert store.head_bytes(layout, size) <= nbytes or size == smallest
    assert store.head_bytes(layout, layout.bank.size_for(size[0] + 8)) > nbytes
