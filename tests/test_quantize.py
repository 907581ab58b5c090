import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import NectarError
from nectar_mlx.quantize import Quantized, dequantize, group_size, quantize


@pytest.mark.parametrize("width, group", [(64, 32), (80, 16), (96, 32), (128, 32), (256, 32), (48, 16)])
def test_groups_fit_every_head_dim(width, group):
    assert group_size(width) == group


def test_a_width_without_groups_is_refused():
    with pytest.raises(NectarError, match="multiple of 16"):
        quantize(mx.zeros((2, 20)), bits=8)


@pytest.mark.parametrize("bits, limit", [(8, 0.5 / 127), (4, 0.62 / 7)])
@pytest.mark.parametrize("width", [64, 80])
def test_the_error_is_below_half_a_step(bits, limit, width):
    x = mx.array(np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)) * mx.array(
        [[1e-3], [1.0], [300.0]] * 3
    )
    error = mx.abs(dequantize(quantize(x, bits=bits), bits=bits) - x).reshape(9, -1, group_size(width))
    largest = mx.abs(x).reshape(error.shape).max(-1)
    # 4 bits may clip the largest value of a group to serve the others better.
    allowed = limit if bits == 8 else 0.3
    assert (error.max(-1) <= largest * (allowed + 2e-3) + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_again_loses_nothing(bits):
    x = mx.array(np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32))
    once = dequantize(quantize(x, bits=bits), bits=bits)
    assert mx.allclose(dequantize(quantize(once, bits=bits), bits=bits), once, atol=2e-3 if bits == 8 else 0.2)


def test_zero_stays_zero_and_four_bits_pack_two_a_byte():
    packed = quantize(mx.zeros((3, 64)), bits=4)
    assert packed.data.shape == (3, 32) and packed.data.dtype == mx.uint8
    assert (dequantize(packed, bits=4) == 0).all()


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
