"""What a training step of nodes does between its matrix products: each function by plain operations, and on NVIDIA for
half-precision numbers by a kernel, where MLX's own operations reach a quarter of the memory's bandwidth or would be
compiled for minutes (docs/log/speed.md). On a Mac `mx.compile` fuses the plain operations.

Every kernel is tried against the plain operations before its first use.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..core.device import device
from ..core.exp import sigmoid
from . import nvrtc, source
from .checking import summary

TAIL = 8  # columns behind a vector's own, which biases and constants travel in
PLAIN = 0.1  # share of the plain errors in the loss
SLOPE = 16.0  # factor of the slopes: half precision has few digits below 6e-5
LIMIT = 60_000.0  # half precision ends at 65,504
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-12
_WARPS, _THREADS = 8, 256  # warps of a block; threads of a block where each has one number
_LONG = 4096  # columns from which a row of scores is a whole block's


class Moments(NamedTuple):
    """Of Adam: first and second, like the parameters."""

    first: mx.array
    second: mx.array


def softmax(scores: mx.array, valid: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """softmax over the last axis of scores [..., n], in their type, and the logarithm of the sum, [...] float32.

    valid: how many of the n count, int32 [1]; default all.
    """
    n = scores.shape[-1]
    if _by_kernel(scores) and n % 8 == 0:
        if valid is None:
            valid = _all()
        return _softmax_kernel(scores, valid)
    return plain_softmax(scores, valid)


def plain_softmax(scores: mx.array, valid: mx.array | None = None) -> tuple[mx.array, mx.array]:
    if valid is not None:
        low = -math.inf if scores.dtype != mx.float16 else -LIMIT
        scores = mx.where(mx.arange(scores.shape[-1]) < valid, scores, low)
    if not device().linux_cpu:
        return mx.softmax(scores, axis=-1, precise=True), mx.logsumexp(scores.astype(mx.float32), axis=-1)
    return _numpy_softmax(scores)


def _numpy_softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """On a Linux CPU, where numpy's exponential is twenty times as fast (core/exp.py): a matrix at a time, which stays
    in the processor's cache."""
    mx.eval(scores)
    given = np.array(scores.astype(mx.float32), copy=False).reshape(-1, *scores.shape[-2:])
    weights, logs = np.empty_like(given), np.empty(given.shape[:-1], np.float32)
    for s, w, log in zip(given, weights, logs, strict=True):
        top = s.max(-1, keepdims=True)
        np.exp(np.subtract(s, top, out=w), out=w)
        total = w.sum(-1, keepdims=True)
        w *= 1 / total
        log[:] = (top + np.log(total))[..., 0]
    shape = scores.shape
    return mx.array(weights.reshape(shape)).astype(scores.dtype), mx.array(logs.reshape(shape[:-1]))


def slopes(
    errors: mx.array, change: mx.array, live: mx.array, gain: mx.array, gap: mx.array, ratio: mx.array
) -> mx.array:
    """The gradient of a sample's loss by the answer of its head, times SLOPE: [M, B, D + TAIL].

    With o and L of the head, o* and L* exact, l and Lₗ of the live tokens: errors u = o - l, change a = o* - l, live l,
    [M, B, D]; gain L - L*, gap L* - Lₗ, [M, B]; ratio [M]: weight of (L - L*)². The loss is

        ½ |g u - g* a|² + ½ PLAIN |u - a|² + ½ ratio (L - L*)²,    g = σ(L - Lₗ),  g* = σ(L* - Lₗ).

    Columns 0 … D - 1 are ∂/∂o; the sum of the next two is ∂/∂L - ∂/∂o · o, which every score of the sample gets.
    """
    if _by_kernel(errors) and errors.shape[-1] <= 256:
        return _slopes_kernel(errors, change, live, gain, gap, ratio)
    return plain_slopes(errors, change, live, gain, gap, ratio)


def plain_slopes(
    errors: mx.array, change: mx.array, live: mx.array, gain: mx.array, gap: mx.array, ratio: mx.array
) -> mx.array:
    u, a, l = (x.astype(mx.float32) for x in (errors, change, live))  # noqa: E741
    gate, exact = sigmoid(gain + gap)[..., None], sigmoid(gap)[..., None]
    merged, plain = gate * u - exact * a, u - a
    by_output = gate * merged + PLAIN * plain
    by_gate = (merged * u).sum(-1, keepdims=True)
    by_log = gate * (1 - gate) * by_gate + ratio[:, None, None] * gain[..., None]
    rest = SLOPE * (by_log - (by_output * (u + l)).sum(-1, keepdims=True))
    high, low = split(mx.clip(rest, -LIMIT, LIMIT), errors.dtype)
    return mx.concatenate(
        [mx.clip(SLOPE * by_output, -LIMIT, LIMIT).astype(errors.dtype), high, low, _zeros(high, TAIL - 2)], axis=-1
    )


