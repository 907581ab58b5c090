"""The exponential, at a usable speed on every device.

MLX's CPU build for Linux evaluates `exp` one element at a time (about 22 ns each on a 2.5 GHz Xeon), numpy's loop is
vectorised (1.2 ns). Attention over a long context is mostly exponentials, so on that build we go through numpy.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .device import device
from .gradients import Arrays, with_vjp
from .types import FloatArray

_BLOCK = 1 << 17  # numbers: several passes over half a megabyte stay in the processor's nearer caches


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise, in float32. Inside `mx.compile` (where nothing can be evaluated) it is `mx.exp`."""
    if not device().linux_cpu:
        return mx.exp(x)
    return _exp(x)[0]


def _exp_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> mx.array:
    (y,), (dy,) = outputs, cotangents
    return dy * y


@with_vjp(_exp_vjp)
def _exp(x: mx.array) -> tuple[mx.array]:
    try:
        mx.eval(x)
    except ValueError:  # traced by mx.compile
        return (mx.exp(x),)
    return (mx.array(np.exp(np.array(x, copy=False))),)


def log_sum_exp(x: mx.array) -> mx.array:
    """log Σ e^x over the last axis of x [..., n] float32. Not differentiable on a Linux CPU."""
    if not device().linux_cpu:
        return mx.logsumexp(x, axis=-1)
    top = x.max(-1, keepdims=True)
    _, _, total = exp_of_scores(x - top)
    return (top + mx.log(total))[..., 0]


def exp_of_scores(scores: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """e^(s - top), top and the sum, each over the last axis of scores [..., n] float32, which may be overwritten.

    top: the largest score of a row. Not differentiable."""
    if device().linux_cpu:
        try:
            mx.eval(scores)
        except ValueError:  # as above
            pass
        else:
            return _overwritten(scores)
    top = scores.max(-1, keepdims=True)
    weights = mx.exp(scores - top)
    return weights, top, weights.sum(-1, keepdims=True)


def _overwritten(scores: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """In place, some rows at a time: the scores stay in the processor's cache, and no memory is new."""
    scores = mx.contiguous(scores)
    mx.eval(scores)
    weights = np.array(scores, copy=False)
    top, total = (np.empty((*weights.shape[:-1], 1), np.float32) for _ in range(2))
    for w, t, s in blocks(weights, top, total):
        np.max(w, axis=-1, keepdims=True, out=t)  # a row's own: it must not depend on those beside it
        np.exp(np.subtract(w, t, out=w), out=w)
        np.einsum("ij->i", w, out=s[:, 0])
    return scores, mx.array(top), mx.array(total)


def blocks(*arrays: FloatArray) -> Iterator[tuple[FloatArray, ...]]:
    """Some rows of each of some arrays [..., n] that have the same rows: views, where the array is contiguous."""
    rows = [x.reshape(-1, x.shape[-1]) for x in arrays]
    step = max(1, _BLOCK // max(1, rows[0].shape[1]))
    for start in range(0, len(rows[0]), step):
        yield tuple(x[start : start + step] for x in rows)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), differentiable through its own value."""
    return _sigmoid(x)[0]


def _sigmoid_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> mx.array:
    (y,), (dy,) = outputs, cotangents
    return dy * y * (1 - y)


@with_vjp(_sigmoid_vjp)
def _sigmoid(x: mx.array) -> tuple[mx.array]:
    return (1 / (1 + exp(-mx.clip(x, -80.0, 80.0))),)
