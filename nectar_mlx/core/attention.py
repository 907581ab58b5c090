"""Partial attention: the algebra the whole library stands on.

Softmax attention of a query over a set of tokens is a pair (o, L): the output o = Σ softmax(s)_j v_j and the log-
normalizer L = log Σ e^{s_j}, s_j = scale · q·k_j + b_j. Two disjoint sets merge exactly:

    L = logaddexp(L1, L2),   o = e^{L1-L} o1 + e^{L2-L} o2

so anything that maps queries to such pairs can stand for a part of the context. Everything here is plain `mx`,
accumulates in float32 and is the oracle that faster paths are tested against.

Keys may stand relative to an offset c of their KV head: k - c for k. Every score then lacks scale · q·c, and so does L;
the output is the same, and sets that share the offset merge as before. Models whose keys have much in common have
scores of thousands that differ by a few: relative to the mean key they are small, and so are their rounding errors.

Shapes: B sequences, H query heads, K = n_kv_heads, G = H / K query heads per KV head, T query tokens, S keys, D
head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from .device import device
from .exp import exp, exp_of_scores, sigmoid
from .gradients import Arrays, with_vjp

EMPTY = -1e30  # the log-normalizer of an empty set, and the score of a hidden key: finite, so that no NaN comes of it


class Partial(NamedTuple):
    """Attention over one set of tokens: `output` [..., D] and `log_normalizer` [...], both float32."""

    output: mx.array
    log_normalizer: mx.array


def in_float32(*arrays: mx.array) -> list[mx.array]:
    return [x.astype(mx.float32) for x in arrays]


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the union of two disjoint sets of tokens; shapes as in the parts."""
    gate = sigmoid(first.log_normalizer - second.log_normalizer)[..., None]
    output = second.output + gate * (first.output - second.output)
    return Partial(output, mx.logaddexp(first.log_normalizer, second.log_normalizer))


def join(parts: Sequence[Partial], *, axis: int) -> Partial:
    """Parts for different queries, one after the other along `axis`."""
    outputs, log_normalizers = [part.output for part in parts], [part.log_normalizer for part in parts]
    return Partial(mx.concatenate(outputs, axis=axis), mx.concatenate(log_normalizers, axis=axis))


