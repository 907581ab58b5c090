"""The .nectar file: how heads lie in tensors (`layout`), what else it holds, how it is written and read (`file`)."""

from .file import Metadata, check_writable, contents, description, digest, is_nectar, model_name, read, write
from .grids import MEAN_BITS
from .layout import BITS, HALF_MAX, Layout, Tensors, head_bytes, integer_heads, pack, select_nodes, unpack

__all__ = [
    "BITS",
    "HALF_MAX",
    "MEAN_BITS",
    "Layout",
    "Metadata",
    "Tensors",
    "check_writable",
    "contents",
    "description",
    "digest",
    "head_bytes",
    "integer_heads",
    "is_nectar",
    "model_name",
    "pack",
    "read",
    "select_nodes",
    "unpack",
    "write",
]
