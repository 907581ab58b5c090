"""Reading some keys of a context exactly, for every query anew; a head function stands for all others.

`sketch` approximates keys, `router` searches the sketches, `selection` chooses what a query reads, `bank` is the
context of a layer as a cache sees it, `sources` are the passages that an answer attended to. `store.kv_file` is the
file of keys, `fitting.hybrid` fits the heads.
"""

from ..store.kv_file import KeyFile, kv_path
from .bank import HybridBank, hybrid_banks
from .cache import Record, recorded, recording

EXACT_FRACTION = 0.01  # of the keys, read at a step unless a request sets another

__all__ = ["EXACT_FRACTION", "HybridBank", "KeyFile", "Record", "hybrid_banks", "kv_path", "recorded", "recording"]