def group(x: mx.array, n_kv_heads: int) -> mx.array:
    """[B, H, T, ...] -> [K, B·G·T, ...]: all queries that one KV head answers, side by side."""
    B, H, T = x.shape[:3]
    x = x.reshape(B, n_kv_heads, H // n_kv_heads, T, *x.shape[3:])
    return x.swapaxes(0, 1).reshape(n_kv_heads, -1, *x.shape[4:])


def ungroup(x: mx.array, batch: int, length: int) -> mx.array:
    """[K, B·G·T, ...] -> [B, H, T, ...], the inverse of `group`."""
    x = x.reshape(x.shape[0], batch, -1, length, *x.shape[2:])
    return x.swapaxes(0, 1).reshape(batch, -1, length, *x.shape[4:])


def weighted(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, bias: mx.array | None = None
) -> Partial:
    """Attention of queries [M, N, D] over keys and values [M, S, D], with an additive score bias [M, S].

    With real keys and no bias this is exact attention; with fitted keys, values and biases it is a quadrature of it.
    Differentiable in all arrays (the reverse pass reuses the forward pass's probabilities).
    """
    queries, keys, values = in_float32(queries, keys, values)
    scores = (queries * scale) @ keys.swapaxes(1, 2)
    if bias is not None:
        scores = scores + bias.astype(mx.float32)[:, None]
    return Partial(*_attend(scores, values)[:2])


def from_scores(scores: mx.array, values: mx.array) -> Partial:
    """Attention by given scores [M, N, S] over values [M, S, D], or over each query's own, [M, N, S, D]."""
    top = mx.stop_gradient(scores.max(-1, keepdims=True))
    weights = exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    values = values.astype(mx.float32)
    output = weights @ values if values.ndim == scores.ndim else (weights[..., None, :] @ values)[..., 0, :]
    return Partial(output / total, (top + mx.log(total))[..., 0])


def _attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, values = primals
    d_output, d_log, *_ = cotangents
    output, _, weights, total = outputs
    probabilities = weights / total
    constant = d_log - (d_output * output).sum(-1)
    d_scores = probabilities * (d_output @ values.swapaxes(-1, -2) + constant[..., None])
    return d_scores, probabilities.swapaxes(-1, -2) @ d_output


@with_vjp(_attend_vjp)
def _attend(scores: mx.array, values: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """By scores [..., N, S], which may be overwritten, over values [..., S, D], both float32: output, log-normalizer,
    and for the reverse pass weights and their sums (all of it is computed, whatever is used)."""
    weights, top, total = exp_of_scores(scores)
    return (weights @ values) / total, (top + mx.log(total))[..., 0], weights, total


def exact(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, bias: mx.array | None = None
) -> Partial:
    """`weighted` for queries [K, N, D] over shared keys and values [K, S, D], chunked over N to bound memory."""
    step = max(1, device().max_scores // (keys.shape[0] * keys.shape[1]))
    if step >= queries.shape[1]:
        return weighted(queries, keys, values, scale=scale, bias=bias)
    parts = []
    for start in range(0, queries.shape[1], step):
        parts.append(weighted(queries[:, start : start + step], keys, values, scale=scale, bias=bias))
        mx.eval(parts[-1])
    return join(parts, axis=1)


def common_score(queries: mx.array, offset: mx.array, *, scale: float) -> mx.array:
    """What scores lack relative to an offset [K, D], or [B, K, D]: scale · q·c of queries [B, H, T, D] -> [B, H, T],
    float32."""
    B, H, T, D = queries.shape
    K = offset.shape[-2]
    grouped = queries.astype(mx.float32).reshape(B, K, -1, D)
    return (scale * (grouped @ offset.astype(mx.float32)[..., None])).reshape(B, H, T)


def causal(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = "causal",
    offset: mx.array | None = None,
) -> Partial:
    """Attention of queries [B, H, T, D] over live keys and values [B, K, S, D], the last T of which are the queries'
    own.

    offset: [K, D], or [B, K, D]; the keys are absolute, the log-normalizer is relative to it.

    mask: None (all visible), "causal", or an array that broadcasts to [B, H, T, S]: bool (True = visible) or
    additive. A row that sees nothing gets the log-normalizer -inf in effect (about `EMPTY`) and an output of finite,
    meaningless values.
    """
    B, H, T, D = queries.shape
    K, S = keys.shape[1], keys.shape[2]
    if offset is not None:
        keys = keys.astype(mx.float32) - offset.astype(mx.float32)[..., None, :]
    step = max(1, device().max_scores // (B * H * S))
    parts = []
    for start in range(0, T, step):
        stop = min(T, start + step)
        # A causal chunk never looks past its own last token, so the keys after it are not read.
        seen = S - T + stop if isinstance(mask, str) else S
        q = queries[:, :, start:stop].reshape(B, K, H // K, stop - start, D)
        rows = mask[..., start:stop, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        if isinstance(mask, str):
            rows = mx.arange(S - T + start, S - T + stop)[:, None] >= mx.arange(seen)[None]
        parts.append(_masked(q, keys[:, :, :seen], values[:, :, :seen], scale=scale, mask=rows))
        if step < T:
            mx.eval(parts[-1])
    part = parts[0] if len(parts) == 1 else join(parts, axis=3)
    return Partial(part.output.reshape(B, H, T, -1), part.log_normalizer.reshape(B, H, T))


def _masked(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: mx.array | str | None
) -> Partial:
    """queries [B, K, G, T, D], keys and values [B, K, S, D] -> output [B, K, G, T, D], log_normalizer [B, K, G, T]."""
    B, K, G, T, D = queries.shape
    S = keys.shape[2]
    flat = queries.reshape(B, K, G * T, D).astype(mx.float32) * scale
    scores = flat @ keys.astype(mx.float32).swapaxes(-1, -2)
    if isinstance(mask, mx.array):
        scores = scores.reshape(B, K, G, T, S)
        if mask.ndim == 4:  # [B, H or 1, T, S]
            mask = mask.reshape(mask.shape[0], *((1, 1) if mask.shape[1] == 1 else (K, G)), *mask.shape[2:])
        scores = mx.where(mask, scores, EMPTY) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
        scores = scores.reshape(B, K, G * T, S)
    output, log_normalizer, *_ = _attend(scores, values.astype(mx.float32))
    return Partial(output.reshape(B, K, G, T, -1), log_normalizer.reshape(B, K, G, T))
