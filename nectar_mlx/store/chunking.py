"""Texts that were read in several chunks: where each lies in the prefix, and how heads are joined and taken apart.

A prefix is a preamble (the chat template's head) and behind it C chunks, numbered from 0. Every chunk was read behind
the preamble, at the positions that follow it, as if it were the whole text, and has heads of its own. All chunks weigh
as much as one, and the preamble, which they have in common, counts once:

    L = logaddexp(L_preamble, log Σ exp(L_c) - log C)

In heads made of nodes that is a bias of -log C on every node of a chunk: `join` adds it, `take` removes it. A joined
head has the preamble's nodes first, one a token, then each chunk's, of all chunks equally many.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np

from ..errors import NectarError
from ..heads import HeadArrays
from .layout import Layout, select_nodes
from .tensor_file import Tensors


def split(tokens: int, room: int) -> list[int]:
    """The lengths of chunks, at most `room`, equal but for a token; the last, nearest the question, is the longest."""
    count = -(-tokens // room)
    return [tokens * (i + 1) // count - tokens * i // count for i in range(count)]


@dataclass(frozen=True)
class ChunkedPrefix:
    """ids: the prefix's tokens. lengths: of the chunks that it ends with, in tokens; none where it has none."""

    ids: Sequence[int]
    lengths: Sequence[int] = ()

    @classmethod
    def checked(cls, ids: Sequence[int], lengths: Sequence[int]) -> Self:
        """NectarError where a prefix cannot have such chunks."""
        lengths = [int(length) for length in lengths]
        if any(length < 1 for length in lengths) or sum(lengths) > len(ids):
            raise NectarError("the file is damaged: its chunks are not those of its prefix")
        return cls(ids, lengths)

    @property
    def preamble(self) -> int:
        """How many tokens come before the first chunk."""
        return len(self.ids) - sum(self.lengths)

    @property
    def start(self) -> int:
        """The position of the token that follows: behind the longest chunk."""
        return self.preamble + max(self.lengths, default=0)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a chunk's own tokens start and end in the prefix."""
        first = self.preamble + sum(self.lengths[:number])
        return first, first + self.lengths[number]

    def body(self, number: int) -> list[int]:
        """A chunk's own tokens."""
        first, end = self.bounds(number)
        return list(self.ids[first:end])

    def text(self, number: int) -> list[int]:
        """The preamble and a chunk's own tokens: what the chunk was read as."""
        return [*self.ids[: self.preamble], *self.body(number)]

    def texts(self) -> Iterator[list[int]]:
        """Of all chunks."""
        return map(self.text, range(len(self.lengths)))


def join(preamble: Sequence[HeadArrays], chunks: Sequence[Sequence[HeadArrays]]) -> list[HeadArrays]:
    """The nodes of one layer's heads: of the preamble, then of each chunk, which together weigh as much as one.

    preamble: a head's nodes, head by head. chunks: the same, of each chunk.
    """
    less = math.log(len(chunks))
    lowered = [[head | {"bias": head["bias"] - less} for head in heads] for heads in chunks]
    return [
        {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(preamble, *lowered, strict=True)
    ]


def take(layout: Layout, tensors: Tensors, prefix: ChunkedPrefix, number: int) -> Tensors:
    """A file's tensors for one of its chunks, as if it alone had been fitted; no window is taken along.

    NectarError if there is no chunk of that number, or the heads are not those of the chunks.
    """
    count, preamble = len(prefix.lengths), prefix.preamble
    if not 0 <= number < count:
        raise NectarError(f"there is no chunk {number}: the text was read in {count}, which count from 0")
    nodes = []
    for size in np.array(tensors["sizes"])[:, 0].tolist():
        nodes_each, rest = divmod(size - preamble, count)
        if nodes_each < 1 or rest:
            raise NectarError("the file is damaged: its heads are not those of its chunks")
        own = preamble + number * nodes_each + np.arange(nodes_each)
        nodes.append(np.concatenate([np.arange(preamble), own]))
    taken = select_nodes(layout, tensors, nodes)
    of_chunk = mx.array(np.concatenate([np.arange(len(chosen)) >= preamble for chosen in nodes]))
    taken["heads.bias"] = mx.where(of_chunk, taken["heads.bias"] + math.log(count), taken["heads.bias"])
    taken["prefix"] = mx.array(prefix.text(number), dtype=mx.int32)
    return taken
