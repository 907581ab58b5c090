"""The decode kernel of one layer: which kernels a call launches, and whether they are right on this machine."""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..core import attention
from ..core.quantize import Stored
from ..heads import Bank
from . import checking, packing, source
from .packing import DTYPES, Form, Packed, activations
from .source import Kernel
from .variants import HEAD_DIMS, LIVE_SLICE, MAX_LENGTH, MAX_SLICES, SIMDGROUPS, Variant, build, variant_for

BLOCKS = {"metal": 96, "cuda": 124, "ops": 96}  # threadgroups a layer's parameters are cut into
ULTRA_BLOCKS = 144  # of two chips in one
ARRIVAL_COUNTERS = 64  # of a layer: more than its launches that are under way at once
_ELEMENTS = {dtype: name for name, dtype in DTYPES.items()}


def blocks() -> int:
    """Threadgroups that a layer's parameters are cut into here."""
    chip = str(mx.device_info().get("architecture", ""))
    ultra = chip.startswith("applegpu") and chip.endswith("d")  # MLX's name of an M2 Ultra is applegpu_g14d
    return ULTRA_BLOCKS if ultra and source.backend() == "metal" else BLOCKS[source.backend()]


def pack(
    bank: Bank,
    *,
    dtype: mx.Dtype | None = None,
    bits: int = 16,
    heads: Sequence[Stored] | None = None,
    n_blocks: int | None = None,
) -> Packed:
    """One layer's bank as `DecodeKernel` reads it here; see `packing.pack`. n_blocks: other than `blocks()`."""
    backend = source.backend()
    return packing.pack(
        bank,
        dtype=dtype,
        bits=bits,
        heads=heads,
        blocks=n_blocks or blocks(),
        backend=backend,
        one_launch=backend == "cuda",
    )


class Plan(NamedTuple):
    """What a decode step of some shapes launches: one kernel, or one that leaves partial results and one that merges
    them."""

    first: Kernel
    merge: Kernel | None


