"""Sparse attention by kernels of our own: metal/sparse*.metal over metal/tiles*.metal, for Metal and CUDA.

A launch reads keys and values where they lie, near and far ones, and keeps its scores in registers, forwards and
backwards (the order of work is FlashAttention's, arXiv 2205.14135). The fixed pattern is one launch. The strided one is
two, which merge: a window, and for each column of the grid a causal attention of its own.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .. import kernels
from ..core.attention import Partial, merge
from ..core.gradients import Arrays, with_vjp
from ..kernels import source
from ..kernels.checking import summary
from ..kernels.source import Kernel
from . import checking
from .patterns import Pattern, Step

HEAD_DIMS = (64, 80, 96, 128)
_ELEMENTS = {mx.bfloat16: ("bfloat16_t", "BFLOAT"), mx.float16: ("half", "HALF")}


def supports(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether `attention` has a kernel for queries [B, H, T, D] and keys and values [B, K, S, D]."""
    dtype, head_dim = queries.dtype, queries.shape[-1]
    known = kernels.backend() != "ops" and dtype in _ELEMENTS and head_dim in HEAD_DIMS
    return known and dtype == keys.dtype == values.dtype


def works(queries: mx.array, *, pattern: Pattern, scale: float, backwards: bool) -> bool:
    """Whether the kernels compute on this machine what plain operations do; a warning where they do not.

    Each of their texts is tried once in a process: see checking.py. backwards: the kernels of gradients.
    """
    alike = pattern.at(pattern.layer % 2)  # layers take two kinds of steps in turn
    return tried(alike, scale, queries.dtype, queries.shape[-1], backwards, kernels.backend())


@functools.cache
def tried(pattern: Pattern, scale: float, dtype: mx.Dtype, head_dim: int, backwards: bool, backend: str) -> bool:
    try:
        probe = checking.probe(pattern, dtype=dtype, head_dim=head_dim, scale=scale)
        reason = probe.mismatch(functools.partial(attention, pattern=pattern, scale=scale), backwards=backwards)
    except Exception as error:  # whatever a compiler or a driver has to say must not end a training run
        reason = summary(error)
    if reason:
        what = f"{pattern}, heads of {head_dim}, {dtype}, {'backwards' if backwards else 'forwards'}"
        warnings.warn(f"plain operations instead of the kernel of sparse attention ({what}): {reason}", stacklevel=4)
    return not reason


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    pattern: Pattern,
    scale: float,
    plain: Callable[[mx.array, mx.array, mx.array], Partial] | None = None,
) -> Partial:
    """`sparse_attention` where `supports` says yes; differentiable, and the reverse pass computes the scores again.

    plain: the same by plain operations, which differentiate it where `works` says that the kernels would not.
    """
    launches = launches_of(pattern, queries.shape[1], keys.shape[1], scale, kernels.backend())

    def attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        queries, keys, values = primals
        if plain is not None and not works(queries, pattern=pattern, scale=scale, backwards=True):
            return tuple(mx.vjp(plain, list(primals), list(cotangents))[1])
        (d_output, d_log), (output, log_normalizer) = cotangents, outputs
        constants = d_log - (d_output * output).sum(-1)
        given = queries, keys, values, d_output.astype(queries.dtype), log_normalizer, constants
        gradients = zip(*(launch.backward(*given) for launch in launches), strict=True)
        return tuple(sum(of[1:], of[0]).astype(x.dtype) for of, x in zip(gradients, primals, strict=True))

    @with_vjp(attend_vjp)
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        parts = [launch.forward(queries, keys, values) for launch in launches]
        return functools.reduce(merge, parts)

    return Partial(*attend(queries, keys, values))


