"""What every kind of head function offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import mlx.core as mx

from ..core.attention import Partial, group, ungroup
from ..core.quantize import Stored
from .work import DecodeWork

HeadArrays = dict[str, mx.array]  # the parameters of one head, unpadded, as they are stored; or of a bank, stacked
Size = tuple[int, ...]


@dataclass(kw_only=True)
class Bank:
    """M head functions of one kind, evaluated together.

    `bank(queries)` maps post-RoPE, unscaled queries [M, N, D] to `Partial(output [M, N, D], log_normalizer [M, N])`.
    `parameters` holds each array of `shapes` stacked to [M, ...]. Heads may differ in `sizes`; smaller ones are
    padded with parts that contribute exactly nothing. `scale` is the model's attention scale. `offset` [M, D] is what
    the heads' keys, and with them their log-normalizers, are relative to (see `attention`); None is zero.
    """

    parameters: HeadArrays
    sizes: tuple[Size, ...]
    scale: float
    offset: mx.array | None = None

    kind: ClassVar[str]
    # Of a stored matrix entry unless a fit sets another; None: every row in as many as it needs.
    default_bits: ClassVar[int | None] = 8
    learning_rate: ClassVar[float] = 6e-3  # of its regression
    fitted: ClassVar[bool] = True  # whether it is fitted at all; else the heads are the context's own keys
    trainable: ClassVar[bool] = True  # whether its parameters are trained
    joinable: ClassVar[bool] = False  # whether the heads of a text's chunks can be joined (`store.chunking`)
    keeps_keys: ClassVar[bool] = False  # whether the context's own keys are kept, in the heads or beside them
    decodes_stored: ClassVar[bool] = True  # whether the decode kernel can read the parameters as they are stored
    # Matrices whose rows are values.
    made_of_values: ClassVar[frozenset[str]] = frozenset({"values", "anchor_values", "means"})
    padding: ClassVar[dict[str, float]] = {}  # what neutral padding is where it is not zero

    def __call__(self, queries: mx.array) -> Partial:
        return self.apply(self.parameters, queries)

    def over(self, queries: mx.array) -> Partial:
        """The same for the queries [B, H, T, D] of a layer whose KV heads these are -> [B, H, T, ...]."""
        part = self(group(queries, len(self.sizes)))
        return Partial(*(ungroup(x, queries.shape[0], queries.shape[2]) for x in part))

    def apply(self, parameters: HeadArrays, queries: mx.array) -> Partial:
        """The functions with other parameters of the same shapes: pure, and differentiable in `parameters`."""
        raise NotImplementedError

    def without_retrieval(self) -> "Bank":
        """The heads as they answer if no key is read exactly."""
        return self

    @classmethod
    def stored_without_retrieval(cls, head: Stored) -> Stored:
        """The parameters of a head of `without_retrieval`, as they are stored."""
        return head

    def decode_work(self) -> DecodeWork | None:
        """What the decode kernel does for these heads; None if plain operations alone evaluate them."""
        return None

    @classmethod
    def shapes(cls, size: Size, head_dim: int) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter of one head of this size, in storage order."""
        raise NotImplementedError

    @classmethod
    def size_of(cls, head: HeadArrays) -> Size:
        """The size that `shapes` needs to describe this head."""
        raise NotImplementedError

    @classmethod
    def size_for(cls, units: int) -> Size:
        """The one size of this kind with so many nodes or hidden units: budgets buy units."""
        return (units,)

    @classmethod
    def size_with(cls, *, nodes: int, units: int, layers: int) -> Size:
        """The size with so many nodes, hidden units and hidden layers, of which a kind takes what it has."""
        raise NotImplementedError

    @classmethod
    def stack(cls, heads: Sequence[HeadArrays], *, scale: float, offset: mx.array | None = None) -> Self:
        """Heads as `shapes` describes them -> one bank."""
        parameters = {n: _pad_and_stack([h[n] for h in heads], cls.padding.get(n, 0.0)) for n in heads[0]}
        return cls(parameters=parameters, sizes=tuple(cls.size_of(h) for h in heads), scale=scale, offset=offset)

    def unstack(self) -> list[HeadArrays]:
        """The heads, unpadded: the inverse of `stack`."""
        heads = []
        for i, size in enumerate(self.sizes):
            shapes = self.shapes(size, self.head_dim)
            heads.append({n: self.parameters[n][(i, *(slice(0, d) for d in s))] for n, s in shapes.items()})
        return heads

    @property
    def head_dim(self) -> int:
        raise NotImplementedError


def _pad_and_stack(arrays: Sequence[mx.array], fill: float) -> mx.array:
    """Arrays of one rank -> [M, *largest shape], filled up with `fill`."""
    largest = [max(dims) for dims in zip(*(a.shape for a in arrays), strict=True)]
    padded = [
        mx.pad(a, [(0, n - d) for n, d in zip(largest, a.shape, strict=True)], constant_values=fill) for a in arrays
    ]
    return mx.stack(padded)
