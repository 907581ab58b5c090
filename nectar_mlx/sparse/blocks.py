"""Exact attention chunk by chunk, with a reverse pass that computes the scores again instead of keeping them.

For arrangements of queries and keys in which some queries need only some keys: the caller says which (`Chunk`), the
pieces are dense attention. Only one chunk's scores exist at a time, forwards and backwards (Sparse Transformers, arXiv
1904.10509, section 5.4, recompute attention for the same reason).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..core.attention import EMPTY, Partial, join
from ..core.exp import exp
from ..core.gradients import Arrays, with_vjp


class Chunk(NamedTuple):
    """Some queries, and the keys and values that contain all they see."""

    queries: slice
    keys: slice
    mask: Callable[[], mx.array | None]  # built when it is needed: together they are larger than the inputs


def blockwise(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, axis: int, chunks: Sequence[Chunk]
) -> Partial:
    """Attention of queries [..., N, D] over keys and values [..., M, D], one chunk of `axis` after the other.

    Each mask broadcasts to its chunk's [..., N, M]. Keeps the inputs and (o, L) for the reverse pass, nothing of size
    N · M: there the scores are computed again, chunk by chunk (section 5.4).
    """

    def part(x: mx.array, which: slice) -> mx.array:
        return x[(slice(None),) * axis + (which,)]

    def attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        d_queries: list[mx.array] = []
        d_keys, d_values = [mx.zeros(x.shape) for x in primals[1:]]
        for chunk in chunks:
            chosen = chunk.queries, chunk.keys, chunk.keys
            q, k, v = [part(x, rows).astype(mx.float32) for x, rows in zip(primals, chosen, strict=True)]
            q = _after((d_keys, d_values), q)
            d_output, d_log, output, log_normalizer = [part(x, chunk.queries) for x in (*cotangents, *outputs)]
            weights = _weights(masked_scores(q, k, scale, chunk.mask()), log_normalizer[..., None], mx.float32)
            constant = d_log - (d_output * output).sum(-1)
            d_scores = weights * (d_output @ v.swapaxes(-1, -2) + constant[..., None]) * scale
            seen = (slice(None),) * axis + (chunk.keys,)
            d_keys[seen] += d_scores.swapaxes(-1, -2) @ q
            d_values[seen] += weights.swapaxes(-1, -2) @ d_output
            d_chunk, d_keys, d_values = _evaluated(d_scores @ k, d_keys, d_values)
            d_queries.append(d_chunk)
        grads = mx.concatenate(d_queries, axis=axis), d_keys, d_values
        return tuple(grad.astype(x.dtype) for grad, x in zip(grads, primals, strict=True))

    @with_vjp(attend_vjp)
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        parts: list[Partial] = []
        for chunk in chunks:
            q, k, v = part(queries, chunk.queries), part(keys, chunk.keys), part(values, chunk.keys)
            q = _after(parts[-1] if parts else (), q)
            weights, log_normalizer = _softmax(masked_scores(q, k, scale, chunk.mask()), values.dtype)
            parts.append(Partial(*_evaluated((weights @ v).astype(mx.float32), log_normalizer)))
        return join(parts, axis=axis)

    return Partial(*attend(queries, keys, values))


def _after(done: Sequence[mx.array], x: mx.array) -> mx.array:
    """x, but not to be read before `done` is there: chunks run one by one, however late the graph is evaluated.

    One chunk is far less than macOS lets a GPU do in a command buffer, and MLX fills no buffer with more than a few.
    """
    return mx.depends([x], list(done))[0] if done else x


def _evaluated(*arrays: mx.array) -> Sequence[mx.array]:
    """On the CPU: the same values, evaluated, without the graph that led to them.

    `exp` evaluates its argument there, and what is evaluated within `mx.grad` keeps all that led to it alive.
    """
    if mx.default_device() != mx.cpu:
        return arrays
    try:
        mx.eval(arrays)
    except ValueError:  # traced by mx.compile
        return arrays
    return [mx.array(np.array(x, copy=False)) for x in arrays]


def masked_scores(queries: mx.array, keys: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    products = (queries.astype(mx.float32) * scale) @ keys.astype(mx.float32).swapaxes(-1, -2)
    return products if mask is None else mx.where(mask, products, EMPTY)


def _softmax(scores: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """softmax(scores) in `dtype` and the log-normaliser of each row."""
    if mx.default_device() == mx.cpu:
        top = scores.max(-1, keepdims=True)
        weights = exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        return weights / total, (top + mx.log(total))[..., 0]
    log_normalizer = mx.logsumexp(scores, axis=-1, keepdims=True)
    return _weights(scores, log_normalizer, dtype), log_normalizer[..., 0]


def _weights(scores: mx.array, log_normalizer: mx.array, dtype: mx.Dtype) -> mx.array:
    """e^(score - log-normaliser) in `dtype`."""
    return exp(scores - log_normalizer).astype(dtype)
