import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import initial, regression
from nectar_mlx.heads import Quadrature
from nectar_mlx.store import Layout
from tests.oracle import attention as oracle

M, N, S, D = 2, 600, 40, 16


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    q, live = rng.normal(size=(M, N, D)) * [[[1.5]], [[0.5]]] + 0.3, rng.normal(size=(M, N, D))
    output, log_normalizer = oracle(q, rng.normal(size=(M, S, D)), rng.normal(size=(M, S, D)), scale=0.25)
    return Samples(*(mx.array(x.astype(np.float32)) for x in (q, output, live, log_normalizer, log_normalizer - 1)))


def layout(kind):
    return Layout(kind=kind, n_layers=1, n_kv_heads=M, head_dim=D, scale=0.25, bits=8)


def nodes(count):
    rng = np.random.default_rng(1)
    return [
        {"keys": mx.array(rng.normal(size=(count, D)).astype(np.float32)),
         "values": mx.array(rng.normal(size=(count, D)).astype(np.float32)), "bias": mx.zeros(count)}
        for _ in range(M)
    ]  # fmt: skip


def test_the_merged_error_is_that_of_the_merged_output(rows, set_device):
    bank = Quadrature.stack(nodes(6), scale=0.25)
    part = bank(rows.queries)

    def merged(output, log_normalizer):
        gate = 1 / (1 + np.exp(np.array(rows.live_log_normalizer, np.float64) - np.array(log_normalizer, np.float64)))
        return gate[..., None] * np.array(output) + (1 - gate[..., None]) * np.array(rows.live_output)

    error = ((merged(*part) - merged(rows.output, rows.log_normalizer)) ** 2).mean((1, 2))
    truth = error / np.array(rows.output).var(1).mean(-1)
    set_device(max_batch_scores=128 * M * D)
    np.testing.assert_allclose(regression.errors(bank, rows), truth, rtol=1e-3)


@pytest.mark.parametrize(
    "kind, sizes",
    [("quadrature", [(6,), (9,)]), ("corrected", [(6, 4), (6, 6)]), ("mlp", [(16, 2, 32, 2), (24, 2, 32, 2)])],
)
def test_training_lowers_the_error(rows, kind, sizes):
    start = initial.start(
        layout(kind), nodes(6) if kind != "quadrature" else [nodes(6)[0], nodes(9)[1]], sizes, rows, seed=0
    )
    before = type(start.bank)(parameters=start.fold(start.parameters), sizes=start.bank.sizes, scale=0.25)
    trained = regression.train(start, rows, steps=150, batch=200, rate=1.5e-2 if kind == "quadrature" else 6e-3)
    assert (regression.errors(trained, rows) < 0.5 * regression.errors(before, rows)).all()
    assert trained.sizes == tuple(sizes)


def test_training_is_deterministic(rows):
    runs = []
    for _ in range(2):
        start = initial.start(layout("mlp"), [], [(16, 2, 32, 2)] * M, rows, seed=3)
        runs.append(regression.train(start, rows, steps=5, batch=100, rate=6e-3).parameters)
    assert all(mx.array_equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_a_network_before_training_returns_the_mean(rows):
    start = initial.start(layout("mlp"), [], [(16, 2, 32, 2)] * M, rows, seed=0)
    silent = start.fold(
        start.parameters | {f"{p}.w_out": 0 * start.parameters[f"{p}.w_out"] for p in ("target", "score")}
    )
    part = start.bank.apply(silent, rows.queries)
    np.testing.assert_allclose(part.output[:, 0], rows.output.mean(1), atol=1e-4)
    np.testing.assert_allclose(part.log_normalizer[:, 0], rows.log_normalizer.mean(1), atol=1e-4)


def test_folding_is_the_standardised_network(rows):
    start = initial.start(layout("mlp"), [], [(16, 1 + 1, 32, 2)] * M, rows, seed=0)
    q = np.array(rows.queries, np.float64)
    x = (q - q.mean(1, keepdims=True)) / (q.std(1, keepdims=True) + 1e-4)
    plain = start.bank.apply(start.parameters, mx.array(x.astype(np.float32)))
    folded = start.bank.apply(start.fold(start.parameters), rows.queries)
    std = np.sqrt(np.array(rows.output).var(1).mean(-1))[:, None, None]
    truth = np.array(plain.output) * std + np.array(rows.output).mean(1, keepdims=True)
    np.testing.assert_allclose(folded.output, truth, atol=2e-4)


@pytest.mark.parametrize("kind", ["quadrature", "corrected", "mlp"])
def test_sizes_are_the_largest_that_the_bytes_buy(kind):
    from nectar_mlx import store

    for nbytes in (600, 5_000, 50_000):
        size = initial.size_for(layout(kind), nbytes, most=10_000)
        smallest = initial.size_for(layout(kind), 0, most=10_000)
        assert store.head_bytes(layout(kind), size) <= nbytes or size == smallest
        larger = initial._FAMILIES[kind](size[0] + 8)
        assert store.head_bytes(layout(kind), larger) > nbytes
