"""How parameters are kept: 8- or 4-bit integers in groups along the last axis, one float16 scale a group; value = q ·
scale.

Symmetric, so a group costs 2 bytes of scale and zero stays zero. Vectors (biases) stay float16. int4 packs two values
in a byte, the even one in the low nibble, stored as q + 8.
"""

from typing import NamedTuple

import mlx.core as mx

from .errors import NectarError


class Quantized(NamedTuple):
    """`data` int8 [..., D] or uint8 [..., D / 2] (two 4-bit values a byte); `scales` float16 [..., D / group]."""

    data: mx.array
    scales: mx.array


def group_size(width: int) -> int:
    """Values that share a scale: 32, or 16 where the width is no multiple of 32 (head_dim 80)."""
    for size in (32, 16):
        if width % size == 0:
            return size
    raise NectarError(f"rows of {width} values cannot be quantised: not a multiple of 16")


def quantize(x: mx.array, *, bits: int) -> Quantized:
    """x [..., D] -> its nearest `bits`-bit form. The scale of a 4-bit group is the one of a few that loses least."""
    size = group_size(x.shape[-1])
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, size)
    limit = 2 ** (bits - 1) - 1
    top = mx.maximum(mx.abs(groups).max(-1, keepdims=True), 1e-6)
    best, error = top / limit, None
    for shrink in (1.0,) if bits == 8 else (1.0, 0.93, 0.86, 0.8, 0.74):
        scale = (top * shrink / limit).astype(mx.float16).astype(mx.float32)
        loss = mx.square(_round(groups, scale, limit) * scale - groups).sum(-1, keepdims=True)
        best = scale if error is None else mx.where(loss < error, scale, best)
        error = loss if error is None else mx.minimum(loss, error)
    data = _round(groups, best, limit).reshape(x.shape)
    if bits == 8:
        return Quantized(data.astype(mx.int8), best[..., 0].astype(mx.float16))
    nibbles = (data + 8).astype(mx.uint8)
    return Quantized(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), best[..., 0].astype(mx.float16))


def dequantize(quantized: Quantized, *, bits: int) -> mx.array:
    """The float32 values, [..., D]."""
    data, scales = quantized
    if bits == 4:
        data = mx.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1).astype(mx.int8) - 8
    groups = data.astype(mx.float32).reshape(*scales.shape, -1)
    return (groups * scales.astype(mx.float32)[..., None]).reshape(data.shape)


def _round(groups: mx.array, scale: mx.array, limit: int) -> mx.array:
    return mx.clip(mx.round(groups / scale), -limit - 1, limit)
