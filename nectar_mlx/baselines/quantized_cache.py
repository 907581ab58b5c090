"""mlx-lm's quantised KV cache (affine, groups of 64): every key and value, in 8 or 4 bits."""

from dataclasses import replace
from functools import partial

import mlx.core as mx

from ..errors import NectarError
from .base import Baseline, EvalContext, View


def quantized(ctx: EvalContext, nbytes: int, *, bits: int) -> View:
    dim = ctx.geometry.head_dim
    if dim % 32:
        raise NectarError(f"mlx-lm does not quantise keys of {dim} values")
    group = 64 if dim % 64 == 0 else 32
    banks = []
    for layer in range(ctx.n_layers):
        rounded = [
            mx.dequantize(*mx.quantize(x, group_size=group, bits=bits), group_size=group, bits=bits)
            for x in ctx.layer(layer)
        ]
        bank = ctx.context.banks[layer]
        banks.append(replace(bank, parameters=bank.parameters | dict(zip(("keys", "values"), rounded, strict=True))))
        mx.eval(banks[-1].parameters)
    # A group's scale and offset take two bytes each: mlx-lm keeps them in the model's 16-bit type.
    per_row = dim * bits / 8 + 4 * dim / group
    return View(
        banks=banks,
        windows=ctx.context.windows,
        start=ctx.context.start,
        nbytes=int(2 * ctx.n_heads * ctx.length * per_row) + ctx.window_bytes,
        detail=f"groups of {group}",
    )


BASELINES = tuple(
    Baseline(name=f"{bits}-bit KV cache", build=partial(quantized, bits=bits), sized=False) for bits in (8, 4)
)
