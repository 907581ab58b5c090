"""Prompts and answers whose caches are kept: a conversation's next turn reads only what is new."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..core.types import IntArray
from ..nectar import Nectar

Caches = list[Any]  # of mlx-lm, one a layer


class _Entry(NamedTuple):
    nectar: Nectar
    exact: float | None
    tokens: IntArray
    caches: Caches
    nbytes: int


class KeptPrompts:
    """At most `count` of them and `limit` bytes, the least recently used one dropped first."""

    def __init__(self, count: int, limit: int):
        self._count, self._limit = count, limit
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, nectar: Nectar, exact: float | None, prompt: Sequence[int]) -> tuple[Caches | None, int]:
        """Copies of the caches that hold most of the beginning of a prompt, and how many tokens of it they hold. At
        least one token is left to read: None and 0 where nothing can be used."""
        tokens = np.array(prompt, dtype=np.int32)
        best, number = 0, -1
        for i, entry in self._entries.items():
            if entry.nectar is not nectar or entry.exact != exact:
                continue
            common = min(_common(entry.tokens, tokens), len(tokens) - 1)
            if common > best and (common == len(entry.tokens) or can_trim_prompt_cache(entry.caches)):
                best, number = common, i
        if number < 0:
            return None, 0
        self._entries.move_to_end(number)
        entry = self._entries[number]
        caches = copy.deepcopy(entry.caches)
        if best < len(entry.tokens):
            trim_prompt_cache(caches, len(entry.tokens) - best)
        return caches, best

    def add(self, nectar: Nectar, exact: float | None, tokens: Sequence[int], caches: Caches) -> None:
        """Keeps the caches of these tokens; what they begin with need not be kept on its own."""
        if not self._count:
            return
        new = _Entry(nectar, exact, np.array(tokens, dtype=np.int32), caches, sum(cache.nbytes for cache in caches))
        for number, entry in list(self._entries.items()):
            same = entry.nectar is nectar and entry.exact == exact and len(entry.tokens) <= len(new.tokens)
            if same and _common(entry.tokens, new.tokens) == len(entry.tokens):
                self._drop(number)
        self._entries[self._next] = new
        self._next += 1
        self.nbytes += new.nbytes
        self.shrink(self._limit)

    def shrink(self, nbytes: int) -> None:
        """Drops the least recently used until the rest has at most so many bytes."""
        while self._entries and (self.nbytes > nbytes or len(self._entries) > self._count):
            self._drop(next(iter(self._entries)))

    def forget(self, nectar: Nectar) -> None:
        """Drops what belongs to a file that is put away."""
        for number in [number for number, entry in self._entries.items() if entry.nectar is nectar]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def _common(a: IntArray, b: IntArray) -> int:
    """How many tokens two lists have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
