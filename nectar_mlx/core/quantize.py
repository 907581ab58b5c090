"""Quantization: integers of 3 to 8 bits in groups along the last axis, one float16 scale a group;
value = integer · scale.

It is symmetric: a group costs 2 bytes of scale, and zero stays zero. Vectors (biases) stay float16. Integers of fewer
than 8 bits are packed end to end as integer + 2^(bits - 1), the first one in the lowest bits.
"""

from typing import NamedTuple

import mlx.core as mx

from ..errors import NectarError


class Quantized(NamedTuple):
    """`data` int8 [..., D], or of fewer bits uint8 [..., D · bits / 8]; `scales` float16 [..., D / group]."""

    data: mx.array
    scales: mx.array


Stored = dict[str, mx.array | Quantized]  # the parameters of one head, as `Bank.shapes` names them


def group_size(width: int) -> int:
    """Values that share a scale: 32; or 16 or 8, where that is all that divides the width (80, 72)."""
    for size in (32, 16, 8):
        if width % size == 0:
            return size
    raise NectarError(f"rows of {width} values cannot be quantized: not a multiple of 8")


def quantize(x: mx.array, *, bits: int) -> Quantized:
    """x [..., D] -> its nearest form of `bits` bits; below 8 bits a group gets the best of a few scales.

    Values that were quantized before lose nothing.
    """
    size = group_size(x.shape[-1])
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, size)
    limit = 2 ** (bits - 1) - 1
    top = mx.maximum(mx.abs(groups).max(-1, keepdims=True), 1e-6)
    best, error = top, None
    for steps in _steps(bits):
        scale = (top / steps).astype(mx.float16).astype(mx.float32)
        loss = mx.square(_round(groups, scale, limit) * scale - groups).sum(-1, keepdims=True)
        best = scale if error is None else mx.where(loss < error, scale, best)
        error = loss if error is None else mx.minimum(loss, error)
    integers = _round(groups, best, limit).reshape(x.shape)
    return Quantized(pack_integers(integers, bits=bits), best[..., 0].astype(mx.float16))


def _steps(bits: int) -> list[float]:
    """What the largest entry of a group may be, in scales: beyond the limit it is clipped, so that the others are
    nearer; below it are values that were quantized before."""
    limit = 2 ** (bits - 1) - 1
    if bits == 8:
        return [limit]
    return [limit, *(limit / shrink for shrink in (0.93, 0.86, 0.8, 0.74)), *range(limit + 1, limit // 2, -1)]


def pack_integers(integers: mx.array, *, bits: int) -> mx.array:
    """Signed integers [..., D] of `bits` bits -> `Quantized.data`."""
    if bits == 8:
        return integers.astype(mx.int8)
    shifted = (integers + 2 ** (bits - 1)).astype(mx.uint8)
    ones = ((shifted[..., None] >> mx.arange(bits, dtype=mx.uint8)) & 1).reshape(*integers.shape[:-1], -1, 8)
    octets: mx.array = (ones << mx.arange(8, dtype=mx.uint8)).sum(-1)
    return octets.astype(mx.uint8)


def unpack_integers(data: mx.array, *, bits: int) -> mx.array:
    """`Quantized.data` -> signed integers [..., D]."""
    if bits == 8:
        return data
    ones = ((data[..., None] >> mx.arange(8, dtype=mx.uint8)) & 1).reshape(*data.shape[:-1], -1, bits)
    shifted: mx.array = (ones << mx.arange(bits, dtype=mx.uint8)).sum(-1)
    return mx.subtract(shifted.astype(mx.int32), 2 ** (bits - 1))


def dequantize(quantized: Quantized, *, bits: int) -> mx.array:
    """The float32 values, [..., D]."""
    integers, scales = unpack_integers(quantized.data, bits=bits), quantized.scales.astype(mx.float32)
    values: mx.array = integers.astype(mx.float32).reshape(*scales.shape, -1) * scales[..., None]
    return values.reshape(integers.shape)


def _round(groups: mx.array, scale: mx.array, limit: int) -> mx.array:
    return mx.clip(mx.round(groups / scale), -limit - 1, limit)
