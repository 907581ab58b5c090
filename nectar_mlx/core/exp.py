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


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), differentiable through its own value."""
    return _sigmoid(x)[0]


def _sigmoid_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> mx.array:
    (y,), (dy,) = outputs, cotangents
    return dy * y * (1 - y)


@with_vjp(_sigmoid_vjp)
def _sigmoid(x: mx.array) -> tuple[mx.array]:
    return (1 / (1 + exp(-mx.clip(x, -80.0, 80.0))),)