@functools.lru_cache(maxsize=64)
def launches_of(pattern: Pattern, n_heads: int, n_kv_heads: int, scale: float, backend: str) -> list["Launch"]:
    far = any(pattern.steps(head)[1] for head in range(n_heads))
    rows = []
    for head in range(n_heads):
        rows.append([head * n_kv_heads // n_heads, pattern.first_column(head), *map(int, pattern.steps(head))])
    steps = pattern.kernel_steps if far else pattern.kernel_steps[:1]
    plan = mx.array([*rows, [0] * 4], mx.int32)  # Metal keeps what has fewer than eight entries elsewhere
    mx.eval(plan)
    return [Launch(step, pattern, plan, scale, backend) for step in steps]


@dataclass(frozen=True)
class Tiling:
    """How a kernel holds its matrices.

    Each simdgroup of a threadgroup holds 16 of its `rows` of queries, or of keys, in registers or in threadgroup memory
    (`held`). `columns` of the others are in threadgroup memory, `piece` of them are looked at together. sums: gradients
    that a simdgroup adds up for its keys, both, or one while another simdgroup has the other.
    """

    simdgroups: int
    columns: int
    piece: int
    sums: int
    held: str

    @property
    def rows(self) -> int:
        return 16 * self.simdgroups * self.sums // 2


def tiling(stage: str, head_dim: int, backend: str) -> Tiling:
    """stage: forward, queries or keys.

    By count, a lane of Apple's must not need more than 128 registers: each matrix of a simdgroup's rows takes D / 4 and
    each of its sums D / 2. What lies in threadgroup memory instead leaves room for fewer simdgroups in its 32 KB. On
    NVIDIA there are twice as many registers, and this was measured.
    """
    if backend == "cuda":
        return Tiling(kernels.SIMDGROUPS, 32 if stage == "keys" or head_dim > 96 else 64, 32, 2, "IN_REGISTERS")
    columns, sums = 32 if stage == "keys" or head_dim >= 80 else 64, 1 if stage == "keys" else 2
    if stage == "forward" or head_dim < 96:
        return Tiling(kernels.SIMDGROUPS, columns, 16, sums, "IN_REGISTERS")
    return Tiling((4 if head_dim == 96 else 2) * (3 - sums), 16, 16, sums, "IN_THREADGROUP")


@dataclass(frozen=True, eq=False)
class Launch:
    """One step of a pattern: what `metal/sparse.metal` calls BLOCKS, WINDOW or LANES."""

    step: Step
    pattern: Pattern
    plan: mx.array
    scale: float
    backend: str

    def forward(self, queries: mx.array, keys: mx.array, values: mx.array) -> Partial:
        B, H, T, D = queries.shape
        shapes = [(B, H, T, D), (B, H, T)]
        run = self.kernel("forward", queries, blocks=self._blocks("forward", queries), shapes=shapes)
        return Partial(*run(inputs=[queries, keys, values, self.plan]))

    def backward(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        d_output: mx.array,
        log_normalizer: mx.array,
        constants: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The gradients of queries, keys and values, float32. constants: d_log - d_output · output, [B, H, T]."""
        (B, H, _, D), (K, S) = queries.shape, keys.shape[1:3]
        given = [queries, keys, values, d_output, log_normalizer, constants, self.plan]
        shapes: list[tuple[int, ...]] = [(B, H, S, D)] * 2
        blocks = self._blocks("queries", queries)
        (d_queries,) = self.kernel("queries", queries, blocks=blocks, shapes=[queries.shape])(inputs=given)
        rows, held = -(-S // self.pattern.stride), tiling("keys", D, self.backend).rows
        if self.step == "LANES":
            blocks = self.pattern.stride * -(-rows // held)
            pair = self.kernel("keys", queries, "FAR_KEYS", blocks=blocks, shapes=shapes)(inputs=given)
        else:
            flags = ["NEAR_KEYS"]
            if self.step == "BLOCKS" and any(self.pattern.steps(head)[1] for head in range(H)):
                blocks = -(-rows * self.pattern.columns // held)
                given = given + self.kernel("keys", queries, "FAR_KEYS", blocks=blocks, shapes=shapes)(inputs=given)
                flags.append("JOIN")
            pair = self.kernel("keys", queries, *flags, blocks=-(-S // held), shapes=shapes)(inputs=given)
        d_keys, d_values = [x.reshape(B, K, H // K, S, D).sum(2) for x in pair]
        return d_queries, d_keys, d_values

    def _blocks(self, stage: str, queries: mx.array) -> int:
        """Threadgroups for the queries of a head."""
        (T, D), columns = queries.shape[2:], self.pattern.stride if self.step == "LANES" else 1
        return columns * -(-T // (columns * tiling(stage, D, self.backend).rows))

    def kernel(self, stage: str, queries: mx.array, *flags: str, blocks: int, shapes: list[tuple[int, ...]]) -> Kernel:
        """The kernel of a stage for so many blocks of a head; shapes: of its outputs."""
        B, H, _, D = queries.shape
        tiles = tiling(stage, D, self.backend)
        numbers = {"HEAD_DIM": D, "COLUMNS": tiles.columns, "SLICE": tiles.piece, "ROWS": tiles.rows}
        numbers |= {"SIMDGROUPS": tiles.simdgroups, "SUMS": tiles.sums}
        numbers |= {"PARTS": D // 16, "PIECES": D // 8, "TILE_STRIDE": D + 8}
        numbers |= {"STRIDE": self.pattern.stride, "SUMMARY": self.pattern.columns, "GAP": self.pattern.gap}
        steps = (self.step, *(() if self.step == "LANES" else ("CONTIGUOUS",)))
        kernel = build(
            stage, self.backend, queries.dtype, tuple(numbers.items()), self.scale, (*steps, tiles.held, *flags)
        )
        threads = 32 * tiles.simdgroups
        return source.launcher(kernel, (threads * blocks, H, B), shapes, [mx.float32] * len(shapes), threads)


@functools.lru_cache(maxsize=256)
def build(
    stage: str,
    backend: str,
    dtype: mx.Dtype,
    numbers: tuple[tuple[str, int], ...],
    scale: float,
    flags: tuple[str, ...],
) -> Kernel:
    """The kernel of a stage: metal/sparse_{stage}.metal, with such constants and flags."""
    element, flag = _ELEMENTS[dtype]
    lines = [
        "namespace nectar {",
        f"typedef {element} Element;",
        *(f"constant constexpr int {name} = {value};" for name, value in numbers),
        f"constant constexpr float SCALE = {scale!r}f;",
        "constant constexpr float NEVER = -1e30f;",
        source.read("tiles_cuda" if backend == "cuda" else "tiles"),
        source.read("sparse"),
        "}\n",
    ]
    defined = {flag, *flags}
    header = source.resolve("\n".join(lines), defined)
    body = source.resolve(source.read(f"sparse_{stage}"), defined)
    inputs = ["queries", "keys", "values", "plan"]
    outputs = {"forward": ["output", "log_normalizer"], "queries": ["d_queries"], "keys": ["d_keys", "d_values"]}[stage]
    if stage != "forward":
        inputs[3:3] = ["d_output", "log_normalizer", "constants"]
    if "JOIN" in flags:
        inputs += ["far_d_keys", "far_d_values"]
    return source.kernel(f"sparse_{stage}", backend, header, body, inputs=inputs, outputs=outputs)
