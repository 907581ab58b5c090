"""Reading some keys of a context exactly, for every query anew, and completing them by a head function of the others.

`sketch` approximates keys, `router` searches the sketches, `selection` chooses what a query reads, `bank` is the
context of a layer as a cache sees it, `sources` are the passages that an answer attended to, `hybrid_context` is all of
it for one file. `store.kv_file` is the file of keys, `fitting.kinds.hybrid` fits the heads. `chunk_index` finds the
chunk of a long text that a question is about.
"""

from ..store.kv_file import KeyFile, find_keys, kv_path
from .bank import HybridBank, hybrid_banks
from .cache import Record, recorded, recording
from .chunk_index import ChunkIndex
from .hybrid_context import EXACT_FRACTION, HybridContext

__all__ = [
    "EXACT_FRACTION",
    "ChunkIndex",
    "HybridBank",
    "HybridContext",
    "KeyFile",
    "Record",
    "find_keys",
    "hybrid_banks",
    "kv_path",
    "recorded",
    "recording",
]
