"""Sparse Transformers: exact causal attention over about √n keys a query (Child et al., arXiv 1904.10509, section 4).

Write positions 0, 1, 2, … row by row into a grid of `stride` columns. A query sees two sets of keys:

              near                                far
    Strided   the last `stride` positions         its own column in earlier rows
    Fixed     its own row, up to itself           `summary` columns of every earlier row

With a stride of about √n either set has about √n keys, and two such steps connect every pair of positions. Strided
suits data with a period (images), Fixed suits text: what the summary columns hold, every later token can read.

The sets are disjoint, so the two parts merge exactly (attention.py). Both are dense in the grid: near is attention
inside rows, far is attention between rows. No key is gathered singly, no array of size [n, n] exists in either pass.

Shapes as in attention.py; h = the heads computed together, R = rows with queries, M = all rows, l = stride.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import mlx.core as mx

from .attention import Partial, merge
from .blockwise import Chunk, blockwise, join, room
from .errors import NectarError

Combine = Literal["merged", "interleaved", "heads"]

_FUSED_ROOM = (
    1 << 29
)  # scores of one call of the fused kernel, which holds few of them; bounds the keys gathered for it
_HIDDEN = -6e4  # added to the scores of hidden keys; the most that float16 holds


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

    def mask(self, length: int, keys_length: int, *, heads: int = 1) -> mx.array:
        """What the last T = `length` of S = `keys_length` positions see: bool [heads, T, S].

        This is the definition; `sparse_attention` never builds it for a long sequence.
        """
        i = mx.arange(keys_length - length, keys_length)[:, None]
        return mx.stack([self._visible(i, mx.arange(keys_length)[None], head) for head in range(heads)])

    def _visible(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        near, far = self.steps(head)
        seen = i == j
        if near:
            seen = seen | self._near(i, j)
        if far:
            seen = seen | self._far(i, j, head)
        return seen & (j <= i)

    def _near_mask(self, heads: list[int]) -> mx.array:
        """What a row's queries see of the `_near_rows` rows that end with it: bool [1 or h, 1, l, l · _near_rows]."""
        end = self.stride * self._near_rows
        i, j = mx.arange(end - self.stride, end)[:, None], mx.arange(end)[None]
        alike = all(self.steps(head) == (True, False) for head in heads) or self.combine == "merged"
        seen = [self._visible(i, j, head) & self._near(i, j) for head in (heads[:1] if alike else heads)]
        return mx.stack(seen)[:, None]

    @property
    @abstractmethod
    def _near_rows(self) -> int:
        """How many rows the near keys of one row's queries lie in."""

    @abstractmethod
    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        """Is key j ≤ i in the near set of query i?"""

    @abstractmethod
    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        """Is key j ≤ i in the far set of query i?"""

    @abstractmethod
    def _near_keys(self, keys: mx.array) -> mx.array:
        """[B, h, M, l, D] -> [B, h, M, l · _near_rows, D]: the rows that each row's queries see, zeros for row -1."""

    @abstractmethod
    def _far_queries(self, queries: mx.array) -> mx.array:
        """[B, h, R, l, D] -> [B, h, lanes, R · queries per row, D]: queries of one lane share their far keys."""

    @abstractmethod
    def _far_keys(self, keys: mx.array, heads: list[int]) -> mx.array:
        """[B, h, M, l, D] -> [B, h, lanes, M · keys per row, D]."""

    @abstractmethod
    def _far_result(self, x: mx.array) -> mx.array:
        """[B, h, lanes, R · queries per row, ...] -> [B, h, R, l, ...], the inverse of `_far_queries`."""


@dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` positions, and every `stride`-th before them (section 4.3, figure 3b)."""

    @classmethod
    def balanced(cls, length: int) -> Self:
        """The stride at which both parts cost the same: the power of two below √length."""
        return cls(_power_of_two(length**0.5))

    @property
    def _near_rows(self) -> int:
        return 2

    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        return i - j < self.stride

    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        return (i - j) % self.stride == 0

    def _near_keys(self, keys: mx.array) -> mx.array:
        before = mx.pad(keys[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)])
        return mx.concatenate([before, keys], axis=3)

    def _far_queries(self, queries: mx.array) -> mx.array:
        return queries.swapaxes(2, 3)

    def _far_keys(self, keys: mx.array, heads: list[int]) -> mx.array:
        return keys.swapaxes(2, 3)

    def _far_result(self, x: mx.array) -> mx.array:
        return x.swapaxes(2, 3)


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block of `stride` positions, and `summary` columns of every earlier one (section 4.3, figure 3c).

    Different heads read different columns, as the paper advises: the last `summary` of a block, those before them, ….
    With a stride of the whole length it is dense causal attention.
    """

    summary: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.summary <= self.stride:
            raise NectarError(f"summary is {self.summary}: it must lie between 1 and the stride, {self.stride}")

    @classmethod
    def balanced(cls, length: int, *, summary: int = 8) -> Self:
        """The stride at which both parts cost the same: the power of two below √(summary · length / 2)."""
        return cls(max(summary, _power_of_two((summary * length / 2) ** 0.5)), summary=summary)

    @property
    def _near_rows(self) -> int:
        return 1

    def _near(self, i: mx.array, j: mx.array) -> mx.array:
        return i // self.stride == j // self.stride

    def _far(self, i: mx.array, j: mx.array, head: int) -> mx.array:
        end = self.stride - self.summary * self._columns(head)
        column = j % self.stride
        return (column >= end - self.summary) & (column < end)

    def _columns(self, head: int) -> int:
        """Which `summary` columns a head reads, counted from the end of the block."""
        return (head // 2 if self.combine == "heads" else head) % (self.stride // self.summary)

    def _near_keys(self, keys: mx.array) -> mx.array:
        return keys

    def _far_queries(self, queries: mx.array) -> mx.array:
        return queries.flatten(2, 3)[:, :, None]

    def _far_keys(self, keys: mx.array, heads: list[int]) -> mx.array:
        choices = self.stride // self.summary
        columns = mx.unflatten(keys[:, :, :, self.stride - choices * self.summary :], 3, (choices, self.summary))
        columns = columns.transpose(0, 1, 3, 2, 4, 5).flatten(1, 2)
        choice = [(n + 1) * choices - 1 - self._columns(head) for n, head in enumerate(heads)]
        return columns[:, mx.array(choice)].flatten(2, 3)[:, :, None]

    def _far_result(self, x: mx.array) -> mx.array:
        return mx.unflatten(x[:, :, 0], 2, (-1, self.stride))


def sparse_attention(queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float) -> Partial:
    """Causal attention of queries [B, H, T, D] over the keys and values [B, K, S, D] that `pattern` lets them see.

    The queries are the last T of the S positions. Exact: equal to dense attention under `pattern.mask(T, S, heads=H)`.
    About T · √S scores, a bounded number of them at a time. Differentiable; the reverse pass computes the scores again.

    On a GPU in half precision the output of the fixed pattern comes from MLX's fused kernel, many times faster. That
    returns no log-normaliser: it is a separate pass, and like all of MLX not run unless something needs it.
    """
    B, H, T, _ = queries.shape
    K, S = keys.shape[1], keys.shape[2]
    if mx.default_device() == mx.cpu:  # the CPU multiplies half precision element by element
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    keys, values = (_take_heads(x, [head * K // H for head in range(H)]) for x in (keys, values))
    scores = B * H * T * S
    if pattern.stride > T and scores <= room():  # decoding: a grid would be padding for the most part
        mask = pattern.mask(T, S, heads=H)
        return blockwise(queries, keys, values, scale=scale, axis=2, chunks=[Chunk(slice(T), slice(S), lambda: mask)])
    if pattern.combine != "heads":
        return _on_grid(queries, keys, values, pattern=pattern, scale=scale, heads=list(range(H)))
    groups = [heads for heads in (list(range(0, H, 2)), list(range(1, H, 2))) if heads]
    parts = [
        _on_grid(*(_take_heads(x, heads) for x in (queries, keys, values)), pattern=pattern, scale=scale, heads=heads)
        for heads in groups
    ]
    order = mx.array([head // 2 + (head % 2) * len(groups[0]) for head in range(H)])
    return Partial(*(x[:, order] for x in join(parts, axis=1)))


def _on_grid(
    queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float, heads: list[int]
) -> Partial:
    """`sparse_attention` where `heads` are the only ones, and take the same steps; keys and values [B, h, S, D]."""
    T, S, stride = queries.shape[2], keys.shape[2], pattern.stride
    first = (S - T) // stride  # the row of the first query
    skipped = S - T - first * stride  # places in it before that query
    q, k, v = _rows(queries, skipped, stride), _rows(keys, 0, stride), _rows(values, 0, stride)
    part = _near_part(q, k, v, pattern=pattern, scale=scale, heads=heads)
    if pattern.steps(heads[0])[1] and stride < S:
        part = merge(part, _far_part(q, k, v, pattern=pattern, scale=scale, heads=heads))
    if isinstance(pattern, Fixed) and pattern.steps(heads[0])[0] and queries.dtype != mx.float32:
        part = part._replace(output=_fused_output(q, k, v, pattern=pattern, scale=scale, heads=heads))
    return Partial(*(x.flatten(2, 3)[:, :, skipped : skipped + T] for x in part))


def _near_part(
    queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float, heads: list[int]
) -> Partial:
    """Attention inside rows: queries [B, h, R, l, D], keys and values [B, h, M, l, D] -> [B, h, R, l, ...].

    The queries' rows are the last R of the M.
    """
    B, h, R, stride, _ = queries.shape
    first = keys.shape[2] - R
    k, v = (pattern._near_keys(x)[:, :, first:] for x in (keys, values))
    mask = pattern._near_mask(heads)
    chunks = []
    if first == 0:  # before row 0 there is only padding
        own = mask & (mx.arange(k.shape[3]) >= k.shape[3] - stride)
        chunks.append(Chunk(slice(1), slice(1), lambda: own))
    step = max(1, room() // (B * h * stride * k.shape[3]))
    for start in range(len(chunks), R, step):
        rows = slice(start, min(R, start + step))
        chunks.append(Chunk(rows, rows, lambda: mask))
    return blockwise(queries, k, v, scale=scale, axis=2, chunks=chunks)


def _far_part(
    queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float, heads: list[int]
) -> Partial:
    """Attention to earlier rows; shapes as in `_near_part`. Queries of row 0 get a log-normaliser of about -1e30."""
    B, h, R, stride, _ = queries.shape
    M = keys.shape[2]
    q, k, v = pattern._far_queries(queries), pattern._far_keys(keys, heads), pattern._far_keys(values, heads)
    per_query_row, per_key_row = q.shape[3] // R, k.shape[3] // M
    chunks, start = [], M - R
    while start < M:
        stop = start + 1
        while stop < M and B * h * stride * (stop + 1 - start) * stop * per_key_row <= room():
            stop += 1
        rows = slice((start - M + R) * per_query_row, (stop - M + R) * per_query_row)
        mask = partial(_earlier_rows, start, stop, per_query_row, per_key_row)
        chunks.append(Chunk(rows, slice(max(1, stop - 1) * per_key_row), mask))
        start = stop
    return Partial(*(pattern._far_result(x) for x in blockwise(q, k, v, scale=scale, axis=3, chunks=chunks)))


def _fused_output(
    queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Fixed, scale: float, heads: list[int]
) -> mx.array:
    """The output alone, by MLX's fused attention; shapes as in `_near_part`, for heads that take the near step.

    Rows are the batch: each sees the summary columns before it and itself, under a mask that hides later columns.
    """
    B, h, R, stride, _ = queries.shape
    M = keys.shape[2]
    columns = [pattern._far_keys(x, heads)[:, :, 0] for x in (keys, values)]
    per_row = pattern.summary if pattern.steps(heads[0])[1] else 0
    step = max(1, min(-(-R // 8), _FUSED_ROOM // (B * h * stride * (M * per_row + stride))))
    outputs = []
    for start in range(M - R, M, step):
        stop = min(M, start + step)
        own = [x[:, :, start - M : stop - M or None] for x in (queries, keys, values)]
        seen = [x[:, :, : (stop - 1) * per_row] for x in columns]
        attend = mx.checkpoint(partial(_fused_rows, start=start, summary=per_row, scale=scale))
        outputs.append(attend(*own, *seen))
    return mx.concatenate(outputs, axis=2).astype(mx.float32)


def _fused_rows(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    far_keys: mx.array,
    far_values: mx.array,
    *,
    start: int,
    summary: int,
    scale: float,
) -> mx.array:
    """Rows [B, h, R, l, D] from row `start` on, and the summary columns [B, h, N, D] before the last of them."""
    B, h, R, stride, D = queries.shape
    N = far_keys.shape[2]

    def by_row(x: mx.array) -> mx.array:
        return x.swapaxes(1, 2).flatten(0, 1)

    def with_far(x: mx.array, far: mx.array) -> mx.array:
        return (
            by_row(mx.concatenate([mx.broadcast_to(far[:, :, None], (B, h, R, N, D)), x], axis=3)) if N else by_row(x)
        )

    mask: mx.array | str = "causal"
    if N:
        later = mx.arange(start, start + R)[:, None, None] <= mx.arange(N) // summary
        own = mx.arange(stride)[:, None] < mx.arange(stride)
        hidden = [mx.broadcast_to(x, (R, stride, x.shape[-1])) for x in (later, own)]
        bias = mx.where(mx.concatenate(hidden, axis=2), _HIDDEN, 0).astype(queries.dtype)
        mask = mx.tile(bias[:, None], (B, 1, 1, 1))
    output = mx.fast.scaled_dot_product_attention(
        by_row(queries), with_far(keys, far_keys), with_far(values, far_values), scale=scale, mask=mask
    )
    return mx.unflatten(output, 0, (B, R)).swapaxes(1, 2)


def _earlier_rows(start: int, stop: int, per_query_row: int, per_key_row: int) -> mx.array | None:
    """Which keys of rows 0 … stop - 2 lie in earlier rows than the queries of rows start … stop - 1; None if all do."""
    if stop - start == 1 and start > 0:
        return None
    query_rows = mx.arange(start * per_query_row, stop * per_query_row) // per_query_row
    return query_rows[:, None] > mx.arange(max(1, stop - 1) * per_key_row) // per_key_row


def _rows(x: mx.array, before: int, stride: int) -> mx.array:
    """[B, h, T, D] -> [B, h, rows, stride, D], zeros put before and after it to fill the rows."""
    after = -(before + x.shape[2]) % stride
    if before or after:
        x = mx.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)])
    return mx.unflatten(x, 2, (-1, stride))


def _take_heads(x: mx.array, heads: list[int]) -> mx.array:
    """Those heads of [B, K, ...], one after another; a head may come more than once."""
    return x if heads == list(range(x.shape[1])) else x[:, mx.array(heads)]


def _power_of_two(x: float) -> int:
    """The largest power of two that is at most x, and at least 1."""
    return 1 << max(0, int(x).bit_length() - 1)


def benchmark(
    lengths: Sequence[int],
    *,
    heads: int = 16,
    n_kv_heads: int = 16,
    head_dim: int = 64,
    dtype: mx.Dtype = mx.bfloat16,
    dense: bool = True,
    repeats: int = 5,
) -> list[dict[str, float | int | str]]:
    """Time and memory of one causal prefill: ours, with balanced strides, beside MLX's fused dense attention.

    One row per length and kind: {"kind", "length", "stride", "seconds", "peak_bytes"}; the fastest of `repeats`, and
    the memory above the inputs. Only the output is asked for, except where the kind says (o, L).
    """
    rows: list[dict[str, float | int | str]] = []
    for length in lengths:
        shapes = [(1, h, length, head_dim) for h in (heads, n_kv_heads, n_kv_heads)]
        inputs = [mx.random.normal(shape).astype(dtype) for shape in shapes]
        fixed, strided = Fixed.balanced(length), Strided.balanced(length)
        kinds: dict[str, Pattern | None] = {"fixed": fixed, "strided": strided, "fixed (o, L)": fixed}
        for kind, pattern in (({"dense": None} if dense else {}) | kinds).items():
            seconds, peak = _measure(partial(_prefill, *inputs, pattern=pattern, both=kind.endswith("(o, L)")), repeats)
            stride = pattern.stride if pattern else 1
            rows.append({"kind": kind, "length": length, "stride": stride, "seconds": seconds, "peak_bytes": peak})
    return rows


def _prefill(
    queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern | None, both: bool
) -> mx.array | Partial:
    scale = queries.shape[-1] ** -0.5
    if pattern is None:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")
    part = sparse_attention(queries, keys, values, pattern=pattern, scale=scale)
    return part if both else part.output


def _measure(run: Callable[[], mx.array | Partial], repeats: int) -> tuple[float, int]:
    mx.eval(run())  # makes the inputs, compiles kernels
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, best = mx.get_active_memory(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        best = min(best, time.perf_counter() - start)
    return best, mx.get_peak_memory() - before
