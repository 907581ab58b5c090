from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.solve import optimizers


def run(parameters, gradient, steps, **options):
    state = optimizers.start(parameters)
    options = {"rate": mx.array(0.05), "muon_rate": mx.array(0.05), "muon": frozenset()} | options
    for _ in range(steps):
        parameters, state = optimizers.update(parameters, gradient(parameters), state, **options)
        mx.eval(parameters, state)
    return parameters


def test_adam_takes_the_textbook_steps():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 5))
    p, m, v = np.ones(5), np.zeros(5), np.zeros(5)
    parameters, state = {"p": mx.ones(5)}, optimizers.start({"p": mx.ones(5)})
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        parameters, state = optimizers.update(
            parameters,
            {"p": mx.array(g.astype(np.float32))},
            state,
            rate=mx.array(0.1),
            muon_rate=mx.array(0.0),
            muon=frozenset(),
        )
    np.testing.assert_allclose(parameters["p"], p, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (1, 16, 16)])
def test_orthogonal_brings_every_matrix_near_its_polar_factor(shape):
    x = mx.array(np.random.default_rng(1).normal(size=shape).astype(np.float32))
    ours = np.array(optimizers.orthogonal(x))
    for given, got in zip(np.array(x), ours, strict=True):
        left, _, right = np.linalg.svd(given, full_matrices=False)
        singular = np.linalg.svd(got, compute_uv=False)
        assert singular.min() > 0.5 and singular.max() < 1.3  # the quintic aims at this band, not at 1
        cosine = (got * (left @ right)).sum() / np.linalg.norm(got) / np.linalg.norm(left @ right)
        assert cosine > 0.97


def test_heads_of_a_stack_do_not_mix():
    x = mx.array(np.random.default_rng(2).normal(size=(2, 6, 9)).astype(np.float32))
    alone = optimizers.orthogonal(x[:1])
    np.testing.assert_allclose(optimizers.orthogonal(x)[0], alone[0], atol=1e-5)


def test_padded_units_stay_zero_under_muon():
    w = mx.concatenate([mx.random.normal((1, 4, 8), key=mx.random.key(0)), mx.zeros((1, 3, 8))], axis=1)
    moved = run({"w": w}, lambda p: {"w": 2 * p["w"]}, 20, muon=frozenset({"w"}))["w"]
    assert (moved[:, 4:] == 0).all() and not mx.array_equal(moved[:, :4], w[:, :4])


@pytest.mark.parametrize("muon", [frozenset(), frozenset({"w"})])
def test_both_find_the_minimum_of_a_quadratic(muon):
    target = mx.array(np.random.default_rng(3).normal(size=(2, 6, 6)).astype(np.float32))
    start = {"w": mx.zeros((2, 6, 6))}
    moved = run(start, lambda p: {"w": p["w"] - target}, 200, muon=muon, rate=mx.array(0.02), muon_rate=mx.array(0.02))
    assert mx.abs(moved["w"] - target).mean() < 0.1 * mx.abs(target).mean()


def test_the_schedule_warms_up_and_ends_near_zero():
    values = [optimizers.schedule(i, 1000) for i in range(1000)]
    assert values[0] == pytest.approx(1 / 50) and max(values) == 1.0 and values[-1] == pytest.approx(1 / 600)
    assert all(a <= b for a, b in pairwise(values[:51]))
    assert all(a >= b for a, b in pairwise(values[400:]))
    assert optimizers.schedule(0, 1) > 0  # a single step moves
