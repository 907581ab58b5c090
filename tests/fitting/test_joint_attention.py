"""Nodes and live tokens as one set: the numbers and gradients of two parts that are merged."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.joint_attention import JointCache
from nectar_mlx.heads import Quadrature
from nectar_mlx.mlxlm.cache import NectarCache

SCALE, D = 0.3, 16


def bank(nodes, offset=None):
    key = iter(mx.random.split(mx.random.key(3), 3 * len(nodes)))
    heads = [
        {
            "keys": mx.random.normal((m, D), key=next(key)),
            "values": mx.random.normal((m, D), key=next(key)),
            "bias": mx.random.normal((m,), key=next(key)),
        }
        for m in nodes
    ]
    return Quadrature.stack(heads, scale=SCALE, offset=offset)


def call(kind, bank, queries, keys, values, **options):
    """The output of one layer's attention, and its gradients by everything that goes in."""
    names = list(bank.parameters)

    def attend(queries, keys, values, *parameters):
        other = Quadrature(
            parameters=dict(zip(names, parameters, strict=True)),
            sizes=bank.sizes,
            scale=bank.scale,
            offset=bank.offset,
        )
        cache = kind(other, 100)
        keys, values = cache.update_and_fetch(keys, values)
        return cache.attend(queries, keys, values, scale=SCALE, **{"mask": "causal"} | options)

    given = [queries, keys, values, *bank.parameters.values()]
    direction = mx.random.normal(queries.shape, key=mx.random.key(9))
    (output,), gradients = mx.vjp(attend, given, [direction])
    return [output, *gradients]


def random(*shape, seed, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float32, 2e-5), (mx.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "B, H, T, nodes, relative",
    [(1, 2, 1, (3, 3), False), (3, 6, 5, (7, 2), False), (2, 4, 9, (1, 30, 4, 2), True), (2, 3, 4, (5,), True)],
)
def test_it_is_what_two_parts_merge_to(B, H, T, nodes, relative, dtype, tolerance):
    K = len(nodes)
    offset = 4.0 * random(K, D, seed=7) if relative else None
    given = [random(B, n, T, D, seed=i, dtype=dtype) for i, n in enumerate((H, K, K))]
    pairs = zip(
        call(JointCache, bank(nodes, offset), *given), call(NectarCache, bank(nodes, offset), *given), strict=True
    )
    for ours, expected in pairs:
        ours, expected = (np.array(x.astype(mx.float32)) for x in (ours, expected))
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


def test_calls_that_are_not_one_whole_causal_set_are_merged():
    """A mask of its own, a sink: as every cache computes it."""
    given = [random(2, n, 5, D, seed=i) for i, n in enumerate((4, 2, 2))]
    window = mx.arange(5)[:, None] - mx.arange(5)[None]
    for options in ({"mask": (window >= 0) & (window < 2)}, {"sinks": random(4, seed=5)}):
        ours, expected = (call(kind, bank((3, 2)), *given, **options)[0] for kind in (JointCache, NectarCache))
        np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-6)
        assert np.abs(np.array(expected - call(JointCache, bank((3, 2)), *given)[0])).max() > 1e-2
