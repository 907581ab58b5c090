"""Whether every kernel is right on this machine: its result against plain operations in float32."""

import math
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from .. import kernels
from ..core.types import JsonObject
from ..heads import Bank
from ..kernels import DecodeKernel, checking
from ..sparse import Fixed, Pattern, Strided
from ..sparse import checking as sparse_checking
from ..sparse import kernel as sparse_kernel
from . import measure
from .measure import Heads, Shape, Widths

Row = JsonObject


def rows() -> list[Row]:
    """One row a case: the case, its largest error relative to the largest number, whether that is small enough, and the
    seconds of the first call of each kernel."""
    decoding = [check(bank, **case) for case, bank in cases()]
    return decoding + [check_sparse(**case) for case in sparse_cases()]


_STORAGES: list[tuple[mx.Dtype, mx.Dtype, int]] = [
    (mx.float32, mx.float32, 16),
    (mx.float16, mx.float16, 16),
    (mx.bfloat16, mx.bfloat16, 16),
    (mx.bfloat16, mx.float16, 8),
    (mx.bfloat16, mx.float16, 4),
]
_GROUPINGS = ((1, 1, 1), (2, 1, 4), (4, 3, 1), (8, 2, 1), (16, 8, 2))  # query heads a KV head, query tokens, sequences


def cases() -> list[tuple[Row, Bank]]:
    """Nodes, and nodes with a correction, in every head size and storage; networks in every head size and in turn.

    The keys of every other bank are relative to an offset.
    """
    cases = []
    for i, head_dim in enumerate(kernels.HEAD_DIMS):
        for j in range(4):
            group, length, batch = _GROUPINGS[(i + j) % 5]
            shape = Shape("case", 1, Heads(3 * group, 3, head_dim), Widths(0, 0, 0))
            storages = _STORAGES if j < 2 else _STORAGES[(i + j) % 5 :][:1]
            if j < 2:
                bank = measure.random_bank(shape, 90, 24 * j, seed=i)
            else:
                bank = measure.random_networks(shape, 40, j - 1, seed=i)
            if (i + j) % 2:
                bank.offset = mx.random.normal((3, head_dim), scale=4.0)
            case = {"head_dim": head_dim, "group": group, "length": length, "batch": batch}
            cases += [(case | {"dtype": d, "storage": s, "bits": b}, bank) for d, s, b in storages]
    return cases


def check(
    bank: Bank, *, head_dim: int, group: int, length: int, batch: int, dtype: mx.Dtype, storage: mx.Dtype, bits: int
) -> Row:
    K = len(bank.sizes)
    queries = mx.random.normal((batch, K * group, length, head_dim)).astype(dtype)
    keys = mx.random.normal((batch, K, 80, head_dim))
    values = mx.random.normal((batch, K, 80, head_dim))
    if bank.offset is not None:
        keys = keys + bank.offset[:, None]
    keys, values = keys.astype(dtype)[:, :, 3:76], values.astype(dtype)[:, :, 3:76]
    rounded, heads = checking.stored(bank, storage, bits)
    packed = kernels.pack(rounded, dtype=storage, bits=bits, heads=heads)
    kernel = DecodeKernel(packed, checked=False)
    expected = checking.reference(rounded, queries, keys, values)
    mx.eval(queries, keys, values)

    def decode() -> float:
        out = kernel.attend(queries, keys, values)
        assert out is not None
        return checking.relative_error(out, expected)

    tolerance = {mx.float32: 2e-5, mx.float16: 1.5e-3, mx.bfloat16: 1e-2}[dtype]
    if packed.networks:  # their hidden layers are stock matmuls of the storage type, float32 ones in TF32 on NVIDIA
        tolerance = {mx.float32: 1e-3, mx.float16: 1.5e-2, mx.bfloat16: 5e-2}[storage]
    row: Row = {
        "kind": "deep" if packed.networks else bank.kind,
        "head_dim": head_dim,
        "group": group,
        "length": length,
        "batch": batch,
    }
    row |= {"dtype": str(dtype).removeprefix("mlx.core."), "storage": packed.form.storage}
    return row | _tried(tolerance, decode)


def _tried(tolerance: float, *calls: Callable[[], float]) -> Row:
    """The largest error of the calls, whether it is small enough, and the seconds of each call, most of them for
    compilation. A call that fails counts as an infinite error, with its reason."""
    errors, seconds, reason = [], [], None
    for call in calls:
        start = time.perf_counter()
        try:
            errors.append(call())
        except Exception as error:  # of a compiler; the other kernels must still be tried
            errors.append(math.inf)
            reason = reason or checking.summary(error)
        seconds.append(time.perf_counter() - start)
    right = all(error < tolerance for error in errors)  # not a number is not
    row: Row = {"error": max(errors, key=lambda error: (math.isnan(error), error)), "ok": right, "first_calls": seconds}
    return row | ({"reason": reason} if reason else {})


def sparse_cases() -> list[Row]:
    patterns: tuple[Pattern, ...] = (Fixed(16, summary=4), Strided(16), Fixed(32, summary=3, combine="heads"))
    dtypes = (mx.float16, mx.bfloat16)
    return [
        {"pattern": pattern, "head_dim": head_dim, "dtype": dtype}
        for head_dim in sparse_kernel.HEAD_DIMS
        for pattern in patterns
        for dtype in dtypes
    ]


def check_sparse(pattern: Pattern, *, head_dim: int, dtype: mx.Dtype) -> Row:
    """Output and log-normaliser of sparse attention, then its gradients."""
    probe = sparse_checking.probe(pattern, dtype=dtype, head_dim=head_dim, scale=head_dim**-0.5)
    attend = partial(sparse_kernel.attention, pattern=pattern, scale=probe.scale)
    (B, H, T, _), K = probe.inputs[0].shape, probe.inputs[1].shape[1]
    row: Row = {"kind": f"sparse {type(pattern).__name__.lower()}", "head_dim": head_dim, "group": H // K}
    row |= {"length": T, "batch": B, "dtype": str(dtype).removeprefix("mlx.core."), "storage": "-"}
    calls = (lambda backwards=backwards: max(probe.errors(attend, backwards=backwards)) for backwards in (False, True))
    return row | _tried(sparse_checking.TOLERANCE[dtype], *calls)