def adam(
    values: mx.array,
    moments: Moments,
    gradient: mx.array,
    by_column: mx.array,
    by_row: mx.array,
    now: mx.array,
    *,
    keys: bool,
) -> tuple[mx.array, Moments, mx.array]:
    """One step of Adam for keys or values [M, m, D + TAIL] -> what follows, its moments, and `widened` of it.

    The gradient is half precision or float32. The rate of a number is now[0] · by_column [M, D + TAIL] · by_row [M, m];
    now[1] and now[2] correct the moments.
    """
    if _by_kernel(gradient):
        return _adam_kernel(values, moments, gradient, by_column, by_row, now, keys=keys)
    return plain_adam(values, moments, gradient, by_column, by_row, now, keys=keys)


def plain_adam(
    values: mx.array,
    moments: Moments,
    gradient: mx.array,
    by_column: mx.array,
    by_row: mx.array,
    now: mx.array,
    *,
    keys: bool,
) -> tuple[mx.array, Moments, mx.array]:
    g = mx.clip(gradient.astype(mx.float32), -LIMIT, LIMIT)
    g = mx.where(g == g, g, 0.0)
    first = BETA1 * moments.first + (1 - BETA1) * g
    second = BETA2 * moments.second + (1 - BETA2) * mx.square(g)
    step, of_first, of_second = now[:1], now[1:2], now[2:]  # slices: a number by its index is a gather of its own
    rate = step * by_column[:, None] * by_row[..., None]
    values = values - rate * (first * of_first) / (mx.sqrt(second * of_second) + EPSILON)
    return values, Moments(first, second), widened(values, gradient.dtype, keys=keys)


def widened(values: mx.array, dtype: mx.Dtype, *, keys: bool) -> mx.array:
    """What products take of keys with their biases, or of values, [M, m, D + TAIL] float32, in another type.

    Keys: the vector, its bias (the number behind it) in two parts, and -1 twice; values: the vector and 1 twice.
    """
    D = values.shape[-1] - TAIL
    vector = values[..., :D].astype(dtype)
    if not keys:
        ones = mx.ones((*values.shape[:2], 2), dtype)
        return mx.concatenate([vector, ones, _zeros(ones, TAIL - 2)], axis=-1)
    high, low = split(mx.maximum(values[..., D : D + 1], -LIMIT), dtype)
    minus = mx.full((*values.shape[:2], 2), -1.0, dtype)
    return mx.concatenate([vector, high, low, minus, _zeros(high, TAIL - 4)], axis=-1)


