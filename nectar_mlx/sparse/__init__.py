"""Attention under the patterns of Sparse Transformers, at a cost of n·√n (Child et al., arXiv 1904.10509, section 4).

A pattern (patterns.py) shows each query two disjoint sets of keys; they merge exactly (attention.py). Both are dense
in a grid of `stride` columns: near is attention inside rows, far is attention between rows. No key is gathered singly,
and no array of size [n, n] exists in either pass.

Shapes as in attention.py; h = the heads computed together, R = rows with queries, M = all rows, l = stride.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from ..core.attention import Partial, merge
from . import kernel
from .blocks import Chunk, blockwise, join, room
from .patterns import Combine, Fixed, Pattern, Strided, take_heads

__all__ = ["Combine", "Fixed", "Pattern", "Strided", "benchmark", "sparse_attention"]


def sparse_attention(queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float) -> Partial:
    """Causal attention of queries [B, H, T, D] over the keys and values [B, K, S, D] that `pattern` lets them see.

    The queries are the last T of the S positions. Exact: equal to dense attention under `pattern.mask(T, S, heads=H)`.
    About T · √S scores, a bounded number of them at a time. Differentiable; the reverse pass computes the scores again.

    On a GPU, in half precision and for the usual head sizes, by kernels of our own (kernel.py), many times faster. The
    output is float32 everywhere.

    Raises ValueError if T is 0 or exceeds S, or if H is not a multiple of K.
    """
    (H, T), (K, S) = queries.shape[1:3], keys.shape[1:3]
    if not 0 < T <= S or H % K:
        raise ValueError(f"queries {queries.shape} do not fit keys {keys.shape}")
    plain = partial(_plain, pattern=pattern, scale=scale)
    supported = kernel.supports(queries, keys, values)
    if supported and kernel.works(queries, pattern=pattern, scale=scale, backwards=False):
        return kernel.attention(queries, keys, values, pattern=pattern, scale=scale, plain=plain)
    return plain(queries, keys, values)


def _plain(queries: mx.array, keys: mx.array, values: mx.array, *, pattern: Pattern, scale: float) -> Partial:
    """`sparse_attention` by plain operations."""
    B, H, T, _ = queries.shape
    K, S = keys.shape[1], keys.shape[2]
    if mx.default_device() == mx.cpu:  # the CPU multiplies half precision element by element
        queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    owners = [head * K // H for head in range(H)]
    scores = B * H * T * S
    if pattern.stride > T and scores <= room():  # decoding: a grid would be padding for the most part
        mask = pattern.mask(T, S, heads=H)
        keys, values = (take_heads(x, owners) for x in (keys, values))
        return blockwise(queries, keys, values, scale=scale, axis=2, chunks=[Chunk(slice(T), slice(S), lambda: mask)])
    if pattern.combine != "heads":
        return _on_grid(queries, keys, values, pattern=pattern, scale=scale, heads=list(range(H)), owners=owners)
    groups = [heads for heads in (list(range(0, H, 2)), list(range(1, H, 2))) if heads]
    parts = []
    for heads in groups:
        of = [owners[head] for head in heads]
        q = take_heads(queries, heads)
        parts.append(_on_grid(q, keys, values, pattern=pattern, scale=scale, heads=heads, owners=of))
    order = mx.array([head // 2 + (head % 2) * len(groups[0]) for head in range(H)])
    return Partial(*(x[:, order] for x in join(parts, axis=1)))


def _on_grid(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    pattern: Pattern,
    scale: float,
    heads: list[int],
    owners: list[int],
) -> Partial:
    """`sparse_attention` where `heads` are the only ones, and take the same steps; owners: the KV head of each."""
    T, S, stride = queries.shape[2], keys.shape[2], pattern.stride
    first = (S - T) // stride  # the row of the first query
    skipped = S - T - first * stride  # places in it before that query
    q, k, v = _rows(queries, skipped, stride), _rows(keys, 0, stride), _rows(values, 0, stride)
    near = [_near_keys(x, first, pattern, owners) for x in (k, v)]
    part = _near_part(q, *near, pattern=pattern, scale=scale, heads=heads, first=first)
    if pattern.steps(heads[0])[1] and stride < S:
        far = [pattern._far_keys(x, heads, owners) for x in (k, v)]
        part = merge(part, _far_part(q, *far, pattern=pattern, scale=scale, first=first))
    return Partial(*(x.flatten(2, 3)[:, :, skipped : skipped + T] for x in part))


def _near_keys(x: mx.array, first: int, pattern: Pattern, owners: list[int]) -> mx.array:
    """What each row from `first` on sees nearby, [B, K, M, l, D] -> [B, h, R, l or 2 l, D]."""
    before = min(first, pattern._near_rows - 1)
    return take_heads(pattern._near_keys(x[:, :, first - before :])[:, :, before:], owners)


def _near_part(
    queries: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    pattern: Pattern,
    scale: float,
    heads: list[int],
    first: int,
) -> Partial:
    """Attention of the rows from `first` on, [B, h, R, l, D], to their near keys -> [B, h, R, l, ...]."""
    B, h, R, stride, _ = queries.shape
    mask = pattern._near_mask(heads)
    chunks = []
    if first == 0:  # before row 0 there is only padding
        own = mask & _exists(k.shape[3], stride)
        chunks.append(Chunk(slice(1), slice(1), lambda: own))
    step = max(1, room() // (B * h * stride * k.shape[3]))
    for start in range(len(chunks), R, step):
        rows = slice(start, min(R, start + step))
        chunks.append(Chunk(rows, rows, lambda: mask))
    return blockwise(queries, k, v, scale=scale, axis=2, chunks=chunks)


def _far_part(queries: mx.array, k: mx.array, v: mx.array, *, pattern: Pattern, scale: float, first: int) -> Partial:
    """Attention of the rows from `first` on to the far keys of earlier ones, as `Pattern._far_keys` lays them out.

    Where there are none the log-normaliser is about -1e30.
    """
    B, h, R, stride, _ = queries.shape
    M, gap = first + R, pattern._gap
    q = pattern._far_queries(queries)
    per_query_row, per_key_row = q.shape[3] // R, k.shape[3] // M
    chunks, start = [], M - R
    while start < M:
        stop = start + 1
        while stop < M and B * h * stride * (stop + 1 - start) * stop * per_key_row <= room():
            stop += 1
        rows = slice((start - M + R) * per_query_row, (stop - M + R) * per_query_row)
        seen = max(1, stop - 1 - gap)
        mask = partial(_earlier_rows, start - gap, stop - gap, seen, per_query_row, per_key_row)
        chunks.append(Chunk(rows, slice(seen * per_key_row), mask))
        start = stop
    return Partial(*(pattern._far_result(x) for x in blockwise(q, k, v, scale=scale, axis=3, chunks=chunks)))


def _earlier_rows(start: int, stop: int, seen: int, per_query_row: int, per_key_row: int) -> mx.array | None:
    """Which keys of rows 0 … seen - 1 lie before the queries' rows start … stop - 1; None if all do."""
    if stop - start == 1 and start > 0:
        return None
    query_rows = start + mx.arange((stop - start) * per_query_row) // per_query_row
    return query_rows[:, None] > mx.arange(seen * per_key_row) // per_key_row


def _exists(keys: int, stride: int) -> mx.array:
    """Which of the near keys of row 0 are not padding before it."""
    return mx.arange(keys) >= keys - stride


def _rows(x: mx.array, before: int, stride: int) -> mx.array:
    """[B, h, T, D] -> [B, h, rows, stride, D], zeros put before and after it to fill the rows."""
    after = -(before + x.shape[2]) % stride
    if before or after:
        x = mx.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)])
    return mx.unflatten(x, 2, (-1, stride))


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
