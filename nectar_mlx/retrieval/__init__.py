"""Reading some keys of a context exactly, for every query anew, and completing them by a head function of the rest.

`keys` is the file beside a .nectar, `sketch` the router, `selection` what a query should read, `bank` the context of a
layer as a cache sees it, `sources` what an answer rests on. The heads are made in `fitting.retrieval`.
"""

from ..store.kv_file import KeyFile, kv_path
from .bank import HybridBank, hybrid_banks
from .cache import Record, recorded, recording

EXACT = 0.01  # of the keys, read at a step unless a request says otherwise

__all__ = ["EXACT", "HybridBank", "KeyFile", "Record", "hybrid_banks", "kv_path", "recorded", "recording"]