def split(x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Two numbers of a type whose sum is nearly x."""
    high = x.astype(dtype)
    return high, (x - high.astype(mx.float32)).astype(dtype)


def _zeros(like: mx.array, columns: int) -> mx.array:
    return mx.zeros((*like.shape[:-1], columns), like.dtype)


@functools.cache
def _all() -> mx.array:
    """More columns than any scores have."""
    columns = mx.array([1 << 30], mx.int32) + 0  # in the device's memory
    mx.eval(columns)
    return columns


def _by_kernel(x: mx.array) -> bool:
    return bool(x.dtype == mx.float16 and kernels_work())


@functools.cache
def kernels_work() -> bool:
    """Whether there are kernels, and they compute here what plain operations do; a warning where they do not."""
    if source.backend() != "cuda":
        return False
    try:
        _all()
        reason = _mismatch()
    except Exception as error:  # whatever a compiler or a driver has to say must not end a fit
        reason = summary(error)
    if reason:
        warnings.warn(f"plain operations instead of the kernels of training: {reason}", stacklevel=2)
    return not reason


def _mismatch(D: int = 80) -> str:
    """What is wrong with the kernels' results on small inputs; nothing where all is right."""
    key = iter(mx.random.split(mx.random.key(0), 16))

    def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
        return mx.random.normal(shape, key=next(key)).astype(dtype)

    M, B, m, half = 2, 5, 24, mx.float16
    compared = list[tuple[object, object]]()
    for n in (m, _LONG + 8):
        scores, valid = 3 * normal(M, B, n, dtype=half), mx.array([n - 3], mx.int32)
        compared.append((_softmax_kernel(scores, valid), plain_softmax(scores, valid)))
    samples = [normal(M, B, D, dtype=half) for _ in range(3)] + [normal(M, B), normal(M, B), mx.ones(M)]
    compared.append((_slopes_kernel(*samples), plain_slopes(*samples)))
    moments = Moments(normal(M, m, D + TAIL), mx.square(normal(M, m, D + TAIL)))
    state = normal(M, m, D + TAIL), moments, normal(M, m, D + TAIL, dtype=half)
    rates = normal(M, D + TAIL), normal(M, m), mx.array([1e-2, 2.0, 3.0])
    for keys in (True, False):
        compared.append((_adam_kernel(*state, *rates, keys=keys), plain_adam(*state, *rates, keys=keys)))
    for number, (ours, plain) in enumerate(compared):
        for x, y in zip(_flat(ours), _flat(plain), strict=True):
            far = float(np.array(mx.abs(x.astype(mx.float32) - y.astype(mx.float32)).max()))
            size = float(np.array(mx.abs(y).max().astype(mx.float32)))
            if not far <= 4e-3 * max(1.0, size):
                return f"kernel {number} errs by {far:.2g} of {size:.2g}"
    return ""


def _flat(x: object) -> list[mx.array]:
    return [x] if isinstance(x, mx.array) else [leaf for part in x for leaf in _flat(part)]  # type: ignore[attr-defined]


def _launch(
    name: str,
    inputs: list[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    *numbers: int,
    blocks: int,
    threads: int,
) -> list[mx.array]:
    """A kernel of metal/training.cu on inputs; numbers: its last arguments."""
    made: list[mx.array] = mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=_module(),
        inputs=inputs,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=list(numbers),
        grid=(blocks * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        ensure_row_contiguous=True,
    )
    return made


@functools.cache
def _module() -> bytes:
    constants = {
        **{"TAIL": TAIL, "WARPS": _WARPS, "PLAIN": f"{PLAIN}f", "SLOPE": f"{SLOPE}f", "LIMIT": f"{LIMIT}f"},
        **{"BETA1": f"{BETA1}f", "BETA2": f"{BETA2}f", "EPSILON": f"{EPSILON}f"},
    }
    return nvrtc.cubin("".join(f"#define {n} {x}\n" for n, x in constants.items()) + source.text("training.cu"))


def _softmax_kernel(scores: mx.array, valid: mx.array) -> tuple[mx.array, mx.array]:
    columns, shape = scores.shape[-1], scores.shape
    rows, each = scores.size // columns, 1 if columns >= _LONG else _WARPS
    outputs = [(shape, scores.dtype), (shape[:-1], mx.float32)]
    blocks, threads = -(-rows // each), 32 * _WARPS
    made = _launch("nectar_softmax", [scores, valid], outputs, rows, columns, each, blocks=blocks, threads=threads)
    return made[0], made[1]


def _slopes_kernel(
    errors: mx.array, change: mx.array, live: mx.array, gain: mx.array, gap: mx.array, ratio: mx.array
) -> mx.array:
    M, B, D = errors.shape
    inputs, outputs = [errors, change, live, gain, gap, ratio], [((M, B, D + TAIL), errors.dtype)]
    blocks, threads = -(-M * B // _WARPS), 32 * _WARPS
    return _launch("nectar_slopes", inputs, outputs, M * B, B, D, blocks=blocks, threads=threads)[0]


def _adam_kernel(
    values: mx.array,
    moments: Moments,
    gradient: mx.array,
    by_column: mx.array,
    by_row: mx.array,
    now: mx.array,
    *,
    keys: bool,
) -> tuple[mx.array, Moments, mx.array]:
    _, rows, columns = values.shape
    inputs = [values, *moments, gradient, by_column, by_row, now]
    outputs = [(values.shape, mx.float32)] * 3 + [(values.shape, gradient.dtype)]
    blocks = -(-values.size // _THREADS)
    made = _launch(
        "nectar_adam", inputs, outputs, values.size, rows, columns, int(keys), blocks=blocks, threads=_THREADS
    )
    return made[0], Moments(made[1], made[2]), made[3]
