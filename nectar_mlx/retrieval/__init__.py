"""Reading some keys of a context exactly, for every query anew, and completing them by a head function of the rest.

`keys` is the file beside a .nectar, `sketch` the router, `selection` what a query should read, `bank` the context of a
layer as a cache sees it, `sources` what an answer rests on, `hybrid_context` all of it for one file. The heads are
made in `fitting.hybrid`. `chunk_index` finds the chunk of a long text that a question is about.
"""

from ..store.kv_file import KeyFile, kv_path
from .bank import HybridBank, hybrid_banks
from .cache import Record, recorded, recording
from .chunk_index import ChunkIndex
from .hybrid_context import EXACT, HybridContext

__all__ = [
    "EXACT",
    "ChunkIndex",
    "HybridBank",
    "HybridContext",
    "KeyFile",
    "Record",
    "hybrid_banks",
    "kv_path",
    "recorded",
    "recording",
]
