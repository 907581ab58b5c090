import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting import matching, regression, settling, starts
from nectar_mlx.fitting.study import Captured
from nectar_mlx.heads import Quadrature
from nectar_mlx.store import Layout, pack, unpack
from nectar_mlx.store.rows import Rows
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


LAYOUT = Layout(kind="quadrature", n_layers=1, n_kv_heads=2, head_dim=D, scale=0.2, bits=None)


def at_once(bank, rows, bits):
    """The same grids, all rounded at the start."""
    held = settling._Plan.of(bank, rows, bits=bits).held(bank.parameters, settling.PARTS)
    return Quadrature(parameters=held.over(bank.parameters), sizes=bank.sizes, scale=bank.scale)


def test_less_is_lost_than_by_rounding_at_once(rows, trained):
    for bits in (3, 4):
        ours = settling.settled(trained, rows, bits=bits, steps=200, batch=250, rate=1.5e-2)
        banks = (trained, at_once(trained, rows, bits), ours)
        before, rounded, settled = (np.array(regression.errors(b, rows)) for b in banks)
        assert (rounded > before).all()
        assert (settled - before < 0.5 * (rounded - before)).all()


def test_less_is_lost_than_with_the_same_step_in_all_rows(rows, trained):
    """At the same number of bits."""
    costs = matching.costs(rows, trained)
    flat = {n: mx.zeros_like(x) + x.mean(1, keepdims=True) for n, x in costs.items()}
    errors = []
    start = starts.Start.of(trained, rows)
    for told in (costs, flat):
        steps = settling._steps(trained, told, bits=3.5)
        near = {n: mx.round(trained.parameters[n] / s) * s for n, s in steps.items()}
        mirrored = {n: 2 * trained.parameters[n] - x for n, x in near.items()}  # training has not ended: slopes cancel
        both = []
        for moved in (near, mirrored):
            parameters = start.fold(start.parameters | moved)
            bank = Quadrature(parameters=parameters, sizes=trained.sizes, scale=trained.scale)
            both.append(np.array(regression.errors(bank, rows)))
        errors.append(np.mean(both, axis=0))
    lost = np.array(errors) - np.array(regression.errors(trained, rows))
    assert (lost[0] < lost[1]).all() and lost[0].sum() < 0.8 * lost[1].sum()


def test_costs_are_what_errors_add(rows, trained):
    """An error of 1e-3 in every number of one row, of either sign, adds what was told, on average over signs."""
    costs, rng = matching.costs(rows, trained), np.random.default_rng(0)
    exact = rows._replace(output=trained(rows.queries).output, log_normalizer=trained(rows.queries).log_normalizer)
    told = mx.broadcast_to(mx.eye(D), (2, D, D))
    for name, row in (("values", 3), ("keys", 5)):
        found = []
        for _ in range(40):
            p = dict(trained.parameters)
            sign = mx.array(rng.choice([-1e-3, 1e-3], size=D).astype(np.float32))
            p[name] = p[name] + mx.where(mx.arange(p[name].shape[1])[:, None] == row, sign, 0)
            if name == "keys":  # what errs alike for all queries is the bias's
                shift = -trained.scale * (rows.queries.mean(1) @ sign)
                p["bias"] = p["bias"] + mx.where(mx.arange(p["bias"].shape[1]) == row, shift[:, None], 0)
            bank = Quadrature(parameters=p, sizes=trained.sizes, scale=trained.scale)
            found.append(np.array(regression.merged_error(bank(rows.queries), exact, told)))
        np.testing.assert_allclose(np.mean(found, 0), np.array(costs[name])[:, row] * D * 1e-6, rtol=0.5, err_msg=name)


def test_what_is_settled_is_stored_unchanged_and_takes_the_bits_it_was_given(rows, trained):
    sizes = []
    for bits in (3, 5):
        ours = settling.settled(trained, rows, bits=bits, steps=20, batch=250, rate=1.5e-2)
        tensors = pack(LAYOUT, ours.unstack())
        (back,) = unpack(LAYOUT, tensors)
        assert back.sizes == ours.sizes
        for name in ("keys", "values"):
            np.testing.assert_allclose(back.parameters[name], ours.parameters[name], atol=1e-6)
        sizes.append(8 * tensors["heads.numbers"].size / (2 * D * sum(COUNTS)))
        assert bits - 0.3 < sizes[-1] < bits + 0.6  # two lanes of 1,024 numbers cost a tenth of a bit here
    assert sizes[1] - sizes[0] > 1.5


def looking_for(keys, values, chosen, rng, count=3000):
    """Rows whose queries each look for one of some keys [S, D]."""
    queries = 2 * keys[rng.choice(chosen, count)] + 0.5 * rng.normal(size=(count, D))
    live, (output, log_normalizer) = rng.normal(size=(count, D)), oracle(queries, keys, values, scale=0.2)
    found = (queries, output, live, log_normalizer, log_normalizer - 1)
    return Captured(*(mx.array(x[None].astype(np.float32)) for x in found))


def test_keys_that_few_rows_look_for_can_still_be_found():
    """Rounded by rows that look for half of the keys, errors of rows that look for the others were 0.46 with a floor of
    1e-4 under the costs; and 0.46 of those that came behind the first 2,048, when these alone were the judges."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, S, D))
    head = {n: mx.array(x.astype(np.float32)) for n, x in (("keys", keys), ("values", values))} | {"bias": mx.zeros(S)}
    bank = Quadrature.stack([head], scale=0.2)
    some, others = (looking_for(keys, values, half, rng) for half in np.split(np.arange(S), 2))
    both = Captured(*(mx.concatenate(x, axis=1) for x in zip(some, others, strict=True)))
    for rows, most in ((some, 0.12), (both, 0.02)):
        kept = settling.settled(bank, rows, steps=0, batch=500, rate=1.5e-2)
        assert regression.errors(kept, some).item() < 0.01 and regression.errors(kept, others).item() < most


def test_no_row_gets_a_finer_grid_than_can_be_found_again():
    """However much more one row costs than all others."""
    x, costs = np.random.default_rng(0).normal(size=(50, D)), np.full(50, 1e-3)
    costs[7] = 1e9
    exponents, _ = settling._exponents([x, x], [costs, costs], bits=4.0)
    numbers = np.rint(x / np.exp2(exponents / 2)[:, None])
    assert 700 < np.abs(numbers[7]).max() <= 1024
    kept = Rows.of((numbers * np.exp2(exponents / 2)[:, None]).astype(np.float32))
    assert np.array_equal(np.abs(kept.numbers[7]), np.abs(numbers[7]))


def test_every_entry_has_its_turn_and_a_small_head_as_many_as_a_large_one(rows, trained):
    plan = settling._Plan.of(trained, rows, bits=5)
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
