"""The exponential, at a usable speed on every device.

MLX's CPU build for Linux evaluates `exp` one element at a time (about 22 ns each on a 2.5 GHz Xeon), numpy's loop is
vectorised (1.2 ns). Attention over a long context is mostly exponentials, so on that build we go through numpy.
"""

import mlx.core as mx
import numpy as np

from .device import device
from .gradients import Arrays, with_vjp


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


def exp_of_scores(scores: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """e^(s - top), top = max s and the sum, each over the last axis of scores [..., n] float32, which may be
    overwritten. Not differentiable."""
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
    """In place: the scores stay in the processor's cache, and no memory is new."""
    weights = np.array(scores, copy=False)
    top = weights.max(-1, keepdims=True)
    np.subtract(weights, top, out=weights)
    np.exp(weights, out=weights)
    return scores, mx.array(top), mx.array(weights.sum(-1, keepdims=True))


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), differentiable through its own value."""
    return _sigmoid(x)[0]


def _sigmoid_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> mx.array:
    (y,), (dy,) = outputs, cotangents
    return dy * y * (1 - y)


@with_vjp(_sigmoid_vjp)
def _sigmoid(x: mx.array) -> tuple[mx.array]:
    return (1 / (1 + exp(-mx.clip(x, -80.0, 80.0))),)
