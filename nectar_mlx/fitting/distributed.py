"""One fit on several machines or processes: `mlx.launch -n 4 nectar fit …`.

Every process, a *rank*, reads the text and takes its share of the work: of the conversations, of their replay, of the
heads. No gradient travels. What the ranks made is put together in the order of the pieces, so all of them go on with
the same arrays; rank 0 alone writes the file. The pieces do not depend on the number of ranks, and what a piece draws
follows from the seed and its place: the file is that of a single process, byte for byte.

The samples of a layer are of use to the rank alone that fits its heads (`KindFit.parts`): it alone keeps them.

MLX's distributed engine does the transport (ring over TCP, MPI, JACCL over Thunderbolt, NCCL). All that is sent is
bytes, gathered from all ranks: NCCL and the ring cannot send to any rank. They stay in the memory that the engine
sends from, which with NCCL is the GPU's.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import NectarError
from ..heads import HeadArrays

_T = TypeVar("_T")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NAMES = {getattr(mx, name): name for name in ("bool_", *_INTEGERS, "float16", "bfloat16", "float32")}
_PIECE = 1 << 28  # bytes that are sent at once: the engine's counters have 32 bits
_ALIGNED = 16  # bytes, at whose multiples arrays begin
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")  # set by what starts several processes


@dataclass(frozen=True)
class World:
    """The processes of a fit. rank: this one's number, from 0; size: how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "World":
        """As this process was launched; a world of one where it was started by itself."""
        if not any(name in os.environ for name in _LAUNCHED):
            return cls()
        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    @property
    def first(self) -> bool:
        """Whether this rank writes and reports."""
        return self.rank == 0

    def mine(self, pieces: Sequence[_T]) -> Sequence[_T]:
        """This rank's share of some pieces of work."""
        return pieces[self.rank :: self.size]

    def owner(self, piece: int) -> int:
        """The rank whose share has the piece of this number."""
        return piece % self.size

    def gathered(self, data: mx.array) -> list[mx.array]:
        """The bytes [n] of all ranks, by rank. All ranks must call it."""
        if self.size == 1:
            return [data]
        lengths: list[int] = np.array(_gather(mx.array([data.size], mx.int64))).tolist()
        pieces, longest = [mx.zeros((self.size, 0), mx.uint8)], _aligned(max(lengths))
        for at in range(0, longest, _PIECE):
            own = data[at : at + _PIECE]
            padded = mx.pad(own, (0, min(_PIECE, longest - at) - own.size))
            pieces.append(_gather(padded).reshape(self.size, -1))
        whole = pieces[-1] if len(pieces) <= 2 else mx.concatenate(pieces, axis=1)
        return [own[:length] for own, length in zip(whole, lengths, strict=True)]

    def values(self, value: Any) -> list[Any]:
        """A JSON value of all ranks, by rank."""
        told = mx.array(np.frombuffer(json.dumps(value).encode(), np.uint8))
        return [json.loads(np.array(data).tobytes()) for data in self.gathered(told)]

    def arrays(self, arrays: Mapping[str, mx.array]) -> list[dict[str, mx.array]]:
        """Arrays of all ranks, by rank, bit for bit."""
        if self.size == 1:
            return [dict(arrays)]
        facts = self.values([[name, _NAMES[x.dtype], x.shape] for name, x in arrays.items()])
        every = self.gathered(_packed(arrays.values()))
        return [_unpacked(data, of) for data, of in zip(every, facts, strict=True)]

    def in_order(self, mine: Sequence[Any], by_rank: Sequence[Sequence[_T]]) -> list[_T]:
        """Results of `mine` pieces of all ranks in the order of the pieces. by_rank: gathered from `mine`."""
        assert len(by_rank[self.rank]) == len(mine)
        longest = max(map(len, by_rank))
        return [results[at] for at in range(longest) for results in by_rank if at < len(results)]

    def shared(
        self, pieces: Sequence[_T], make: Callable[[Sequence[_T]], Sequence[Mapping[str, mx.array]]]
    ) -> list[dict[str, mx.array]]:
        """Arrays made of every piece of work, in the order of the pieces. make: of a rank's share of them. All ranks
        must call it."""
        own = make(self.mine(pieces))
        by_rank = self._numbered(dict(enumerate(own)))
        return self.in_order(own, [list(of.values()) for of in by_rank])

    def heads(self, heads: Mapping[int, HeadArrays]) -> dict[int, HeadArrays]:
        """The heads that all ranks have, by their numbers."""
        return {number: head for of in self._numbered(heads) for number, head in of.items()}

    def _numbered(self, own: Mapping[int, Mapping[str, mx.array]]) -> list[dict[int, dict[str, mx.array]]]:
        """Arrays by number and name, of all ranks."""
        if self.size == 1:
            return [{number: dict(arrays) for number, arrays in own.items()}]
        by_rank = list[dict[int, dict[str, mx.array]]]()
        for part in self.arrays({f"{number}.{name}": x for number, of in own.items() for name, x in of.items()}):
            found = dict[int, dict[str, mx.array]]()
            for key, x in part.items():
                number, name = key.split(".", 1)
                found.setdefault(int(number), {})[name] = x
            by_rank.append(found)
        return by_rank


def parts(pieces: Sequence[_T], count: int) -> list[Sequence[_T]]:
    """Pieces divided into so many parts."""
    return [pieces[first::count] for first in range(count)]


def batches(count: int, *, most: int, shares: int) -> list[range]:
    """The numbers 0 … count - 1 in batches of at most `most`, about as long as each other: one, or a multiple of
    `shares`."""
    fewest = -(-count // most)
    number = min(count, -(-fewest // shares) * shares) if fewest > 1 else fewest
    return [range(count * i // number, count * (i + 1) // number) for i in range(number)]


def _gather(x: mx.array) -> mx.array:
    """Of all ranks, one after the other: on the stream of the engine, which with NCCL is the GPU's."""
    try:
        every = mx.distributed.all_gather(x)
        mx.eval(every)
    except RuntimeError as error:  # of the transport: a rank was killed, or failed
        raise NectarError(f"another rank of this fit has ended, so this one ends, too ({error})") from None
    return every


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _packed(arrays: Iterable[mx.array]) -> mx.array:
    """The bytes of arrays, one behind the other."""
    every = [mx.zeros(0, mx.uint8)]
    for x in arrays:
        data = mx.contiguous(x).reshape(-1).view(mx.uint8)
        every += [data, mx.zeros(_aligned(data.size) - data.size, mx.uint8)]
    packed = mx.concatenate([data for data in every if data.size] or every)
    mx.eval(packed)
    return packed


def _unpacked(data: mx.array, facts: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, mx.array]:
    """Arrays of these names, types and shapes from their bytes."""
    arrays, at = dict[str, mx.array](), 0
    for name, dtype, shape in facts:
        kind = getattr(mx, dtype)
        nbytes = math.prod(shape) * kind.size
        arrays[name] = data[at : at + nbytes].view(kind).reshape(shape)
        at += _aligned(nbytes)
    return arrays
