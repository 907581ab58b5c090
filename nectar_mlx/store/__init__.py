"""The .nectar file: how heads lie in tensors (`layout`), what else it holds, how it is written and read (`file`)."""

from .file import Metadata, check_writable, contents, description, digest, is_nectar, model_name, read, write
from .layout import BITS, HALF_MAX, Layout, Tensors, choose, head_bytes, pack, stored, unpack
from .rows import MEAN_BITS

__all__ = [
    "BITS",
    "HALF_MAX",
    "MEAN_BITS",
    "Layout",
    "Metadata",
    "Tensors",
    "check_writable",
    "choose",
    "contents",
    "description",
    "digest",
    "head_bytes",
    "is_nectar",
    "model_name",
    "pack",
    "read",
    "stored",
    "unpack",
    "write",
]
