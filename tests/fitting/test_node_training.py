"""Training nodes in half precision and in float32, against the same loss differentiated by MLX."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import regression
from nectar_mlx.fitting.solve.initial import Init
from nectar_mlx.fitting.solve.node_training import NodeTraining
from nectar_mlx.heads import Quadrature
from tests.oracle import attention as oracle

M, N, S, D, SCALE = 2, 1000, 60, 16, 0.25


def samples(size=1.0, common=0.0):
    """Of queries of some size that have something in common."""
    rng = np.random.default_rng(0)
    q, k, v, live = (rng.normal(size=s) for s in ((M, N, D), (M, S, D), (M, S, D), (M, N, D)))
    output, log = oracle(q, 3 * k, v, scale=SCALE)
    arrays = (size * q + common, output, live, log, log - 1 + rng.normal(size=(M, N)))
    return Samples(*(mx.array(np.asarray(x, np.float32)) for x in arrays)), 3 * k / size, v


def start(keys, values, counts=(9, 12)):
    heads = [
        {n: mx.array(x[i, :m].astype(np.float32)) for n, x in (("keys", keys), ("values", values))}
        | {"bias": mx.full((m,), 1.5)}
        for i, m in enumerate(counts)
    ]
    return Quadrature.stack(heads, scale=SCALE)


@pytest.mark.parametrize("half", [False, True])
def test_a_small_step_goes_down_the_gradient_of_the_loss(set_device, half):
    """The first step of Adam moves every number against its slope."""
    set_device(half=half)
    given, keys, values = samples()
    bank = start(keys, values)
    norm = regression.scales(given)

    def loss(parameters):
        part = bank.apply(parameters, given.queries)
        metric = regression.relative(norm, D)
        plain = regression.plain_error(part, given, norm)
        return (regression.merged_error(part, given, metric) + 0.1 * plain).sum()

    slopes = mx.grad(loss)(bank.parameters)
    training = NodeTraining([given], scale=SCALE, batch=N)
    after = training.train(Init.of(bank), steps=1, rate=1e-3).parameters
    mean = given.queries.mean(1, keepdims=True)
    # Scores are taken about the mean query: the bias' slope comes in.
    about = slopes["keys"] - SCALE * slopes["bias"][..., None] * mean
    for name, slope in (("keys", about), ("values", slopes["values"])):
        for i, (count,) in enumerate(bank.sizes):
            moved = np.array(after[name] - bank.parameters[name])[i, :count]
            wanted = -np.sign(np.array(slope))[i, :count]
            clear = np.abs(np.array(slope))[i, :count] > 0.02 * np.abs(np.array(slope)).max()
            assert clear.mean() > 0.3 and (np.sign(moved)[clear] == wanted[clear]).mean() > 0.99, name


@pytest.mark.parametrize("size, common", [(1.0, 0.0), (100.0, 0.0), (0.01, 0.0), (1.0, 30.0)])
def test_half_precision_trains_as_float32_does(set_device, size, common):
    given, keys, values = samples(size, common)
    bank, errors = start(keys, values), []
    for half in (False, True):
        set_device(half=half)
        training = NodeTraining([given.some(slice(600)), given.some(slice(600, N))], scale=SCALE, batch=250)
        assert len(training.batches) == 4
        trained = training.train(Init.of(bank), steps=80, rate=3e-2)
        errors.append(np.array(regression.errors(trained, given)))
    before = np.array(regression.errors(bank, given))
    assert (errors[0] < 0.7 * before).all()
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.02)


@pytest.mark.parametrize("size, common", [(1.0, 0.0), (100.0, 0.0), (1.0, 30.0)])
def test_steps_by_head_are_those_of_all_heads_together(set_device, size, common):
    """On a Linux CPU each head is trained by itself, at its own number of nodes. What is held is other in each."""
    given, keys, values = samples(size, common)
    bank, trained = start(keys, values), []
    where = {
        "keys": mx.arange(D)[None, None] < mx.array([3, 5])[:, None, None],
        "values": mx.arange(12)[None, :, None] < mx.array([2, 6])[:, None, None],
    }
    held = regression.Held(where, {name: mx.round(bank.parameters[name]) for name in where})
    for linux_cpu in (True, False):
        set_device(linux_cpu=linux_cpu)
        training = NodeTraining([given], scale=SCALE, batch=250)
        first = training.train(Init.of(bank), steps=20, rate=3e-2)
        trained.append(training.train(Init.of(first), steps=20, rate=3e-2, first=1, held=held).parameters)
    ours, theirs = trained
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=2e-3, atol=2e-3 * float(mx.abs(mx.maximum(x, -1e3)).max()))


def test_numbers_too_large_for_half_precision_are_trained_in_float32(set_device):
    set_device(half=True)
    given, *_ = samples()
    assert NodeTraining([given], scale=SCALE, batch=100).batches[0].queries.dtype == mx.float16
    far = given._replace(live_output=given.live_output + 3e4)
    assert NodeTraining([far], scale=SCALE, batch=100).batches[0].queries.dtype == mx.float32


def test_no_steps_change_nothing_and_padding_has_no_weight():
    given, keys, values = samples()
    bank = start(keys, values)
    same = NodeTraining([given], scale=SCALE, batch=100).train(Init.of(bank), steps=0, rate=1e-2)
    for name, x in bank.parameters.items():
        np.testing.assert_allclose(same.parameters[name], x, rtol=1e-5, atol=1e-4)
    after = NodeTraining([given], scale=SCALE, batch=100).train(Init.of(bank), steps=3, rate=1e-2)
    assert (after.parameters["bias"][0, 9:] <= -1e29).all() and mx.isfinite(after(given.queries).output).all()
