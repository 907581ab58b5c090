"""The fused decode step: head functions, exact causal attention over the live tokens and their merge, in one or two
launches.

metal/ holds the kernel text. On Apple silicon it goes to `mx.fast.metal_kernel`, two launches a layer: partial results,
then their merge. On NVIDIA the same text goes to `mx.fast.cuda_kernel` behind metal/cuda.h, one launch a layer: the
threadgroup that finishes last at a KV head merges, which needs a memory fence between threadgroups that Metal does not
offer everywhere. Everywhere else, and for shapes that `supports` refuses, callers take plain operations. So they do
where a kernel does not compile or computes something else: every text is tried before its first use (checking.py).

Calling a kernel through MLX costs host time that grows with the length of its text and the number of its inputs, so
constants are baked into the text, a layer's parameters are one buffer, and every text is built once.
"""

import functools
import os
import warnings
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx

from ..core import attention
from ..errors import NectarError
from ..heads import Bank, Quadrature
from . import checking
from .packing import DTYPES, SLOTS, Packed, activations
from .packing import pack as _pack
from .source import Kernel
from .variants import LIVE_SLICE, MAX_SLICES, SIMDGROUPS, Variant, build, variant_for

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_LENGTH = 8  # query tokens; more go through matmuls
BLOCKS = {"metal": 96, "cuda": 124, "ops": 96}  # threadgroups a layer's parameters are cut into
ULTRA_BLOCKS = 144  # of two chips in one


def backend() -> str:
    """What evaluates a decode step here: "metal", "cuda" or "ops". NECTAR_KERNEL overrides it."""
    chosen = os.environ.get("NECTAR_KERNEL", "")
    if chosen:
        if chosen not in BLOCKS:
            raise NectarError(f"NECTAR_KERNEL={chosen}: use metal, cuda or ops")
        return chosen
    if mx.default_device() == mx.cpu:
        return "ops"
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "ops"


def blocks() -> int:
    """Threadgroups that a layer's parameters are cut into here."""
    chip = str(mx.device_info().get("architecture", ""))
    ultra = chip.startswith("applegpu") and chip.endswith("d")  # as MLX tells them: applegpu_g14d is an M2 Ultra
    return ULTRA_BLOCKS if ultra and backend() == "metal" else BLOCKS[backend()]


def pack(
    bank: Bank, *, dtype: mx.Dtype | None = None, bits: int = 16, heads: Any = None, n_blocks: int | None = None
) -> Packed:
    """One layer's bank in the form that `decode` reads here; see `packing.pack`. n_blocks: other than `blocks()`."""
    here, n = backend(), n_blocks or blocks()
    return _pack(bank, dtype=dtype, bits=bits, heads=heads, blocks=n, backend=here, one_launch=here == "cuda")


def supports(packed: Packed, queries: mx.array, keys: mx.array) -> bool:
    """Whether `decode` has a kernel for queries [B, H, T, D] and live keys [B, K, S, D]."""
    return _plan(packed, queries, keys, keys.shape[2], False) is not None


