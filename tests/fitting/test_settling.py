import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting import regression, settling, starts
from nectar_mlx.fitting.study import Captured
from nectar_mlx.heads import Quadrature
from nectar_mlx.quantize import dequantize, quantize
from nectar_mlx.store import Layout
from tests.oracle import attention as oracle

N, S, D = 1500, 60, 32
COUNTS = [24, 11]  # ragged: the second head is padded


@pytest.fixture(scope="module")
def rows():
    """Queries far from isotropic, with a mean, as a model's are."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, N, D)) * np.exp(rng.normal(size=(2, 1, D))) + rng.normal(size=(2, 1, D))
    live = rng.normal(size=(2, N, D))
    keys, values = rng.normal(size=(2, 2, S, D))
    output, log_normalizer = oracle(q, keys, values, scale=0.2)
    return Captured(*(mx.array(x.astype(np.float32)) for x in (q, output, live, log_normalizer, log_normalizer - 1)))


@pytest.fixture(scope="module")
def trained(rows):
    rng = np.random.default_rng(1)
    nodes = [
        {n: mx.array(rng.normal(size=(m, D)).astype(np.float32)) for n in ("keys", "values")} | {"bias": mx.zeros(m)}
        for m in COUNTS
    ]
    layout = Layout(kind="quadrature", n_layers=1, n_kv_heads=2, head_dim=D, scale=0.2, bits=4)
    start = starts.start(layout, nodes, [(m,) for m in COUNTS], rows, seed=0)
    return regression.train(start, rows, steps=200, batch=250, rate=1.5e-2)


def rounded(bank, bits):
    """Everything at once."""
    nearest = {n: dequantize(quantize(bank.parameters[n], bits=bits), bits=bits) for n in ("keys", "values")}
    return Quadrature(parameters=bank.parameters | nearest, sizes=bank.sizes, scale=bank.scale)


@pytest.mark.parametrize("bits", [4, 5])
def test_less_is_lost_than_by_rounding_at_once(rows, trained, bits):
    ours = settling.settled(trained, rows, bits=bits, steps=200, batch=250, rate=1.5e-2)
    before, at_once, settled = (np.array(regression.errors(b, rows)) for b in (trained, rounded(trained, bits), ours))
    assert (at_once > before).all()
    assert (settled - before < 0.5 * (at_once - before)).all()


def test_what_is_settled_is_stored_unchanged(rows, trained):
    ours = settling.settled(trained, rows, bits=5, steps=20, batch=250, rate=1.5e-2)
    for head, count in zip(ours.unstack(), COUNTS, strict=True):
        for name in ("keys", "values"):
            assert head[name].shape == (count, D)
            assert mx.array_equal(dequantize(quantize(head[name], bits=5), bits=5), head[name])


def test_every_entry_has_its_turn_and_a_small_head_as_many_as_a_large_one(rows, trained):
    plan = settling._Plan.of(trained, rows, bits=5, batch=250)
    keys, values = (np.array(plan.turns[n]) for n in ("keys", "values"))
    assert [np.bincount(x.ravel()).tolist() for x in keys] == [[D // settling.PARTS] * settling.PARTS] * 2
    for turns, count in zip(values[..., 0], COUNTS, strict=True):
        assert set(turns[:count]) == set(range(settling.PARTS))
        assert (turns < settling.PARTS).all()


def test_what_is_held_does_not_move(rows, trained):
    where = {"keys": mx.arange(D)[None, None] < 5, "values": mx.arange(max(COUNTS))[None, :, None] < 7}
    held = regression.Held(where=where, values={n: trained.parameters[n] + 1 for n in where})
    start = starts.Start(bank=trained, parameters=dict(trained.parameters), fold=lambda p: p)
    after = regression.train(start, rows, steps=4, batch=250, rate=1e-2, held=held).parameters
    assert mx.array_equal(after["keys"][..., :5], trained.parameters["keys"][..., :5] + 1)
    assert mx.array_equal(after["values"][:, :7], trained.parameters["values"][:, :7] + 1)
    assert (after["keys"][0, :, 5:] != trained.parameters["keys"][0, :, 5:]).all()
    assert (after["values"][0, 7:] != trained.parameters["values"][0, 7:]).all()


def test_other_rows_can_come_first(rows, trained):
    start = starts.Start(bank=trained, parameters=dict(trained.parameters), fold=lambda p: p)
    turned = Captured(*(mx.concatenate([x[:, 500:], x[:, :500]], axis=1) for x in rows))
    runs = [regression.train(start, r, steps=2, batch=250, rate=1e-2, first=f) for r, f in ((rows, 2), (turned, 0))]
    for name in runs[0].parameters:
        # (The loss is scaled by the variance over all rows, which is the same sum in another order.)
        np.testing.assert_allclose(runs[0].parameters[name], runs[1].parameters[name], atol=1e-5)
