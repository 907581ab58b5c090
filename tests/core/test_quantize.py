import itertools

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.core.quantize import Quantized, dequantize, group_size, pack_integers, quantize


@pytest.mark.parametrize("width, group", [(64, 32), (80, 16), (96, 32), (128, 32), (256, 32), (48, 16), (72, 8)])
def test_groups_fit_every_head_dim(width, group):
    assert group_size(width) == group


def test_a_width_without_groups_is_refused():
    with pytest.raises(NectarError, match="multiple of 8"):
        quantize(mx.zeros((2, 20)), bits=8)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("width", [64, 80, 40])
def test_the_error_is_below_half_a_step(bits, width):
    x = mx.array(np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)) * mx.array(
        [[1e-3], [1.0], [300.0]] * 3
    )
    error = mx.abs(dequantize(quantize(x, bits=bits), bits=bits) - x).reshape(9, -1, group_size(width))
    largest = mx.abs(x).reshape(error.shape).max(-1)
    # Below 8 bits the largest value of a group may be clipped to serve the others better.
    allowed = 0.5 / 127 if bits == 8 else 0.3
    assert (error.max(-1) <= largest * (allowed + 2e-3) + 1e-6).all()


def test_every_bit_halves_the_error():
    x = mx.array(np.random.default_rng(3).normal(size=(200, 64)).astype(np.float32))
    errors = [float(mx.square(dequantize(quantize(x, bits=bits), bits=bits) - x).mean()) for bits in (4, 5, 6)]
    assert all(3 < more / less < 5 for more, less in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_whole_numbers_come_back(bits):
    """Every number of that many bits, in two groups with scales of their own."""
    limit = 2 ** (bits - 1)
    integers = mx.array(np.resize(np.arange(-limit, limit), (3, 64)).astype(np.int32))
    scales = mx.array([[0.5, 3.0]] * 3, dtype=mx.float16)
    packed = Quantized(pack_integers(integers, bits=bits), scales)
    assert packed.data.nbytes == 3 * 64 * bits // 8
    expected = np.array(integers) * np.repeat([0.5, 3.0], 32)
    np.testing.assert_array_equal(dequantize(packed, bits=bits), expected)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_zero_stays_zero(bits):
    assert (dequantize(quantize(mx.zeros((3, 64)), bits=bits), bits=bits) == 0).all()


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_what_was_rounded_before_loses_nothing(bits):
    rng = np.random.default_rng(bits)
    x = mx.array(rng.normal(size=(40, 64)).astype(np.float32))
    once = dequantize(quantize(x, bits=bits), bits=bits)
    assert mx.array_equal(dequantize(quantize(once, bits=bits), bits=bits), once)


def test_the_even_value_lies_in_the_low_nibble():
    packed = Quantized(mx.array([[0x9A] * 16], dtype=mx.uint8), mx.ones((1, 1), dtype=mx.float16))
    values = dequantize(packed, bits=4)
    assert values[0, :2].tolist() == [0xA - 8, 0x9 - 8]


def test_four_bit_scales_beat_the_plain_choice():
    x = mx.array(np.random.default_rng(2).standard_t(3, size=(64, 64)).astype(np.float32))
    groups = x.reshape(64, -1, 32)
    scale = mx.abs(groups).max(-1, keepdims=True) / 7
    plain = mx.square(mx.clip(mx.round(groups / scale), -8, 7) * scale - groups).sum()
    ours = mx.square(dequantize(quantize(x, bits=4), bits=4) - x).sum()
    assert ours < plain
