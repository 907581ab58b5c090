import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import store
from nectar_mlx.errors import NectarError
from nectar_mlx.store import grids
from nectar_mlx.store.grids import GridMatrix


def settled(count, width=32, seed=0, least=-10, most=3):
    """Values on grids of their own, in columns of very different size."""
    rng = np.random.default_rng(seed)
    steps = np.exp2(rng.integers(least, most, (count, 1)) / 2).astype(np.float32)
    values = rng.normal(size=(count, width)) * 2 ** rng.normal(size=width)
    return (np.rint(values / steps) * steps).astype(np.float32)


def test_values_on_grids_lose_nothing():
    values = settled(300)
    found = GridMatrix.of(values)
    np.testing.assert_allclose(found.values, values, rtol=1e-6)
    assert np.abs(found.integers).max() > 127, "some rows need more than a byte"


def test_a_grid_is_no_finer_than_it_must_be():
    """Twice whole numbers are whole numbers on a grid twice as coarse."""
    integers = np.array([[3, 0, -1, 7], [6, 0, -2, 14], [0, 0, 4, 0]], np.float32)
    found = GridMatrix.of(integers * 2**-1.5)
    assert found.integers.tolist() == [[3, 0, -1, 7], [3, 0, -1, 7], [0, 0, 1, 0]]
    assert found.exponents.tolist() == [-3, -1, 1]


def test_other_values_are_rounded_to_a_byte():
    values = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    found = GridMatrix.of(values)
    assert (np.abs(found.integers).max(1) <= 127).all() and (np.abs(found.integers).max(1) > 88).all()
    assert (np.abs(found.values - values) <= np.abs(values).max(1, keepdims=True) / 88 / 2).all()


def test_rows_of_next_to_nothing_are_zero():
    values = np.random.default_rng(2).normal(size=(9, 32)).astype(np.float32)
    values[3:] *= 1e-20
    scales, integers = grids.encode([GridMatrix.of(values)])
    (back,) = grids.decode(scales, integers, [values.shape])
    assert back.integers[:3].any(1).all() and not back.integers[3:].any()


SHAPES = [(80, 32), (0, 32), (1, 32), (6, 32), (400, 32)]


@pytest.fixture(scope="module")
def matrices():
    found = [GridMatrix.of(settled(rows, width, seed)) for seed, (rows, width) in enumerate(SHAPES)]
    return [
        *found,
        GridMatrix.of(np.zeros((5, 32), np.float32)),
        GridMatrix.of(np.eye(32, dtype=np.float32)[:3] * 1e-4),
    ]


def test_matrices_of_several_widths_are_what_each_is_alone():
    values = [settled(9, 32), settled(5, 48, seed=1), settled(0, 32), settled(7, 32, seed=2)]
    for found, alone in zip(GridMatrix.of_all(values), map(GridMatrix.of, values), strict=True):
        np.testing.assert_array_equal(found.integers, alone.integers)
        np.testing.assert_array_equal(found.exponents, alone.exponents)


def test_matrices_come_back(matrices):
    shapes = [m.integers.shape for m in matrices]
    back = list(grids.decode(*grids.encode(matrices), shapes))
    for one, other in zip(matrices, back, strict=True):
        np.testing.assert_array_equal(one.integers, other.integers)
        np.testing.assert_array_equal(one.exponents, other.exponents)


def test_large_files_are_coded_in_blocks(matrices, monkeypatch):
    monkeypatch.setattr(grids, "BLOCK", 3000)
    assert [b.stop - b.start for b in grids.blocks([m.integers.size for m in matrices])] == [4, 1, 2]
    test_matrices_come_back(matrices)


def test_columns_of_different_size_do_not_cost_what_the_largest_does():
    drawn = 16 * np.random.default_rng(0).normal(size=(400, 32))
    even, uneven = np.rint(drawn), np.rint(drawn * 2 ** np.linspace(-4, 0, 32))  # the latter carry two bits less
    sizes = [8 * len(grids.encode([GridMatrix.of(x.astype(np.float32))])[1]) / even.size for x in (even, uneven)]
    assert 1.8 < sizes[0] - sizes[1] < 2.2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("cut", [1, 2, 40])
def test_what_is_cut_short_is_an_error(matrices, which, cut):
    parts = list(grids.encode(matrices))
    parts[which] = parts[which][:-cut] if cut < 40 else parts[which][:1]
    with pytest.raises(NectarError, match="damaged"):
        list(grids.decode(*parts, [m.integers.shape for m in matrices]))


def heads(counts, width=32):
    return [
        {
            "keys": mx.array(settled(count, width, 2 * i)),
            "values": mx.array(settled(count, width, 2 * i + 1)),
            "bias": mx.arange(count).astype(mx.float32),
        }
        for i, count in enumerate(counts)
    ]


LAYOUT = store.Layout(kind="quadrature", n_layers=2, n_kv_heads=2, head_dim=32, scale=0.2, bits=None)


def test_heads_of_a_coded_layout_come_back():
    given = heads([7, 30, 1, 12])
    given[2] = dict(reversed(given[2].items()))  # as they come out of a checkpoint
    back = [h for bank in store.unpack(LAYOUT, store.pack(LAYOUT, given)) for h in bank.unstack()]
    for one, other in zip(given, back, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


def test_some_nodes_of_a_coded_file_are_the_same_nodes():
    given = heads([7, 30, 4, 12])
    nodes = [np.array([0, 3]), np.arange(30)[::-1], np.array([2]), np.arange(5)]
    some = store.select_nodes(LAYOUT, store.pack(LAYOUT, given), nodes)
    back = [h for bank in store.unpack(LAYOUT, some) for h in bank.unstack()]
    for one, other, chosen in zip(given, back, nodes, strict=True):
        for name in one:
            np.testing.assert_allclose(np.array(one[name])[chosen], other[name], rtol=1e-6)


@pytest.mark.parametrize("damage", ["heads.numbers", "heads.grids", "heads.bias", "sizes"])
def test_tensors_that_do_not_fit_each_other_are_an_error(damage):
    tensors = store.pack(LAYOUT, heads([7, 30, 4, 12]))
    for changed in (tensors | {damage: tensors[damage][:-1]}, {n: x for n, x in tensors.items() if n != damage}):
        if damage in changed or damage != "sizes":
            with pytest.raises(NectarError, match="damaged"):
                store.unpack(LAYOUT, changed)
