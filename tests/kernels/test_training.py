"""What a training step does between its products: plain operations against an oracle, and the choice of a kernel."""

import warnings

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.kernels import nvrtc, source, training

M, B, m, D = 2, 7, 13, 12


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("known", [None, 9])
def test_softmax_and_the_logarithm_of_its_sum(set_device, on_cpu, known):
    set_device(linux_cpu=on_cpu)
    scores = 3 * normal(M, B, m, seed=0) + 100
    shares, log = training.softmax(mx.array(scores.astype(np.float32)), known and mx.array([known]))
    weights = np.exp(scores - 100)
    weights[..., known or m :] = 0
    np.testing.assert_allclose(shares, weights / weights.sum(-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(log, 100 + np.log(weights.sum(-1)), rtol=1e-5)


def loss(output, log, exact, exact_log, live, live_log, ratio):
    """What `training.slopes` differentiates, in float64."""
    gate, right = (1 / (1 + np.exp(live_log - x)) for x in (log, exact_log))
    merged = gate[..., None] * (output - live) - right[..., None] * (exact - live)
    plain = training.PLAIN * np.square(output - exact).sum(-1) + ratio * np.square(log - exact_log)
    return 0.5 * (np.square(merged).sum(-1) + plain)


def test_slopes_are_the_gradient_of_the_loss():
    output, exact, live = (normal(1, B, D, seed=i) for i in range(3))
    log, exact_log, live_log = (normal(1, B, seed=i) for i in range(3, 6))
    ratio, near = 0.3, 1e-6
    by_log = (
        loss(output, log + near, exact, exact_log, live, live_log, ratio)
        - loss(output, log - near, exact, exact_log, live, live_log, ratio)
    ) / (2 * near)
    by_output = np.zeros((1, B, D))
    for i in range(D):
        step = near * (np.arange(D) == i)
        ends = [loss(output + s * step, log, exact, exact_log, live, live_log, ratio) for s in (1, -1)]
        by_output[..., i] = (ends[0] - ends[1]) / (2 * near)
    given = (output - live, exact - live, live, log - exact_log, exact_log - live_log, np.array([ratio]))
    slopes = np.array(training.slopes(*(mx.array(x.astype(np.float32)) for x in given))) / training.SLOPE
    np.testing.assert_allclose(slopes[..., :D], by_output, atol=2e-5)
    np.testing.assert_allclose(slopes[..., D] + slopes[..., D + 1], by_log - (by_output * output).sum(-1), atol=5e-5)
    assert not slopes[..., D + 2 :].any() and slopes.shape[-1] == D + training.TAIL


@pytest.mark.parametrize("keys", [True, False])
def test_a_step_of_adam(keys):
    values, gradient = (normal(M, m, D + training.TAIL, seed=i).astype(np.float32) for i in range(2))
    by_column, by_row = np.ones((M, D + training.TAIL), np.float32), np.ones((M, m), np.float32)
    by_column[:, 3], by_row[:, 5] = 0, 0
    gradient[0, 0, 0] = np.inf
    gradient[0, 0, 1] = np.nan
    zeros = mx.zeros(values.shape)
    now = mx.array([0.1, 1 / (1 - training.BETA1), 1 / (1 - training.BETA2)])
    arrays = [mx.array(x) for x in (gradient, by_column, by_row)]
    following, _, wide = training.adam(mx.array(values), training.Moments(zeros, zeros), *arrays, now, keys=keys)
    moved = values - 0.1 * np.sign(np.nan_to_num(gradient))  # of a first step every number goes as far
    moved[..., 3], moved[:, 5] = values[..., 3], values[:, 5]
    np.testing.assert_allclose(following, moved, atol=1e-5)
    np.testing.assert_allclose(wide[..., :D], moved[..., :D], atol=1e-5)
    tail = np.array(wide[..., D:])
    assert (tail[..., 2:4] == (-1 if keys else 0)).all() and not tail[..., 4:].any()
    np.testing.assert_allclose(tail[..., :2].sum(-1), moved[..., D] if keys else 2.0, atol=1e-5)


def test_two_halves_hold_a_number_nearly():
    x = mx.array([12.3456789, -0.001234567, 299.99])
    high, low = training.split(x, mx.float16)
    np.testing.assert_allclose(high.astype(mx.float32) + low.astype(mx.float32), x, rtol=1e-6, atol=3e-8)
    assert not np.allclose(high.astype(mx.float32), x, rtol=1e-5, atol=1e-7)


@pytest.fixture
def on_cuda(monkeypatch):
    """As if there were an NVIDIA GPU."""
    monkeypatch.setattr(source, "backend", lambda: "cuda")
    training.kernels_work.cache_clear()
    yield
    training.kernels_work.cache_clear()


def test_a_kernel_that_errs_is_not_used(on_cuda, monkeypatch):
    def launch(name, inputs, outputs, *numbers, blocks, threads):
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(training, "_launch", launch)
    with pytest.warns(UserWarning, match="plain operations instead of the kernels of training: kernel 0 errs by"):
        assert not training.kernels_work()


def test_without_a_compiler_there_are_plain_operations(on_cuda, monkeypatch):
    monkeypatch.setattr(nvrtc, "_LIBRARIES", ("libnone.so.1",))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    nvrtc._library.cache_clear()
    training._module.cache_clear()
    with pytest.warns(UserWarning, match="none of libnone.so.1 can be loaded"):
        shares, _ = training.softmax(mx.zeros((1, 2, 8), mx.float16))
    assert mx.array_equal(shares, mx.full((1, 2, 8), 0.125, mx.float16))
    with warnings.catch_warnings(action="error"):
        training.softmax(mx.zeros((1, 2, 8), mx.float16))