def decode(
    packed: Packed,
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
    queries' type, or None where `supports` says no.
    """
    live = keys.shape[2] if live is None else live
    plan = _plan(packed, queries, keys, live, left_padding is not None)
    if plan is None:
        return None
    live_tokens = _counts(live // 64)[live % 64]
    inputs = [queries, keys, values, packed.words, live_tokens]
    if left_padding is not None:
        inputs.append(left_padding)
    if packed.deep:
        inputs.append(activations(packed.deep, attention.group(queries, packed.n_kv_heads)))
    if plan.merge is None:
        inputs.append(packed.arrival_counters[next(_turn) % SLOTS])
        return plan.first(inputs=inputs)[1]
    (partials,) = plan.first(inputs=inputs)
    return plan.merge(inputs=[queries, packed.words, live_tokens, partials])[0]


@functools.lru_cache(maxsize=1024)
def _counts(chunk: int) -> list[mx.array]:
    """Arrays whose shapes say 64 * chunk, 64 * chunk + 1, … to a kernel, which never reads them.

    A shape travels with the launch, a value would have to reach the device first. They are evaluated on the CPU, so as
    not to wait for what is queued on the GPU.
    """
    row = mx.array([0] * 8)
    counts = [mx.broadcast_to(row, (64 * chunk + i, 8), stream=mx.cpu) for i in range(64)]
    mx.eval(counts)
    return counts


@dataclass(frozen=True)
class Plan:
    """What a decode step of some shapes launches: one kernel, or one that leaves partial results and one that merges
    them."""

    first: Kernel
    merge: Kernel | None


def _plan(packed: Packed, queries: mx.array, keys: mx.array, live: int, padded: bool) -> Plan | None:
    shape, (_, K, S, _) = queries.shape, keys.shape
    slices = -(-live // LIVE_SLICE) if live < LIVE_SLICE * MAX_SLICES else MAX_SLICES
    key = (shape, K, slices, shape[2] <= live <= S, queries.dtype, keys.dtype, padded)
    try:
        plan: Plan | None = packed.plans[key]
    except KeyError:
        plan = packed.plans[key] = _make_plan(packed, *key)
    return plan


def _make_plan(
    packed: Packed,
    shape: tuple[int, ...],
    n_kv_heads: int,
    slices: int,
    ends: bool,
    dtype: mx.Dtype,
    live_dtype: mx.Dtype,
    padded: bool,
) -> Plan | None:
    form = packed.form
    (B, H, T, D), K = shape, form.n_kv_heads
    fits = form.head_dim == D and D in HEAD_DIMS and n_kv_heads == K and H % K == 0 and ends and 0 < T <= MAX_LENGTH
    if form.backend == "ops" or not fits or dtype != live_dtype or dtype not in _NAMES:
        return None
    rows = B * (H // K) * T
    variant = variant_for(form, rows, H // K, T, _NAMES[dtype], padded)
    if packed.checked and not works(variant, form.slots > 0):
        return None
    threads = 32 * SIMDGROUPS
    grid = (threads * (form.blocks + K * slices), -(-rows // (variant.tiles * variant.tile)), 1)
    shapes = [((form.blocks + K * slices) * rows * (D + 2),), shape]  # of the partial results and of the output
    dtypes = [mx.float32, dtype]
    if form.slots:
        return Plan(launcher(build(variant, "fused"), grid, shapes, dtypes, threads), None)
    merge_grid = (threads * -(-rows // (SIMDGROUPS // variant.shares)), K, 1)
    return Plan(
        launcher(build(variant, "partial"), grid, shapes[:1], dtypes[:1], threads),
        launcher(build(variant, "merge"), merge_grid, shapes[1:], dtypes[1:], threads),
    )


@functools.cache
def works(variant: Variant, one_launch: bool) -> bool:
    """Whether the kernel computes on this machine what plain operations do; a warning where it does not.

    Asked once for each text in a process: see checking.py.
    """
    try:
        probe = checking.probe(variant, one_launch=one_launch)
        found = decode(
            probe.packed, probe.queries, probe.keys, probe.values, live=checking.LIVE, left_padding=probe.left_padding
        )
        assert found is not None
        reason = probe.mismatch(found)
    except Exception as error:  # whatever a compiler or a driver has to say must not end an answer
        reason = checking.summary(error)
    if reason:
        warnings.warn(f"plain operations instead of the decode kernel for {variant}: {reason}", stacklevel=2)
    return not reason


def compose_nodes(
    bank: Quadrature, keys: mx.array, values: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Keys and values [B, K, m + S, D] of nodes and live tokens together, and the additive mask [1, K, 1, m + S].

    With them `mx.fast.scaled_dot_product_attention` is a quadrature and exact attention merged: the fastest stock form
    for one query token, as exact as biases rounded to `dtype` allow.
    """
    assert bank.offset is None, "live keys are absolute"
    batch = keys.shape[0]
    p = {n: a.astype(dtype) for n, a in bank.parameters.items()}
    nodes = (mx.repeat(p[n][None], batch, axis=0) for n in ("keys", "values"))
    both = [mx.concatenate(list(pair), axis=2) for pair in zip(nodes, (keys, values), strict=True)]
    return both[0], both[1], mx.pad(p["bias"], [(0, 0), (0, keys.shape[2])])[None, :, None]


def launcher(
    kernel: Kernel,
    grid: tuple[int, int, int],
    output_shapes: list[tuple[int, ...]],
    output_dtypes: list[mx.Dtype],
    threads: int,
) -> Kernel:
    """The kernel with all but its inputs given; the tests put a simulator here. threads: of a threadgroup."""
    threadgroup = (threads, 1, 1)

    def launch(inputs: list[mx.array]) -> list[mx.array]:  # functools.partial costs the host more
        return kernel(
            inputs=inputs,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )

    return launch


_turn = count()
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


__all__ = [
    "HEAD_DIMS",
    "LIVE_SLICE",
    "MAX_LENGTH",
    "MAX_SLICES",
    "SIMDGROUPS",
    "Packed",
    "backend",
    "blocks",
    "compose_nodes",
    "decode",
    "launcher",
    "pack",
    "supports",
    "works",
]
