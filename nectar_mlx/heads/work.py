"""What the heads of a bank ask of the decode kernel, as plain data: see `Bank.decode_work`."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import mlx.core as mx


class WorkKind(IntEnum):
    """What the kernel does with a row; metal/decode.metal has the same numbers.

    Behind each kind: its matrices; its scalars. h: silu of the product of a row of `in` and the query, plus b_in.
    """

    NODES = 0  # key, value; bias: a weighted node
    GATED = 1  # gate, up, out; b_gate, b_up, w_score: a gated hidden unit, added to the output and the log-normaliser
    PLAIN = 2  # in, out; b_in: h · out is added to the output
    SCORE = 3  # in; b_in, w_score: h · w_score is added to the log-normaliser
    LINEAR = 4  # in; column of the output that the product is added to, head_dim for the log-normaliser
    GIVEN = 5  # out; index: as PLAIN, h being that entry of the activations
    GIVEN_SCORE = 6  # none; index, w_score: as SCORE, h being that entry of the activations


@dataclass(frozen=True)
class WorkItem:
    """Some rows of every head, by the names of its parameters.

    matrices: rows as wide as a query; a tuple of names is one matrix, the parameters one below the other.
    scalars: a number a row; an integer stands for its index, counted from that integer.
    """

    kind: WorkKind
    matrices: tuple[str | tuple[str, ...], ...]
    scalars: tuple[str | int, ...]


class Layer(NamedTuple):
    """A fully connected layer of every head: weights [K, units, inputs] and bias [K, units]."""

    weights: mx.array
    bias: mx.array


Network = tuple[Layer, ...]  # hidden layers: h = silu(first(q)), and h + silu(layer(h)) for each of the others


@dataclass(frozen=True, eq=False)
class DecodeWork:
    """The work of every head of a bank.

    constants: the parameters that are added once, to the output [D] and to the log-normaliser [1].
    networks: hidden layers that stock matmuls evaluate; their last ones side by side are the activations.
    """

    items: tuple[WorkItem, ...]
    constants: tuple[str, str] | None = None
    networks: tuple[Network, ...] = ()

    @property
    def kinds(self) -> frozenset[WorkKind]:
        return frozenset(item.kind for item in self.items)
