from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nectar_mlx import store
from nectar_mlx.fitting.budget import allocate, node_bits, size_for


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


@pytest.mark.parametrize("share, bits", [(0.5, 4), (0.02, 4), (0.01, 3.5), (0.005, 3), (0.001, 3)])
def test_small_files_have_more_nodes_of_fewer_bits(share, bits):
    assert node_bits(share) == pytest.approx(bits)
    layout = store.Layout(kind="quadrature", n_layers=2, n_kv_heads=2, head_dim=64, scale=0.125, bits=None)
    (ours,), (finest,) = (size_for(layout, 10_000, share=x, most=10_000) for x in (share, 1.0))
    assert ours / finest == pytest.approx(4.29 / (bits + 0.29), rel=0.01)
    assert store.head_bytes(layout, (ours,), bits=bits) <= 10_000
