import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import attention_matching, quantization, regression
from nectar_mlx.fitting.solve.initial import Init
from nectar_mlx.fitting.solve.node_training import NodeTraining
from nectar_mlx.heads import Quadrature
from nectar_mlx.store import Layout, pack, unpack
from nectar_mlx.store.grids import GridMatrix
from tests.oracle import attention as oracle

N, S, D = 1500, 60, 32
COUNTS = [24, 11]  # ragged: the second head is padded


@pytest.fixture(scope="module")
def samples():
    """Queries far from isotropic, with a mean, as a model's are."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, N, D)) * np.exp(rng.normal(size=(2, 1, D))) + rng.normal(size=(2, 1, D))
    live = rng.normal(size=(2, N, D))
    keys, values = rng.normal(size=(2, 2, S, D))
    output, log_normalizer = oracle(q, keys, values, scale=0.2)
    return Samples(*(mx.array(x.astype(np.float32)) for x in (q, output, live, log_normalizer, log_normalizer - 1)))


@pytest.fixture(scope="module")
def trained(samples):
    rng = np.random.default_rng(1)
    nodes = [
        {n: mx.array(rng.normal(size=(m, D)).astype(np.float32)) for n in ("keys", "values")} | {"bias": mx.zeros(m)}
        for m in COUNTS
    ]
    return training(samples).train(Init.of(Quadrature.stack(nodes, scale=0.2)), steps=200, rate=1.5e-2)


def training(samples):
    return NodeTraining([samples], scale=0.2, batch=250)


LAYOUT = Layout(kind="quadrature", n_layers=1, n_kv_heads=2, head_dim=D, scale=0.2, bits=None)


def at_once(bank, samples, bits):
    """The same grids, all rounded at the start."""
    held = quantization.RoundingPlan.of(bank, samples, bits=bits).held(bank.parameters, quantization.PARTS)
    return Quadrature(parameters=held.over(bank.parameters), sizes=bank.sizes, scale=bank.scale)


def test_less_is_lost_than_by_rounding_at_once(samples, trained):
    for bits in (3, 4):
        ours = quantization.round_nodes(trained, training(samples), bits=bits, steps=200, rate=1.5e-2)
        banks = (trained, at_once(trained, samples, bits), ours)
        before, rounded, trained_on = (np.array(regression.errors(b, samples)) for b in banks)
        assert (rounded > before).all()
        assert (trained_on - before < 0.5 * (rounded - before)).all()


def test_less_is_lost_than_with_the_same_step_in_all_rows(samples, trained):
    """At the same number of bits."""
    costs = attention_matching.costs(samples, trained)
    flat = {n: mx.zeros_like(x) + x.mean(1, keepdims=True) for n, x in costs.items()}
    errors = []
    mean = samples.queries.mean(1)[..., None]
    for row_costs in (costs, flat):
        steps = quantization.row_steps(trained, row_costs, bits=3.5)
        near = {n: mx.round(trained.parameters[n] / s) * s for n, s in steps.items()}
        mirrored = {n: 2 * trained.parameters[n] - x for n, x in near.items()}  # training has not ended: slopes cancel
        both = []
        for moved in (near, mirrored):
            # What moving a key does to the mean query's score, its bias makes up for.
            change = 0.2 * ((moved["keys"] - trained.parameters["keys"]) @ mean)[..., 0]
            parameters = moved | {"bias": trained.parameters["bias"] - change}
            bank = Quadrature(parameters=parameters, sizes=trained.sizes, scale=trained.scale)
            both.append(np.array(regression.errors(bank, samples)))
        errors.append(np.mean(both, axis=0))
    lost = np.array(errors) - np.array(regression.errors(trained, samples))
    assert (lost[0] < lost[1]).all() and lost[0].sum() < 0.8 * lost[1].sum()


def test_a_row_that_no_sample_looks_for_is_kept_not_much_more_coarsely_than_others(trained):
    costs = {n: mx.ones(trained.parameters["bias"].shape) for n in ("keys", "values")}
    costs["keys"] = mx.where(mx.arange(costs["keys"].shape[1]) == 5, 0.0, costs["keys"])
    steps = np.array(quantization.row_steps(trained, costs, bits=4)["keys"])[0, :, 0]
    assert 2 * np.median(steps) < steps[5] < 5 * np.median(steps)


def test_costs_are_what_errors_add(samples, trained):
    """An error of 1e-3 in every number of one row, of either sign, adds its cost, on average over signs."""
    costs, rng = attention_matching.costs(samples, trained), np.random.default_rng(0)
    answer = trained(samples.queries)
    exact = samples._replace(output=answer.output, log_normalizer=answer.log_normalizer)
    metric = mx.broadcast_to(mx.eye(D), (2, D, D))
    for name, row in (("values", 3), ("keys", 5)):
        errors = []
        for _ in range(40):
            p = dict(trained.parameters)
            sign = mx.array(rng.choice([-1e-3, 1e-3], size=D).astype(np.float32))
            p[name] = p[name] + mx.where(mx.arange(p[name].shape[1])[:, None] == row, sign, 0)
            if name == "keys":  # what errs alike for all queries is the bias's
                shift = -trained.scale * (samples.queries.mean(1) @ sign)
                p["bias"] = p["bias"] + mx.where(mx.arange(p["bias"].shape[1]) == row, shift[:, None], 0)
            bank = Quadrature(parameters=p, sizes=trained.sizes, scale=trained.scale)
            errors.append(np.array(regression.merged_error(bank(samples.queries), exact, metric)))
        np.testing.assert_allclose(np.mean(errors, 0), np.array(costs[name])[:, row] * D * 1e-6, rtol=0.5, err_msg=name)


def test_rounded_nodes_are_stored_unchanged_and_take_the_bits_they_were_given(samples, trained):
    sizes = []
    for bits in (3, 5):
        ours = quantization.round_nodes(trained, training(samples), bits=bits, steps=20, rate=1.5e-2)
        tensors = pack(LAYOUT, ours.unstack())
        (back,) = unpack(LAYOUT, tensors)
        assert back.sizes == ours.sizes
        for name in ("keys", "values"):
            np.testing.assert_allclose(back.parameters[name], ours.parameters[name], atol=1e-6)
        sizes.append(8 * tensors["heads.numbers"].size / (2 * D * sum(COUNTS)))
        assert bits - 0.3 < sizes[-1] < bits + 0.6  # two lanes of 1,024 numbers cost a tenth of a bit here
    assert sizes[1] - sizes[0] > 1.5


def looking_for(keys, values, chosen, rng, count=3000):
    """Samples whose queries each look for one of some keys [S, D]."""
    queries = 2 * keys[rng.choice(chosen, count)] + 0.5 * rng.normal(size=(count, D))
    live, (output, log_normalizer) = rng.normal(size=(count, D)), oracle(queries, keys, values, scale=0.2)
    arrays = (queries, output, live, log_normalizer, log_normalizer - 1)
    return Samples(*(mx.array(x[None].astype(np.float32)) for x in arrays))


def test_keys_that_few_samples_look_for_can_still_be_found():
    """Rounded by samples that look for half of the keys, those that look for the other half err by 0.46 with a floor of
    1e-4 under the costs. So they do if they are there, but costs are measured by the first 2,048 samples alone."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, S, D))
    head = {n: mx.array(x.astype(np.float32)) for n, x in (("keys", keys), ("values", values))} | {"bias": mx.zeros(S)}
    bank = Quadrature.stack([head], scale=0.2)
    some, others = (looking_for(keys, values, half, rng) for half in np.split(np.arange(S), 2))
    both = Samples(*(mx.concatenate(x, axis=1) for x in zip(some, others, strict=True)))
    for samples, most in ((some, 0.12), (both, 0.02)):
        kept = quantization.round_nodes(bank, training(samples), steps=0, rate=1.5e-2)
        assert regression.errors(kept, some).item() < 0.01 and regression.errors(kept, others).item() < most


