"""One fit on several machines or processes: `mlx.launch -n 4 nectar fit …`.

Every process, a *rank*, reads the text and takes its share of the work: of the conversations, of their replay, of the
heads. No gradient travels. What the ranks made is put together in the order of the pieces, so all of them go on with
the same arrays; rank 0 alone writes the file. The pieces do not depend on the number of ranks, and what a piece draws
follows from the seed and its place: the file is that of a single process, byte for byte.

MLX's distributed engine does the transport (ring over TCP, MPI, JACCL over Thunderbolt, NCCL). All that is sent is
bytes, gathered from all ranks.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import NectarError
from ..heads import HeadArrays

_T = TypeVar("_T")
Bytes = npt.NDArray[np.uint8]
_LONGEST = 1 << 24  # bytes of a line of JSON
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NAMES = {getattr(mx, name): name for name in ("bool_", *_INTEGERS, "float16", "bfloat16", "float32")}
_PIECE = 1 << 28  # bytes that are sent at once: what ranks tell each other may be larger than memory has room for twice
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

    def gathered(self, data: Bytes) -> list[Bytes]:
        """The bytes of all ranks, by rank. All ranks must call it."""
        if self.size == 1:
            return [data]
        lengths: list[int] = np.array(_gather(mx.array([len(data)], mx.int64))).tolist()
        every, longest = [np.empty(length, np.uint8) for length in lengths], max(lengths)
        for at in range(0, longest, _PIECE):
            padded, own = np.zeros(min(_PIECE, longest - at), np.uint8), data[at : at + _PIECE]
            padded[: len(own)] = own
            pieces = np.array(_gather(mx.array(padded)), copy=False).reshape(self.size, -1)
            for whole, piece in zip(every, pieces, strict=True):
                whole[at : at + _PIECE] = piece[: max(0, len(whole) - at)]
        return every

    def values(self, value: Any) -> list[Any]:
        """A JSON value of all ranks, by rank."""
        return [json.loads(data.tobytes()) for data in self.gathered(_bytes(json.dumps(value).encode()))]

    def arrays(self, arrays: Mapping[str, mx.array]) -> list[dict[str, mx.array]]:
        """Arrays of all ranks, by rank, bit for bit."""
        if self.size == 1:
            return [dict(arrays)]
        return [_unpacked(data) for data in self.gathered(_packed(arrays))]

    def in_order(self, mine: Sequence[Any], by_rank: Sequence[Sequence[_T]]) -> list[_T]:
        """Results of `mine` pieces of all ranks in the order of the pieces. by_rank: gathered from `mine`."""
        assert len(by_rank[self.rank]) == len(mine)
        longest = max(map(len, by_rank))
        return [results[at] for at in range(longest) for results in by_rank if at < len(results)]

    def heads(self, heads: Mapping[int, HeadArrays]) -> dict[int, HeadArrays]:
        """The heads that all ranks have, by their numbers."""
        if self.size == 1:
            return dict(heads)
        flat = {f"{index}.{name}": x for index, head in heads.items() for name, x in head.items()}
        merged: dict[int, HeadArrays] = {}
        for part in self.arrays(flat):
            for key, x in part.items():
                index, name = key.split(".", 1)
                merged.setdefault(int(index), {})[name] = x
        return merged


def _gather(x: mx.array) -> mx.array:
    try:
        every = mx.distributed.all_gather(x, stream=mx.cpu)
        mx.eval(every)
    except RuntimeError as error:  # of the transport: a rank was killed, or failed
        raise NectarError(f"another rank of this fit has ended, so this one ends, too ({error})") from None
    return every


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def _packed(arrays: Mapping[str, mx.array]) -> Bytes:
    """A line of JSON with names, types and shapes, then the arrays' bytes."""
    facts = [[name, _NAMES[x.dtype], list(x.shape)] for name, x in arrays.items()]
    parts = [_bytes(json.dumps(facts).encode() + b"\n")]
    parts += [np.array(mx.contiguous(x).reshape(-1).view(mx.uint8), copy=False) for x in arrays.values()]
    return np.concatenate(parts)


def _unpacked(data: Bytes) -> dict[str, mx.array]:
    at = int(np.flatnonzero(data[:_LONGEST] == ord("\n"))[0]) + 1
    arrays = dict[str, mx.array]()
    for name, dtype, shape in json.loads(data[:at].tobytes()):
        kind = getattr(mx, dtype)
        nbytes = int(np.prod(shape)) * kind.size
        arrays[name] = mx.array(data[at : at + nbytes]).view(kind).reshape(shape)
        at += nbytes
    return arrays
