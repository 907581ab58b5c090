import numpy as np
import pytest

from nectar_mlx.core import rans
from nectar_mlx.errors import NectarError


def drawn(count, seed=0, least=-12, most=15):
    """Numbers as they should be for their scales, and the scales."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(least, most, count)
    integers = np.rint(rng.logistic(size=count) * 2 ** (scales / 2) * 3**0.5 / np.pi).astype(int)
    return np.clip(integers, -rans.limit(scales), rans.limit(scales)), scales


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5000])
def test_numbers_come_back(count):
    integers, scales = drawn(count, seed=count)
    np.testing.assert_array_equal(rans.decode(rans.encode(integers, scales), scales), integers)


def test_the_largest_of_each_spread_come_back_and_no_larger_ones():
    scales = np.repeat(np.arange(-12, 30), 2)
    integers = rans.limit(scales) * np.tile([-1, 1], 42)
    np.testing.assert_array_equal(rans.decode(rans.encode(integers, scales), scales), integers)
    with pytest.raises(ValueError, match="larger than its log2 scale"):
        rans.encode(integers[:1] - 1, scales[:1])


def test_bits_are_those_that_the_numbers_carry():
    """Entropy of rounded logistic integers, by their own frequencies, scale by scale."""
    for scale in (-4, 0, 3, 6, 9):
        integers, scales = drawn(200_000, seed=scale + 10, least=scale, most=scale + 1)
        _, counts = np.unique(integers, return_counts=True)
        entropy = -(counts / len(integers) * np.log2(counts / len(integers))).sum()
        taken = 8 * len(rans.encode(integers, scales)) / len(integers)
        assert entropy - 0.01 < taken < entropy + 0.06
        assert abs(rans.cost(np.array([scale]))[0] - entropy) < 0.05


def test_a_guess_that_is_off_by_an_octave_costs_little():
    integers, scales = drawn(50_000, least=4, most=5)
    integers = np.clip(integers, -rans.limit(np.array([2])), rans.limit(np.array([2])))
    right = len(rans.encode(integers, scales))
    for off in (-2, 2):
        assert right < len(rans.encode(integers, scales + off)) < right + 50_000 * 0.7 / 8


def test_the_code_is_the_same_on_every_machine():
    """Files outlive the machine that wrote them: these bytes must not change."""
    integers, scales = np.arange(-8, 8), np.arange(16) // 2 + 2
    assert rans.encode(integers, scales).tobytes().hex() == GOLDEN
    assert rans.models().frequencies.sum(1).tolist() == [1 << 14] * 15


GOLDEN = "1340186d94c11589c861022aa2"


@pytest.mark.parametrize("damage", [
    lambda d: d[:-1], lambda d: d[:-2], lambda d: d[:3], lambda d: d[:0], lambda d: np.concatenate([d, d[:2]]),
    lambda d: np.concatenate([d[:9], d[9:10] ^ 16, d[10:]]),
])  # fmt: skip
def test_damaged_bytes_are_an_error(damage):
    integers, scales = drawn(3000)
    data = rans.encode(integers, scales)
    with pytest.raises(NectarError, match="damaged"):
        rans.decode(damage(data), scales)
