"""The fused decode step: head functions, exact causal attention over the live tokens and their merge, in one or two
launches.

metal/ holds the kernel text. On Apple silicon it goes to `mx.fast.metal_kernel`, two launches a layer: partial results,
then their merge. On NVIDIA the same text goes to `mx.fast.cuda_kernel` behind metal/cuda.h, one launch a layer: the
threadgroup that finishes last at a KV head merges, which needs a memory fence between threadgroups that Metal does not
offer everywhere. Everywhere else, and for shapes that `supports` refuses, callers take `compose`, which is made of the
plain operations that the kernel is tested against.

Calling a kernel through MLX costs host time that grows with the length of its text and the number of its inputs, so
constants are baked into the text, a layer's parameters are one buffer, and every text is built once.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import attention
from ..errors import NectarError
from ..folders import cache_folder
from ..heads import Bank, Quadrature
from ..quantize import group_size
from .packing import DTYPES, SLOTS, Form, Packed, activations
from .packing import pack as _pack

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_LENGTH = 8  # query tokens; more go through matmuls
SIMDGROUPS = 8
LIVE_SLICE, MAX_SLICES = 64, 32  # live tokens a threadgroup; threadgroups for the live tokens of one KV head, at most
# Rows that a lane has asked for before it uses the first, by bits: CUDA has twice Apple's registers a thread.
FLIGHT = {"metal": {32: 2, 16: 4, 8: 8, 4: 8}, "cuda": {32: 4, 16: 4, 8: 4, 4: 8}}
BLOCKS = {"metal": 96, "cuda": 124, "ops": 96}  # threadgroups a layer's parameters are cut into

Kernel = Callable[..., list[mx.array]]


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


def pack(bank: Bank, *, dtype: mx.Dtype | None = None, bits: int = 16, heads: Any = None) -> Packed:
    """One layer's bank in the form that `decode` reads; see `packing.pack`."""
    here = backend()
    one_launch = here == "cuda"
    return _pack(bank, dtype=dtype, bits=bits, heads=heads, blocks=BLOCKS[here], backend=here, one_launch=one_launch)


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
        inputs.append(packed.tickets[next(_turn) % SLOTS])
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
    slices = min(-(-live // LIVE_SLICE), MAX_SLICES)
    key = (shape, K, slices, shape[2] <= live <= S, queries.dtype, keys.dtype, padded)
    plan: Plan | None = packed.plans.get(key, _UNKNOWN)
    if plan is _UNKNOWN:
        plan = packed.plans[key] = _make_plan(packed.form, *key)
    return plan


_UNKNOWN: Any = object()


def _make_plan(
    form: Form,
    shape: tuple[int, ...],
    n_kv_heads: int,
    slices: int,
    ends: bool,
    dtype: mx.Dtype,
    live_dtype: mx.Dtype,
    padded: bool,
) -> Plan | None:
    (B, H, T, D), K = shape, form.n_kv_heads
    fits = form.head_dim == D and D in HEAD_DIMS and n_kv_heads == K and H % K == 0 and ends and 0 < T <= MAX_LENGTH
    if form.backend == "ops" or not fits or dtype != live_dtype or dtype not in _NAMES:
        return None
    rows = B * (H // K) * T
    variant = variant_for(form, rows, H // K, T, _NAMES[dtype], padded)
    threads = 32 * SIMDGROUPS
    grid = (threads * (form.blocks + K * slices), -(-rows // (variant.tiles * variant.tile)), 1)
    shapes = [((form.blocks + K * slices) * rows * (D + 2),), shape]  # of the partial results and of the output
    dtypes = [mx.float32, dtype]
    if form.slots:
        return Plan(launcher(_build(variant, "fused"), grid, shapes, dtypes), None)
    merge_grid = (threads * -(-rows // (SIMDGROUPS // variant.shares)), K, 1)
    return Plan(
        launcher(_build(variant, "partial"), grid, shapes[:1], dtypes[:1]),
        launcher(_build(variant, "merge"), merge_grid, shapes[1:], dtypes[1:]),
    )


def compose(
    bank: Bank, queries: mx.array, keys: mx.array, values: mx.array, *, mask: mx.array | str | None = "causal"
) -> mx.array:
    """`decode` by stock operations, for prompts and where no kernel is; arguments as `attention.causal` has them."""
    B, _, T, _ = queries.shape
    far = bank(attention.group(queries, keys.shape[1]))
    far = attention.Partial(*(attention.ungroup(x, B, T) for x in far))
    live = attention.causal(queries, keys, values, scale=bank.scale, mask=mask)
    return attention.merge(far, live).output.astype(queries.dtype)


def compose_nodes(
    bank: Quadrature, keys: mx.array, values: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Keys and values [B, K, m + S, D] of nodes and live tokens together, and the additive mask [1, K, 1, m + S].

    With them `mx.fast.scaled_dot_product_attention` is a quadrature and exact attention merged: the fastest stock form
    for one query token, as exact as biases rounded to `dtype` allow.
    """
    batch = keys.shape[0]
    p = {n: a.astype(dtype) for n, a in bank.parameters.items()}
    nodes = (mx.repeat(p[n][None], batch, axis=0) for n in ("keys", "values"))
    both = [mx.concatenate(list(pair), axis=2) for pair in zip(nodes, (keys, values), strict=True)]
    return both[0], both[1], mx.pad(p["bias"], [(0, 0), (0, keys.shape[2])])[None, :, None]


def launcher(
    kernel: Kernel, grid: tuple[int, int, int], output_shapes: list[tuple[int, ...]], output_dtypes: list[mx.Dtype]
) -> Kernel:
    """The kernel with all but its inputs given; the tests put a simulator here."""
    return functools.partial(
        kernel,
        grid=grid,
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=output_shapes,
        output_dtypes=output_dtypes,
    )


_turn = count()
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def variant_for(form: Form, rows: int, group: int, length: int, element: str, padded: bool) -> "Variant":
    """The text for so many query rows of a KV head in all sequences. A simdgroup holds at most four, as even as the
    simdgroups side by side allow."""
    tile = -(-rows // _tiles(rows, 4)) if rows < 4 * SIMDGROUPS else 4
    return Variant(
        backend=form.backend,
        element=element,
        storage=form.storage,
        kind=form.kind,
        head_dim=form.head_dim,
        scale=form.scale,
        n_kv_heads=form.n_kv_heads,
        group=group,
        length=length,
        tile=tile,
        tiles=_tiles(rows, tile),
        padded=padded,
    )


def _tiles(rows: int, tile: int) -> int:
    """Simdgroups side by side that hold different query rows: a power of two."""
    tiles = 1
    while tiles < SIMDGROUPS and tiles * tile < rows:
        tiles *= 2
    return tiles


@dataclass(frozen=True)
class Variant:
    """Everything that is a constant of a kernel's text."""

    backend: str
    element: str  # type of queries, keys, values and output
    storage: str  # of the parameters
    kind: str
    head_dim: int
    scale: float
    n_kv_heads: int
    group: int  # query heads of a KV head
    length: int  # query tokens
    tile: int  # query rows a simdgroup holds
    tiles: int  # simdgroups that hold different rows
    padded: bool

    @property
    def shares(self) -> int:
        """Simdgroups that share the merge of a row: a power of two."""
        return SIMDGROUPS // _tiles(self.tile, 1) if self.tiles == 1 else 1

    def text(self, stage: str) -> tuple[str, str]:
        """The kernel's header and body in Metal. stage: "partial" and "merge", or "fused", which is both."""
        quantised = self.storage.startswith("int")
        bits = int(re.sub(r"\D", "", self.storage))
        lanes = 1 << (self.head_dim // 8 - 1).bit_length()
        halved = 2 if self.tile > 2 and self.backend == "metal" else 1  # four queries a lane leave fewer registers
        numbers = {
            "HEAD_DIM": self.head_dim,
            "PARTS": self.head_dim // 8,
            "VECTORS": self.head_dim // 4,
            "LANES": lanes,
            "ROW_WORDS": self.head_dim * bits // 32,
            "GROUP": group_size(self.head_dim),
            "ROW_SCALES": self.head_dim // group_size(self.head_dim) if quantised else 0,
            "N_KV_HEADS": self.n_kv_heads,
            "QUERY_HEADS": self.group,
            "LENGTH": self.length,
            "TILE": self.tile,
            "TILES": self.tiles,
            "SHARES": self.shares,
            "ROUND": max(1, min(self.tile, 4096 // (SIMDGROUPS * self.head_dim))),
            "SIMDGROUPS": SIMDGROUPS,
            "FLIGHT": FLIGHT[self.backend][bits] // halved,
            "LIVE_FLIGHT": 2 if self.element == "float32" else FLIGHT[self.backend][16] // halved,
            "AHEAD": 8,
            "LIVE_SLICE": LIVE_SLICE,
            "MAX_SLICES": MAX_SLICES,
            "HAS_NODES": int(self.kind in ("quadrature", "corrected")),
            "HAS_UNITS": int(self.kind != "quadrature"),
        }
        flags = {
            "READS": stage != "merge",
            "MERGES": stage != "partial",
            "ONE_LAUNCH": stage == "fused",
            "HINTS": self.backend == "cuda",  # for the cache
            "NO_HINTS": self.backend != "cuda",
            "UNITS": self.kind != "quadrature",
            "GATED_UNITS": self.kind == "corrected",
            "NETWORKS": self.kind == "mlp",
            "DEEP_NETWORKS": self.kind == "deep",
            "LINEAR_UNITS": self.kind in ("mlp", "deep"),
            "PADDED": self.padded,
            "FLOATS": "float32" in (self.element, self.storage),
            "HALVES": not {self.element, self.storage}.isdisjoint(("float16", "bfloat16")),
            "BYTES": self.storage == "int8",
            "NIBBLES": self.storage == "int4",
        }
        types = {"bfloat16": "bfloat16_t", "float16": "half", "float32": "float", "int8": "Int8", "int4": "Int4"}
        lines = [
            "namespace nectar {",
            *(f"constant constexpr int {name} = {value};" for name, value in numbers.items()),
            f"constant constexpr float SCALE = {self.scale!r}f;",
            _text("rows"),
            f"typedef {types[self.element]} Element;",
            f"typedef {types[self.storage]} Weight;",
            _text("decode"),
            "}\n",
        ]
        body = _text("merge" if stage == "merge" else "partial")
        defined = {name for name, on in flags.items() if on}
        return _resolve("\n".join(lines), defined), _resolve(body, defined)


@functools.lru_cache(maxsize=256)
def _build(variant: Variant, stage: str) -> Kernel:
    outputs = {"fused": ["partials", "output"], "partial": ["partials"], "merge": ["output"]}[stage]
    if stage == "merge":
        inputs = ["queries", "parameters", "live_tokens", "partials"]
    else:
        inputs = ["queries", "keys", "values", "parameters", "live_tokens"]
        inputs += ["left_padding"] * variant.padded + ["activations"] * (variant.kind == "deep")
        inputs += ["tickets"] * (stage == "fused")
    header, body = variant.text(stage)
    name = f"nectar_{stage}_{hashlib.sha256((header + body).encode()).hexdigest()[:12]}"
    make: Any = mx.fast.metal_kernel
    if variant.backend == "cuda":
        make = mx.fast.cuda_kernel
        header, body = _cuda(header, body)
    kernel: Kernel = make(
        name=name, input_names=inputs, output_names=outputs, header=header, source=body, ensure_row_contiguous=False
    )
    return kernel


def _folder() -> Path:
    """metal/: inside the package where it is installed, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "metal"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "metal"


@functools.cache
def _text(name: str) -> str:
    return _brief((_folder() / f"{name}.metal").read_text())


def _brief(text: str) -> str:
    """Without comments and indentation: MLX copies and hashes the text at every call."""
    lines = (line.strip() for line in re.sub(r"//[^\n]*", "", text).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _resolve(text: str, defined: set[str]) -> str:
    """The text with its `#ifdef`s resolved, for the same reason."""
    kept, on = [], [True]
    for line in text.splitlines():
        if line.startswith("#ifdef "):
            on.append(on[-1] and line.split()[1] in defined)
        elif line == "#endif":
            on.pop()
        elif on[-1]:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _cuda(header: str, body: str) -> tuple[str, str]:
    """Metal text -> CUDA text: arrays of a threadgroup are shared, other address spaces are not written.

    NVRTC reads files, so what MLX copies and hashes at every call are two `#include`s of files in the cache folder.
    """

    def plain(text: str) -> str:
        text = re.sub(r"^threadgroup (\w+ \w+\[)", r"__shared__ \1", text, flags=re.M)
        return re.sub(r"\b(device|constant|threadgroup|thread) ", "", text)

    header, body = (_folder() / "cuda.h").read_text() + plain(header), "KERNEL_ATTRIBUTES\n" + plain(body)
    # MLX looks in the body for the shapes and strides to pass.
    wanted = " ".join(sorted(set(re.findall(r"\w+_(?:shape|strides)\b", body))))
    try:
        return f'#include "{_file(header)}"\n', f'// {wanted}\n#include "{_file(body)}"\n'
    except OSError:  # no folder to write to
        return header, body


def _file(text: str) -> Path:
    path = cache_folder() / "cuda" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.h"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(path)
    return path


__all__ = ["Packed", "Variant", "backend", "compose", "compose_nodes", "decode", "pack", "supports"]
