"""The decode kernel's speed on this machine by rows in flight, query rows of a simdgroup and blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import mlx.core as mx

from .. import kernels
from ..core.types import JsonObject
from ..kernels import DecodeKernel, checking, variants
from . import measure
from .measure import DTYPE, Shape

Row = JsonObject

FLIGHTS, TILES, BLOCKS = (1, 2, 4, 6, 8), (1, 2, 4), (64, 96, 124, 144, 192)
STORAGES = {"float16": 16, "int8": 8}
NODES, LIVE = 1310, 64


def rows(shape: Shape) -> Iterator[Row]:
    """One row a choice, as soon as it is measured: `ms` for the attention of one decode step of all layers.

    The first row of each storage is the library's own choice. A choice whose kernel does not work has no `ms`.
    """
    group = shape.n_heads // shape.n_kv_heads
    queries = mx.random.normal((shape.batch, shape.n_heads, 1, shape.head_dim)).astype(DTYPE)
    live = (shape.layers, 2, shape.batch, shape.n_kv_heads, measure.CACHE_STEP, shape.head_dim)
    buffers = mx.random.normal(live).astype(DTYPE)
    caches = [(keys, values) for keys, values in buffers]
    trials = list(product(FLIGHTS, [tile for tile in TILES if tile <= shape.batch * group]))
    for storage, bits in STORAGES.items():
        bank, heads = checking.stored(measure.random_bank(shape, NODES), mx.float16, bits)
        for blocks in (None, *BLOCKS):
            packed = kernels.pack(bank, dtype=mx.float16, bits=bits, heads=heads, n_blocks=blocks)
            layers = [packed.copy() for _ in range(shape.layers)]  # every layer reads memory of its own
            for flight, tile in trials if blocks else [(None, None)]:
                form = replace(packed.form, flight=flight, tile=tile)
                variant = variants.variant_for(form, shape.batch * group, group, 1, "bfloat16", False)
                row: Row = {"storage": storage, "flight": variant.flight, "tile": variant.tile}
                row |= {"blocks": blocks or kernels.blocks(), "chosen": blocks is None}
                yield row | _measured([DecodeKernel(replace(layer, form=form)) for layer in layers], queries, caches)


def _measured(layers: list[DecodeKernel], queries: mx.array, caches: Sequence[tuple[mx.array, mx.array]]) -> Row:
    def step() -> mx.array:
        out = queries
        for kernel, (keys, values) in zip(layers, caches, strict=True):
            attended = kernel.attend(out, keys, values, live=LIVE)
            assert attended is not None
            out = attended
        return out

    if layers[0].attend(queries, *caches[0], live=LIVE) is None:
        return {}
    return {"ms": measure.timed(step) * 1e3}
