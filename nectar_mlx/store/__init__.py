"""The .nectar file: how heads lie in tensors (`layout`), what else it holds, how it is written and read (`file`)."""

from . import tensor_file
from .file import (
    Metadata,
    check_header,
    check_whole,
    check_writable,
    contents,
    damage_named,
    description,
    is_nectar,
    model_name,
    prefix_digest,
    read,
    report,
    source,
    tensors_digest,
    write,
)
from .grids import MEAN_BITS, MOVED_BITS
from .layout import BITS, HALF_MAX, Layout, head_bytes, integer_heads, mean_bits, pack, select_nodes, unpack
from .tensor_file import Tensors, digest

__all__ = [
    "BITS",
    "HALF_MAX",
    "MEAN_BITS",
    "MOVED_BITS",
    "Layout",
    "Metadata",
    "Tensors",
    "check_header",
    "check_whole",
    "check_writable",
    "contents",
    "damage_named",
    "description",
    "digest",
    "head_bytes",
    "integer_heads",
    "is_nectar",
    "mean_bits",
    "model_name",
    "pack",
    "prefix_digest",
    "read",
    "report",
    "select_nodes",
    "source",
    "tensor_file",
    "tensors_digest",
    "unpack",
    "write",
]
