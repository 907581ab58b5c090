"""The patterns of Sparse Transformers: which keys a query sees (Child et al., arXiv 1904.10509, section 4).

Write positions 0, 1, 2, … row by row into a grid of `stride` columns. A query sees two sets of keys:

              near                                far
    Strided   the last `stride` positions         its own column in earlier rows
    Fixed     its own row, up to itself           `summary` columns of every earlier row

With a stride of about √n either set has about √n keys, and two such steps connect every pair of positions. Strided
suits data with a period (images), Fixed suits text: what the summary columns hold, every later token can read.

`mask` is the definition. `near_*` and `far_*` lay the grid out so that both sets become dense attention: near inside
rows, far between rows (attention.py). Shapes: B sequences, h heads, R rows with queries, M rows with keys,
l = stride columns, D head_dim.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import mlx.core as mx

from ..errors import NectarError

Combine = Literal["merged", "interleaved", "heads"]
Step = Literal["BLOCKS", "WINDOW", "LANES"]  # a launch of the kernel, by its name in metal/sparse.metal


@dataclass(frozen=True)
class Pattern(ABC):
    """Which keys a query sees. `combine` says how a network takes the two steps near and far (section 4.3):

    merged       every head attends to the union of both
    interleaved  layers alternate: near in even layers, far in odd ones; `at(layer)` is the pattern of one layer
    heads        heads alternate: near in even heads, far in odd ones

    Whatever the step, a query sees itself.
    """

    stride: int
    combine: Combine = "merged"
    layer: int = 0

    kernel_steps: ClassVar[tuple[Step, ...]]

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise NectarError(f"stride is {self.stride}: it must be at least 1")
        if self.combine not in ("merged", "interleaved", "heads"):
            raise NectarError(f"combine is {self.combine!r}: choose merged, interleaved or heads")

    def at(self, layer: int) -> Self:
        """The same pattern as seen by one layer."""
        return replace(self, layer=layer)

    def steps(self, head: int) -> tuple[bool, bool]:
        """Whether this head takes the near and the far step."""
        if self.combine == "merged":
            return True, True
        odd = (self.layer if self.combine == "interleaved" else head) % 2 == 1
        return not odd, odd

    def mask(self, length: int, keys_length: int, *, heads: int = 1, first: int | None = None) -> mx.array:
        """What the last T = `length` of S = `keys_length` positions see: bool [heads, T, S], or of the `first` keys.

        This is the definition; `sparse_attention` never builds it for a long sequence.
        """
        i = mx.arange(keys_length - length, keys_length)[:, None]
        j = mx.arange(keys_length if first is None else first)[None]
        return mx.stack([self._visible(i, j, head) for head in range(heads)])

    def _visible(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        near, far = self.steps(head)
        seen = i == j
        if near:
            seen = seen | self._near(i, j)
        if far:
            seen = seen | self._far(i, j, head)
        return seen & (j <= i)

    def near_mask(self, heads: list[int]) -> mx.array:
        """What a row's queries see of the `near_rows` rows that end with it: bool [1 or h, 1, l, l · near_rows]."""
        end = self.stride * self.near_rows
        i, j = mx.arange(end - self.stride, end)[:, None], mx.arange(end)[None]
        alike = all(self.steps(head) == (True, False) for head in heads) or self.combine == "merged"
        seen = [self._visible(i, j, head) & self._near(i, j) for head in (heads[:1] if alike else heads)]
        return mx.stack(seen)[:, None]

    @property
    @abstractmethod
    def columns(self) -> int:
        """How many columns of an earlier row a query sees."""

    def first_column(self, head: int) -> int:
        """The first of the columns that a head sees, if it is the same for all queries."""
        return 0

    @property
    @abstractmethod
    def near_rows(self) -> int:
        """How many rows the near keys of one row's queries lie in."""

    @property
    def gap(self) -> int:
        """How many rows before its own no query's far keys lie in."""
        return 0

    @abstractmethod
    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        """Is key j ≤ i in the near set of query i?"""

    @abstractmethod
    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        """Is key j ≤ i in the far set of query i?"""

    @abstractmethod
    def near_keys(self, keys: mx.array) -> mx.array:
        """[B, h, M, l, D] -> [B, h, M, l · near_rows, D]: the rows that each row's queries see, zeros for row -1."""

    @abstractmethod
    def far_queries(self, queries: mx.array) -> mx.array:
        """[B, h, R, l, D] -> [B, h, lanes, R · queries per row, D]: queries of one lane share their far keys."""

    @abstractmethod
    def far_keys(self, keys: mx.array, heads: list[int], owners: list[int]) -> mx.array:
        """[B, K, M, l, D] -> [B, h, lanes, M · keys per row, D]; owners: the KV head of each of `heads`."""

    @abstractmethod
    def far_result(self, x: mx.array) -> mx.array:
        """[B, h, lanes, R · queries per row, ...] -> [B, h, R, l, ...], the inverse of `far_queries`."""


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` positions, and every `stride`-th before them (section 4.3, figure 3b)."""

    kernel_steps = ("WINDOW", "LANES")

    @classmethod
    def balanced(cls, length: int) -> Self:
        """The stride at which both parts cost the same: the power of two below √length."""
        return cls(_power_of_two(length**0.5))

    @property
    def columns(self) -> int:
        return 1

    @property
    def near_rows(self) -> int:
        return 2

    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        return i - j < self.stride

    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        return (i - j) % self.stride == 0

    def near_keys(self, keys: mx.array) -> mx.array:
        return _with_row_before(keys)

    def far_queries(self, queries: mx.array) -> mx.array:
        return queries.swapaxes(2, 3)

    def far_keys(self, keys: mx.array, heads: list[int], owners: list[int]) -> mx.array:
        return take_heads(keys.swapaxes(2, 3), owners)

    def far_result(self, x: mx.array) -> mx.array:
        return x.swapaxes(2, 3)


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block of `stride` positions, and `summary` columns of every earlier one (section 4.3, figure 3c).

    Different heads read different columns, as the paper advises: the last `summary` of a block, those before them, ….
    With a stride of the whole length it is dense causal attention.

    overlap: whether a query also sees the whole block before its own. Not in the paper, whose networks are trained
    with the pattern: one trained with dense attention needs the tokens just before a block's edge.
    """

    summary: int = 8
    overlap: bool = False

    kernel_steps = ("BLOCKS",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.summary <= self.stride:
            raise NectarError(f"summary is {self.summary}: it must lie between 1 and the stride, {self.stride}")

    @classmethod
    def balanced(cls, length: int, *, summary: int = 8, overlap: bool = False) -> Self:
        """The stride at which both parts cost the same: the power of two below √(summary · length / 2)."""
        return cls(max(summary, _power_of_two((summary * length / 2) ** 0.5)), summary=summary, overlap=overlap)

    @property
    def columns(self) -> int:
        return self.summary

    @property
    def near_rows(self) -> int:
        return 1 + self.gap

    @property
    def gap(self) -> int:
        return int(self.overlap)

    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        return i // self.stride - j // self.stride <= self.gap

    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        first, column = self.first_column(head), j % self.stride
        return (column >= first) & (column < first + self.summary)

    def first_column(self, head: int) -> int:
        return self.stride - self.summary * (self._group(head) + 1)

    def _group(self, head: int) -> int:
        """Which `summary` columns a head reads, counted from the end of the block."""
        return (head // 2 if self.combine == "heads" else head) % (self.stride // self.summary)

    def near_keys(self, keys: mx.array) -> mx.array:
        return _with_row_before(keys) if self.overlap else keys

    def far_queries(self, queries: mx.array) -> mx.array:
        return queries.flatten(2, 3)[:, :, None]

    def far_keys(self, keys: mx.array, heads: list[int], owners: list[int]) -> mx.array:
        choices = self.stride // self.summary
        columns = mx.unflatten(keys[:, :, :, self.stride - choices * self.summary :], 3, (choices, self.summary))
        columns = columns.transpose(0, 1, 3, 2, 4, 5).flatten(1, 2)
        choice = [(n + 1) * choices - 1 - self._group(head) for n, head in zip(owners, heads, strict=True)]
        return columns[:, mx.array(choice)].flatten(2, 3)[:, :, None]

    def far_result(self, x: mx.array) -> mx.array:
        return mx.unflatten(x[:, :, 0], 2, (-1, self.stride))


def take_heads(x: mx.array, heads: list[int]) -> mx.array:
    """Those heads of [B, K, ...], one after another; a head may come more than once."""
    return x if heads == list(range(x.shape[1])) else x[:, mx.array(heads)]


def _with_row_before(keys: mx.array) -> mx.array:
    """[B, h, M, l, D] -> [B, h, M, 2 l, D]: each row behind the one before it, zeros before the first."""
    before = mx.pad(keys[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)])
    return mx.concatenate([before, keys], axis=3)


def _power_of_two(x: float) -> int:
    """The largest power of two that is at most x, and at least 1."""
    return 1 << max(0, int(x).bit_length() - 1)