def test_no_row_gets_a_finer_grid_than_can_be_found_again():
    """However much more one row costs than all others."""
    x, costs = np.random.default_rng(0).normal(size=(500, D)), np.full(500, 1e-3)
    costs[7] = 1e9
    matrix = mx.array(x.astype(np.float32))
    bank = Quadrature.stack([{"keys": matrix, "values": matrix, "bias": mx.zeros(500)}], scale=0.2)
    row_costs = {name: mx.array(costs.astype(np.float32))[None] for name in ("keys", "values")}
    steps = np.array(quantization.row_steps(bank, row_costs, bits=4.0)["keys"][0], np.float64)
    numbers = np.rint(x / steps)
    assert 700 < np.abs(numbers[7]).max() <= 1024
    kept = GridMatrix.of((numbers * steps).astype(np.float32))
    assert np.array_equal(np.abs(kept.integers[7]), np.abs(numbers[7]))


def test_every_entry_has_its_part_and_a_small_head_as_many_parts_as_a_large_one(samples, trained):
    plan = quantization.RoundingPlan.of(trained, samples, bits=5)
    keys, values = (np.array(plan.part[n]) for n in ("keys", "values"))
    assert [np.bincount(x.ravel()).tolist() for x in keys] == [[D // quantization.PARTS] * quantization.PARTS] * 2
    for parts, count in zip(values[..., 0], COUNTS, strict=True):
        assert set(parts[:count]) == set(range(quantization.PARTS))
        assert (parts < quantization.PARTS).all()


def test_what_is_held_does_not_move(samples, trained):
    where = {"keys": mx.arange(D)[None, None] < 5, "values": mx.arange(max(COUNTS))[None, :, None] < 7}
    held = regression.Held(where=where, values={n: trained.parameters[n] + 1 for n in where})
    after = training(samples).train(Init.of(trained), steps=4, rate=1e-2, held=held).parameters
    assert mx.array_equal(after["keys"][..., :5], trained.parameters["keys"][..., :5] + 1)
    assert mx.array_equal(after["values"][:, :7], trained.parameters["values"][:, :7] + 1)
    assert (after["keys"][0, :, 5:] != trained.parameters["keys"][0, :, 5:]).all()
    assert (after["values"][0, 7:] != trained.parameters["values"][0, 7:]).all()


def test_other_samples_can_come_first(samples, trained):
    init = Init.of(trained)
    rotated = Samples(*(mx.concatenate([x[:, 500:], x[:, :500]], axis=1) for x in samples))
    runs = []
    for s, first in ((samples, 2), (rotated, 0)):
        ready = training(s)
        ready.units = training(samples).units
        runs.append(ready.train(init, steps=2, rate=1e-2, first=first))
    for name in runs[0].parameters:
        np.testing.assert_allclose(runs[0].parameters[name], runs[1].parameters[name], atol=1e-5)
