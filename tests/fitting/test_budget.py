from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nectar_mlx import store
from nectar_mlx.fitting.budget import allocate, head_sizes, node_bits, size_for
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.sizes import mean_bits


def test_heads_that_err_more_get_more():
    shares = allocate([1.0, 4.0, 16.0], total=700.0, power=0.5, least=1, most=1e9)
    np.testing.assert_allclose(shares, [100, 200, 400])


def test_bounds_hold_and_the_rest_is_shared():
    shares = allocate([1e-9, 1.0, 1.0, 1e9], total=100.0, power=1.0, least=5, most=40)
    assert shares[0] == 5 and shares[3] == 40
    assert shares[1] == pytest.approx(27.5) and shares[2] == pytest.approx(27.5)


def test_too_little_for_all_gives_each_the_least():
    assert allocate([1.0, 2.0], total=3.0, power=1.0, least=4, most=10) == [4, 4]


@given(
    errors=st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40),
    total=st.floats(1, 1e6),
    power=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
)
def test_never_more_than_the_total_and_never_out_of_order(errors, total, power):
    shares = allocate(errors, total=total, power=power, least=1.0, most=1e4)
    assert all(1.0 <= s <= 1e4 for s in shares)
    assert sum(shares) <= max(total, len(errors)) * (1 + 1e-6)
    order = np.argsort(errors)
    assert all(shares[a] <= shares[b] + 1e-9 for a, b in pairwise(order))


@pytest.mark.parametrize("seed", range(20))
def test_every_head_gets_the_most_where_there_are_bytes_for_it(seed):
    errors, most = np.random.default_rng(seed).exponential(size=6), 100.1 + seed
    assert allocate(errors.tolist(), total=1e9, power=0.6, least=1, most=most) == [most] * 6


@pytest.mark.parametrize("nodes, bits", [(5000, 4), (200, 4), (142, 3.5), (100, 3), (5, 3), (0.1, 3)])
def test_few_nodes_have_fewer_bits(nodes, bits):
    layout = store.Layout(kind="quadrature", n_layers=2, n_kv_heads=2, head_dim=64, scale=0.125, bits=None)
    each = store.head_bytes(layout, (1000,)) * nodes / 1000
    assert node_bits(layout, each) == pytest.approx(bits, abs=0.02)
    (ours,) = size_for(layout, 10_000, bits=bits, most=10_000)
    (finest,) = size_for(layout, 10_000, bits=4, most=10_000)
    assert ours / finest == pytest.approx(4.29 / (bits + 0.29), rel=0.01)
    assert store.head_bytes(layout, (ours,), bits=bits) <= 10_000


def test_sizes_follow_the_bits():
    layout = store.Layout(kind="quadrature", n_layers=2, n_kv_heads=2, head_dim=64, scale=0.125, bits=None)
    nbytes = 4 * store.head_bytes(layout, (1000,)) / 20  # of 50 nodes a head in 4 bits
    sizes = head_sizes(np.ones(4), nbytes, share=0.005, layout=layout, config=FitConfig(), n=4000)
    assert all(size == size_for(layout, nbytes / 4, bits=3, most=4000) for size in sizes) and sizes[0][0] > 60
    assert mean_bits(layout, sizes, nbytes, n=4000) == 3
