"""Attention under the patterns of Sparse Transformers, at a cost of n·√n (Child et al., arXiv 1904.10509, section 4).

A pattern (patterns.py) shows each query two disjoint sets of keys; they merge exactly (attention.py). Both are dense
in a grid of `stride` columns: near is attention inside rows, far is attention between rows. No key is gathered singly,
and no array of size [n, n] exists in either pass.

Shapes as in attention.py; h = the heads computed together, R = rows with queries, M = all rows, l = stride.
"""

from functools import partial

import mlx.core as mx

from ..core.attention import Partial, in_float32, join, merge
from ..core.device import device
from . import kernel
from .blocks import Chunk, blockwise
from .patterns import Pattern, take_heads


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
        queries, keys, values = in_float32(queries, keys, values)
    owners = [head * K // H for head in range(H)]
    scores = B * H * T * S
    if pattern.stride > T and scores <= device().max_scores:  # decoding: a grid would be padding for the most part
        mask = pattern.mask(T, S, heads=H)
        keys, values = take_heads(keys, owners), take_heads(values, owners)
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
        far = [pattern.far_keys(x, heads, owners) for x in (k, v)]
        part = merge(part, _far_part(q, *far, pattern=pattern, scale=scale, first=first))
    return Partial(*(x.flatten(2, 3)[:, :, skipped : skipped + T] for x in part))


def _near_keys(x: mx.array, first: int, pattern: Pattern, owners: list[int]) -> mx.array:
    """What each row from `first` on sees nearby, [B, K, M, l, D] -> [B, h, R, l or 2 l, D]."""
    before = min(first, pattern.near_rows - 1)
    return take_heads(pattern.near_keys(x[:, :, first - before :])[:, :, before:], owners)


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
    mask = pattern.near_mask(heads)
    chunks = []
    if first == 0:  # before row 0 there is only padding
        own = mask & _exists(k.shape[3], stride)
        chunks.append(Chunk(slice(1), slice(1), lambda: own))
    step = max(1, device().max_scores // (B * h * stride * k.shape[3]))
    for start in range(len(chunks), R, step):
        rows = slice(start, min(R, start + step))
        chunks.append(Chunk(rows, rows, lambda: mask))
    return blockwise(queries, k, v, scale=scale, axis=2, chunks=chunks)


def _far_part(queries: mx.array, k: mx.array, v: mx.array, *, pattern: Pattern, scale: float, first: int) -> Partial:
    """Attention of the rows from `first` on to the far keys of earlier ones, as `Pattern.far_keys` lays them out.

    Where there are none the log-normaliser is about `EMPTY`.
    """
    B, h, R, stride, _ = queries.shape
    M, gap = first + R, pattern.gap
    q = pattern.far_queries(queries)
    per_query_row, per_key_row = q.shape[3] // R, k.shape[3] // M
    chunks, start = [], M - R
    while start < M:
        stop = start + 1
        while stop < M and B * h * stride * (stop + 1 - start) * stop * per_key_row <= device().max_scores:
            stop += 1
        rows = slice((start - M + R) * per_query_row, (stop - M + R) * per_query_row)
        seen = max(1, stop - 1 - gap)
        mask = partial(_earlier_rows, start - gap, stop - gap, seen, per_query_row, per_key_row)
        chunks.append(Chunk(rows, slice(seen * per_key_row), mask))
        start = stop
    return Partial(*(pattern.far_result(x) for x in blockwise(q, k, v, scale=scale, axis=3, chunks=chunks)))


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
