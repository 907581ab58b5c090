"""A file for a part of a model, which has some heads of every layer, and the whole file of all parts."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from ..core.types import JsonObject
from ..errors import NectarError
from ..mlxlm.geometry import FULL, Geometry
from . import file
from .file import Metadata
from .layout import Layout, unpack
from .tensor_file import Tensors


def part(tensors: Tensors, metadata: Metadata, *, rank: int, size: int) -> tuple[Tensors, Metadata]:
    """A file's contents for one of `size` parts of its model. NectarError where the model's heads cannot be divided."""
    layout = Layout(**metadata["layout"])
    heads, rest = divmod(layout.n_kv_heads, size)
    if rest:
        raise NectarError(f"the file has {layout.n_kv_heads} heads a layer, which {size} ranks cannot share")
    own, banks = slice(rank * heads, (rank + 1) * heads), unpack(layout, tensors)
    offsets = [None if bank.offset is None else bank.offset[own] for bank in banks]
    return _contents(
        [head for bank in banks for head in bank.unstack()[own]],
        offsets,
        tensors,
        metadata,
        replace(layout, n_kv_heads=heads),
        _with_heads(Geometry.from_dict(metadata["geometry"]), 1 / size),
    )


def whole(parts: Sequence[Tensors], metadata: Metadata) -> tuple[Tensors, Metadata]:
    """The contents of the file of a whole model from those of its parts. metadata: of the first part."""
    layout, size = Layout(**metadata["layout"]), len(parts)
    layers = list(zip(*(unpack(layout, tensors) for tensors in parts), strict=True))
    offsets = [None if banks[0].offset is None else mx.concatenate([bank.offset for bank in banks]) for banks in layers]
    return _contents(
        [head for banks in layers for bank in banks for head in bank.unstack()],
        offsets,
        parts[0],
        metadata,
        replace(layout, n_kv_heads=layout.n_kv_heads * size),
        _with_heads(Geometry.from_dict(metadata["geometry"]), size),
    )


def _contents(
    heads: Sequence[dict[str, mx.array]],
    offsets: Sequence[mx.array | None],
    tensors: Tensors,
    metadata: Metadata,
    layout: Layout,
    geometry: Geometry,
) -> tuple[Tensors, Metadata]:
    ids: Any = tensors["prefix"].tolist()
    packed = file.contents(layout, heads, prefix=ids, windows={}, offsets=offsets)
    changed: JsonObject = {"layout": asdict(layout), "geometry": geometry.to_dict()}
    return packed, metadata | changed


def _with_heads(geometry: Geometry, times: float) -> Geometry:
    """So many times the heads in every layer."""
    if any(layer.kind != FULL for layer in geometry.layers):
        raise NectarError("models are divided among ranks only where every layer has full attention")
    layers = tuple(
        replace(layer, n_heads=round(layer.n_heads * times), n_kv_heads=round(layer.n_kv_heads * times))
        for layer in geometry.layers
    )
    return replace(geometry, layers=layers)
