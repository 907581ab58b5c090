import numpy as np
import pytest

from nectar_mlx.core import rans
from nectar_mlx.errors import NectarError


def drawn(count, seed=0, least=-12, most=15):
    """Numbers as they should be for their spreads, and the spreads."""
    rng = np.random.default_rng(seed)
    spreads = rng.integers(least, most, count)
    numbers = np.rint(rng.logistic(size=count) * 2 ** (spreads / 2) * 3**0.5 / np.pi).astype(int)
    return np.clip(numbers, -rans.limit(spreads), rans.limit(spreads)), spreads


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5000])
def test_numbers_come_back(count):
    numbers, spreads = drawn(count, seed=count)
    np.testing.assert_array_equal(rans.decode(rans.encode(numbers, spreads), spreads), numbers)


def test_the_largest_of_each_spread_come_back_and_no_larger_ones():
    spreads = np.repeat(np.arange(-12, 30), 2)
    numbers = rans.limit(spreads) * np.tile([-1, 1], 42)
    np.testing.assert_array_equal(rans.decode(rans.encode(numbers, spreads), spreads), numbers)
    with pytest.raises(ValueError, match="larger than its spread"):
        rans.encode(numbers[:1] - 1, spreads[:1])


def test_bits_are_those_that_the_numbers_carry():
    """Entropy of rounded logistic numbers, by their own frequencies, spread by spread."""
    for spread in (-4, 0, 3, 6, 9):
        numbers, spreads = drawn(200_000, seed=spread + 10, least=spread, most=spread + 1)
        _, counts = np.unique(numbers, return_counts=True)
        entropy = -(counts / len(numbers) * np.log2(counts / len(numbers))).sum()
        taken = 8 * len(rans.encode(numbers, spreads)) / len(numbers)
        assert entropy - 0.01 < taken < entropy + 0.06
        assert abs(rans.cost(np.array([spread]))[0] - entropy) < 0.05


def test_a_guess_that_is_off_by_an_octave_costs_little():
    numbers, spreads = drawn(50_000, least=4, most=5)
    numbers = np.clip(numbers, -rans.limit(np.array([2])), rans.limit(np.array([2])))
    right = len(rans.encode(numbers, spreads))
    for off in (-2, 2):
        assert right < len(rans.encode(numbers, spreads + off)) < right + 50_000 * 0.7 / 8


def test_the_code_is_the_same_on_every_machine():
    """Files outlive the machine that wrote them: these bytes must not change."""
    numbers, spreads = np.arange(-8, 8), np.arange(16) // 2 + 2
    assert rans.encode(numbers, spreads).tobytes().hex() == GOLDEN
    assert rans._models().often.sum(1).tolist() == [1 << 14] * 15


GOLDEN = "1340186d94c11589c861022aa2"


@pytest.mark.parametrize("damage", [
    lambda d: d[:-1], lambda d: d[:-2], lambda d: d[:3], lambda d: d[:0], lambda d: np.concatenate([d, d[:2]]),
    lambda d: np.concatenate([d[:9], d[9:10] ^ 16, d[10:]]),
])  # fmt: skip
def test_damaged_bytes_are_an_error(damage):
    numbers, spreads = drawn(3000)
    data = rans.encode(numbers, spreads)
    with pytest.raises(NectarError, match="damaged"):
        rans.decode(damage(data), spreads)