class DecodeKernel:
    """The decode step of one layer. checked: whether its kernels must have been right on a small layer before."""

    def __init__(self, packed: Packed, *, checked: bool = True):
        self.packed = packed
        self._words, self._networks = packed.words, packed.networks
        self._checked = checked
        self._plans: dict[tuple[object, ...], Plan | None] = {}  # by shapes
        # Launches that may be under way at once count their threadgroups apart.
        self._counters = itertools.cycle(_arrival_counters(packed.form))

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        *,
        live: int | None = None,
        left_padding: mx.array | None = None,
    ) -> mx.array | None:
        """Attention of queries [B, H, T, D], T <= 8, over the packed context and the live keys and values [B, K, S, D].

        live: how many of the S are live tokens, the first ones (default S); so a cache can hand over its whole buffers,
        which costs less than to slice them. Queries are rotated and unscaled, as a cache sees them; they are the last T
        live tokens, and causal among them. All may be slices of longer buffers; their last axis must be contiguous.
        left_padding [B] int32: the first live position of each sequence that holds a token. Returns [B, H, T, D] in the
        queries' type, or None where there is no kernel for these shapes and types, or no right one.
        """
        # Once a layer and token: attributes and calls count. (A method costs the host less than `__call__`.)
        shape, (_, K, S, _) = queries.shape, keys.shape
        if live is None:
            live = S
        slices = -(-live // LIVE_SLICE) if live < LIVE_SLICE * MAX_SLICES else MAX_SLICES
        key = (shape, K, slices, shape[2] <= live <= S, queries.dtype, keys.dtype, left_padding is not None)
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._plans[key] = _make_plan(self.packed.form, *key, checked=self._checked)
        if plan is None:
            return None
        words, live_tokens = self._words, _lengths(live // 64)[live % 64]
        inputs = [queries, keys, values, words, live_tokens]
        if left_padding is not None:
            inputs.append(left_padding)
        if self._networks:
            inputs.append(activations(self._networks, attention.group(queries, K)))
        first, merge = plan
        if merge is None:
            inputs.append(next(self._counters))
            return first(inputs=inputs)[1]
        return merge(inputs=[queries, words, live_tokens, first(inputs=inputs)[0]])[0]

    def copy(self) -> "DecodeKernel":
        """The same on parameters in memory of their own."""
        return DecodeKernel(self.packed.copy(), checked=self._checked)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def _arrival_counters(form: Form) -> list[mx.array]:
    """Where one launch does everything: counters of the threadgroups that are done with each KV head, [K] each."""
    if not form.one_launch:
        return []
    zeros = mx.array([0] * form.n_kv_heads, mx.int32)
    counters = [zeros + mx.array(0, mx.int32) for _ in range(ARRIVAL_COUNTERS)]  # each in the device's memory
    mx.eval(counters)
    return counters


@functools.lru_cache(maxsize=1024)
def _lengths(chunk: int) -> list[mx.array]:
    """Arrays whose shapes say 64 * chunk, 64 * chunk + 1, … to a kernel, which never reads them.

    A shape travels with the launch, a value would have to reach the device first. They are evaluated on the CPU, so as
    not to wait for what is queued on the GPU.
    """
    row = mx.array([0] * 8)
    lengths = [mx.broadcast_to(row, (64 * chunk + i, 8), stream=mx.cpu) for i in range(64)]
    mx.eval(lengths)
    return lengths


def _make_plan(
    form: Form,
    shape: tuple[int, ...],
    n_kv_heads: int,
    slices: int,
    ends: bool,
    dtype: mx.Dtype,
    live_dtype: mx.Dtype,
    padded: bool,
    *,
    checked: bool,
) -> Plan | None:
    """ends: whether the queries are among the live tokens."""
    (B, H, T, D), K = shape, form.n_kv_heads
    fits = form.head_dim == D and D in HEAD_DIMS and n_kv_heads == K and H % K == 0 and ends and 0 < T <= MAX_LENGTH
    if form.backend == "ops" or not fits or dtype != live_dtype or dtype not in _ELEMENTS:
        return None
    rows = B * (H // K) * T
    variant = variant_for(form, rows, H // K, T, _ELEMENTS[dtype], padded)
    if checked and not works(variant, form.one_launch):
        return None
    threads = 32 * SIMDGROUPS
    grid = (threads * (form.blocks + K * slices), -(-rows // (variant.tiles * variant.tile)), 1)
    shapes = [((form.blocks + K * slices) * rows * (D + 2),), shape]  # of the partial results and of the output
    dtypes = [mx.float32, dtype]
    if form.one_launch:
        return Plan(source.launcher(build(variant, "fused"), grid, shapes, dtypes, threads), None)
    merge_grid = (threads * -(-rows // (SIMDGROUPS // variant.shares)), K, 1)
    return Plan(
        source.launcher(build(variant, "partial"), grid, shapes[:1], dtypes[:1], threads),
        source.launcher(build(variant, "merge"), merge_grid, shapes[1:], dtypes[1:], threads),
    )


@functools.cache
def works(variant: Variant, one_launch: bool) -> bool:
    """Whether the kernel computes on this machine what plain operations do; a warning where it does not.

    Asked once for each text in a process: see checking.py.
    """
    try:
        reasons = (_mismatch(variant, one_launch, live) for live in checking.COUNTS)
        reason = next(filter(None, reasons), None)
    except Exception as error:  # whatever a compiler or a driver has to say must not end an answer
        reason = checking.summary(error)
    if reason:
        warnings.warn(f"plain operations instead of the decode kernel for {variant}: {reason}", stacklevel=2)
    return not reason


def _mismatch(variant: Variant, one_launch: bool, live: int) -> str | None:
    """What is wrong with the kernel's result for so many live tokens; None where nothing is."""
    probe = checking.probe(variant, one_launch=one_launch, live=live)
    kernel = DecodeKernel(probe.packed, checked=False)
    result = kernel.attend(probe.queries, probe.keys, probe.values, live=live, left_padding=probe.left_padding)
    assert result is not None
    return probe.mismatch(result)
