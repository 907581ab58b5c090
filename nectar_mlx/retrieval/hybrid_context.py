"""The exact keys and values beside a file: the banks that read some of them, and what an answer read."""

from collections.abc import Sequence
from functools import cached_property

from ..core.types import DoubleArray, JsonObject, LayerCache
from ..errors import NectarError
from ..heads import Bank
from ..mlxlm.attention_patch import Geometry
from ..store.kv_file import KeyFile
from .bank import HybridBank, hybrid_banks
from .cache import Record, recorded
from .passages import Passages
from .router import Router, routers
from .sources import attended

_MAX_FRACTIONS = 8  # whose banks are kept
EXACT_FRACTION = 0.01  # of the keys, read at a step unless a request says otherwise


class HybridContext:
    """A context whose keys may be read exactly: `heads` stands for those that are not read.

    keys: the file of exact keys; None where there is none. nbytes: of all heads, as stored.
    """

    def __init__(self, heads: Sequence[Bank], keys: KeyFile | None, geometry: Geometry, *, nbytes: int):
        self._heads, self._keys, self._geometry, self._nbytes = heads, keys, geometry, nbytes
        self._banks: dict[float, Sequence[HybridBank]] = {}

    def banks(self, exact_fraction: float | None = None) -> Sequence[HybridBank]:
        """One bank a layer, the same ones for the last few fractions; none where that is less than one key a head.

        exact_fraction: of the context's keys, read exactly at each step, in [0, 1]; None: EXACT_FRACTION.
        NectarError for another number, or where there are no keys to read.
        """
        if exact_fraction is not None and not 0 <= exact_fraction <= 1:
            raise NectarError(
                f"exact = {exact_fraction:g} is not in [0, 1]: it is the share of the keys to read at each step"
            )
        if self._keys is None:
            if exact_fraction:
                raise NectarError("there are no exact keys beside this file: fit it with --kind hybrid")
            return []
        fraction = EXACT_FRACTION if exact_fraction is None else exact_fraction
        if fraction not in self._banks:
            while len(self._banks) >= _MAX_FRACTIONS:  # a request to a server may choose it
                del self._banks[next(iter(self._banks))]
            self._banks[fraction] = hybrid_banks(
                self._heads,
                self._keys,
                self._routers,
                exact_fraction=fraction,
                nbytes=self._nbytes,
                group=self._geometry.n_heads // self._geometry.n_kv_heads,
            )
        return self._banks[fraction]

    @cached_property
    def _routers(self) -> list[Router]:
        assert self._keys is not None
        return routers(self._keys, scale=self._geometry.scale)

    def attended(self, caches: Sequence[LayerCache], passages: Passages) -> DoubleArray | None:
        """[passages], in [0, 1]: the exact attention to each since `forget`, beside the most attended one.

        Only tokens that were written one by one with these caches count. None without keys, or in a batch.
        """
        record = recorded(caches)
        return None if record is None or self._keys is None else attended(passages, self._keys.small, record.mass)

    def reading(self, caches: Sequence[LayerCache]) -> JsonObject:
        """For JSON: `bytes_read_per_token` (keys and values, router, heads). {} without keys."""
        record = recorded(caches)
        return {} if record is None else {"bytes_read_per_token": record.bytes_per_token}

    @staticmethod
    def forget(caches: Sequence[LayerCache]) -> None:
        """Starts a new record: before the next answer of a conversation."""
        if (record := recorded(caches)) is not None:
            record.clear()

    def record(self, layers: int) -> Record:
        """What the caches of one conversation note their reading in."""
        assert self._keys is not None
        return Record(self._keys.tokens, layers)
