import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.heads import KINDS, Corrected, Exact, Quadrature, TargetScore
from nectar_mlx.heads.work import WorkKind
from tests.oracle import attention as oracle

SIZES = {
    "quadrature": [(7,), (1,), (12,)],
    "corrected": [(7, 4), (3, 9), (5, 1)],
    "mlp": [(16, 2, 8, 2), (24, 2, 16, 2), (8, 2, 4, 2)],
    "exact": [(9,), (9,), (9,)],
}
D = 16


def heads_of(kind, sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [KINDS[kind].shapes(size, D) for size in sizes]
    return [{n: mx.array(rng.normal(size=s).astype(np.float32)) for n, s in one.items()} for one in shapes]


def queries(count=3, n=11, seed=1):
    return mx.array(np.random.default_rng(seed).normal(size=(count, n, D)).astype(np.float32))


@pytest.mark.parametrize("kind", SIZES)
def test_stacking_unequal_heads_changes_none_of_them(kind):
    heads = heads_of(kind, SIZES[kind])
    bank = KINDS[kind].stack(heads, scale=0.25)
    assert bank.sizes == tuple(SIZES[kind])
    part = bank(queries())
    for i, head in enumerate(heads):
        alone = KINDS[kind].stack([head], scale=0.25)(queries()[i : i + 1])
        np.testing.assert_allclose(part.output[i], alone.output[0], atol=2e-4)
        np.testing.assert_allclose(part.log_normalizer[i], alone.log_normalizer[0], atol=2e-4)


@pytest.mark.parametrize("kind", SIZES)
def test_unstack_is_the_inverse_of_stack(kind):
    heads = heads_of(kind, SIZES[kind])
    for before, after in zip(heads, KINDS[kind].stack(heads, scale=0.25).unstack(), strict=True):
        assert before.keys() == after.keys()
        assert all(mx.array_equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("kind", SIZES)
def test_parameters_are_differentiable(kind):
    bank = KINDS[kind].stack(heads_of(kind, SIZES[kind]), scale=0.25)
    gradients = mx.grad(lambda p: sum(x.sum() for x in bank.apply(p, queries())))(bank.parameters)
    for name, gradient in gradients.items():
        assert mx.isfinite(gradient).all(), name
        assert mx.abs(gradient).max() > 0, name


def test_quadrature_is_softmax_over_its_nodes():
    (head,) = heads_of("quadrature", [(7,)])
    part = Quadrature.stack([head], scale=0.3)(queries(1))
    output, log_normalizer = oracle(
        queries(1), head["keys"][None], head["values"][None], scale=0.3, bias=head["bias"][None]
    )
    np.testing.assert_allclose(part.output, output, atol=1e-5)
    np.testing.assert_allclose(part.log_normalizer, log_normalizer, atol=1e-5)


def test_exact_is_attention_over_its_keys():
    (head,) = heads_of("exact", [(9,)])
    part = Exact.stack([head], scale=0.3)(queries(1))
    np.testing.assert_allclose(
        part.output, oracle(queries(1), head["keys"][None], head["values"][None], scale=0.3)[0], atol=1e-5
    )


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_networks_compute_the_documented_formula(layers):
    (head,) = heads_of("mlp", [(8, layers, 4, layers)])
    part = TargetScore.stack([head], scale=1.0)(queries(1))
    p = {n: np.array(a, dtype=np.float64) for n, a in head.items()}
    q = np.array(queries(1)[0], dtype=np.float64)
    for name, ours in (("target", part.output[0]), ("score", part.log_normalizer[0][:, None])):
        h = silu(q @ p[f"{name}.w_in"].T + p[f"{name}.b_in"])
        for layer in range(1, layers):
            h = h + silu(h @ p[f"{name}.w_{layer}"].T + p[f"{name}.b_{layer}"])
        truth = h @ p[f"{name}.w_out"] + q @ p[f"{name}.skip"].T + p[f"{name}.b_out"]
        np.testing.assert_allclose(ours, truth, atol=1e-4 * np.abs(truth).max())


def test_the_correction_adds_to_output_and_log_normaliser():
    (head,) = heads_of("corrected", [(7, 4)])
    part = Corrected.stack([head], scale=0.3)(queries(1))
    nodes = Quadrature.stack([{n: head[n] for n in ("keys", "values", "bias")}], scale=0.3)(queries(1))
    p = {n: np.array(a, dtype=np.float64) for n, a in head.items()}
    q = np.array(queries(1)[0], dtype=np.float64)
    h = silu(q @ p["w_gate"].T + p["b_gate"]) * (q @ p["w_up"].T + p["b_up"])
    np.testing.assert_allclose(part.output[0] - nodes.output[0], h @ p["w_out"] + p["b_out"], atol=1e-4)
    np.testing.assert_allclose(
        part.log_normalizer[0] - nodes.log_normalizer[0], h @ p["w_score"] + p["b_score"], atol=1e-4
    )


WORK = {"quadrature": [(7,)], "corrected": [(7, 4)], "mlp": [(8, 1, 5, 1), (8, 2, 5, 3)]}


@pytest.mark.parametrize("kind, size", [(kind, size) for kind, sizes in WORK.items() for size in sizes])
def test_the_kernel_reads_every_parameter_once(kind, size):
    (head,) = heads_of(kind, [size])
    work = KINDS[kind].stack([head], scale=1.0).decode_work()
    read = list(work.constants or ())
    for item in work.items:
        names = [name for part in item.matrices for name in (part if isinstance(part, tuple) else (part,))]
        rows = {len(head[name]) for name in (*names, *item.scalars) if name in head}
        assert len(rows) == 1 or item.kind == WorkKind.LINEAR, "as many numbers as rows"
        read += [*names, *(name for name in item.scalars if isinstance(name, str))]
    hidden = [name for name in head if name not in read]
    assert len(read) == len(set(read)) and len(hidden) == sum(2 * len(network) for network in work.networks)


def test_heads_that_the_kernel_does_not_evaluate_have_no_work_for_it():
    exact = Exact.stack(heads_of("exact", [(9,)]), scale=1.0)
    assert exact.decode_work() is None and exact.without_retrieval() is exact
