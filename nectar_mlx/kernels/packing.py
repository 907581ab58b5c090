"""A layer's head functions as one buffer, laid out in the order in which the decode kernel reads it.

The work of every KV head is cut into blocks of about equal bytes, a block being some rows of one kind of work: nodes,
hidden units or rows of a linear path. Each block is one contiguous span (its matrices, then its scalars) that one
threadgroup streams. All places are in 32-bit words, every span starts at a multiple of 16 bytes:

    heads   n_kv_heads x (first block, end of its node blocks, end of its blocks, place of its constants)
    plan    blocks x (KV head, kind, rows, place)
    offsets n_kv_heads x [D] float32: what a head's keys are relative to (`Bank.offset`), if there is anything
    spans   one a block
    constants of each head: b_out [D], b_score, 0, 0, 0 (float32)

metal/decode.metal gives the meaning of the kinds. A matrix is rows of `HEAD_DIM` values in the storage type and, where
it is quantised, the rows' float16 scales behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.quantize import Quantized, Stored, group_size, quantize
from ..errors import NectarError
from ..heads import Bank, Corrected, HeadArrays, Quadrature, TargetScore

NODES, GATED, PLAIN, SCORE, LINEAR, GIVEN, GIVEN_SCORE = range(7)
SLOTS = 64
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
Words = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What of a packed layer the choice of a kernel depends on; `slots` is the number of counters for one launch.

    `flight` and `tile` are for trials: what `Variant` calls so, instead of what is known to be good.
    """

    kind: str
    storage: str  # float16, bfloat16, float32, int8 or int4
    n_kv_heads: int
    head_dim: int
    scale: float
    blocks: int
    slots: int
    backend: str
    offset: bool = False  # whether keys are relative to something
    flight: int | None = None
    tile: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """One layer's parameters for the decode kernel, `words` as described above.

    `deep` holds the hidden layers of networks with more than one, stacked to [K, ...]: those run as stock matmuls.
    `arrival_counters` count the threadgroups that are done with a KV head, [K] each, where one launch does everything:
    launches of one layer that may be under way at once take different ones. `checked`: whether a kernel must have
    computed the right thing elsewhere before it is launched on this layer.
    """

    words: mx.array
    form: Form
    deep: HeadArrays = field(default_factory=dict)
    arrival_counters: list[mx.array] = field(default_factory=list)
    plans: dict[Any, Any] = field(default_factory=dict)  # by shapes: what `kernels` launches
    checked: bool = True

    @property
    def n_kv_heads(self) -> int:
        return self.form.n_kv_heads

    def copy(self) -> "Packed":
        """The same in memory of its own."""
        words, arrival_counters = (
            self.words + mx.array(0, mx.uint32),
            [t + mx.array(0, mx.int32) for t in self.arrival_counters],
        )
        mx.eval(words, arrival_counters, self.deep)
        return replace(self, words=words, arrival_counters=arrival_counters, plans={})

    @property
    def nbytes(self) -> int:
        return int(self.words.nbytes) + sum(a.nbytes for a in self.deep.values())


@dataclass(frozen=True)
class _Work:
    """Rows of one kind for one head: matrices [rows, D] and scalars [rows, n]."""

    kind: int
    matrices: tuple["_Matrix", ...]
    scalars: np.ndarray[Any, np.dtype[np.float32]]

    @property
    def row_bytes(self) -> int:
        return sum(m.row_bytes for m in self.matrices) + 4 * int(self.scalars.shape[1])

    def span(self, start: int, stop: int) -> list[Words]:
        return [*(m.words(start, stop) for m in self.matrices), _words(self.scalars[start:stop])]


@dataclass(frozen=True)
class _Matrix:
    """Rows as the bytes that the kernel reads: data [rows, n] and scales [rows, D / group] (or none)."""

    data: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None

    @property
    def row_bytes(self) -> int:
        return int(self.data[:1].nbytes) + (0 if self.scales is None else int(self.scales[:1].nbytes))

    def words(self, start: int, stop: int) -> Words:
        data = self.data[start:stop].tobytes()
        return _words(data if self.scales is None else data + self.scales[start:stop].tobytes())


def pack(
    bank: Bank,
    *,
    dtype: mx.Dtype | None = None,
    bits: int = 16,
    heads: Sequence[Stored] | None = None,
    blocks: int = 128,
    backend: str = "metal",
    one_launch: bool = False,
) -> Packed:
    """Lay out one layer's bank (M = n_kv_heads heads of kind quadrature, mlp or corrected, ragged sizes).

    dtype: of the matrices with bits = 16, which means "not quantised"; by default the parameters' own. bits 8 and 4
    quantise as `quantize` does. heads: the heads' parameters, unpadded, instead of the bank's own; matrices may be
    `Quantized` already, in as many bits. blocks: threadgroups to cut a layer into.
    backend: where it will be read. one_launch: keep the counters that merging in one launch needs.
    Raises NectarError for a kind or head_dim that the kernel does not know.
    """
    heads = heads or [dict(head) for head in bank.unstack()]
    if bank.kind not in _WORK:
        raise NectarError(f"no kernel evaluates heads of kind {bank.kind!r}: use one of {', '.join(_WORK)}")
    storage = f"int{bits}" if bits < 16 else _name(dtype or next(iter(bank.parameters.values())).dtype)
    deep = _deep(bank, dtype or mx.float16) if isinstance(bank, TargetScore) and max(bank.sizes[0][1::2]) > 1 else {}
    target_units = deep["target.b_in"].shape[1] if deep else 0
    work = [_WORK[bank.kind](_Reader(head, storage, target_units)) for head in heads]
    offset = None if bank.offset is None else np.array(bank.offset.astype(mx.float32))
    words, n = _layout([w for w, _ in work], [c for _, c in work], blocks, offset)
    arrival_counters = [mx.array(np.zeros(len(heads), np.int32)) for _ in range(SLOTS * one_launch)]
    form = Form(
        kind="deep" if deep else bank.kind,
        storage=storage,
        n_kv_heads=len(heads),
        head_dim=bank.head_dim,
        scale=bank.scale,
        blocks=n,
        slots=len(arrival_counters),
        backend=backend,
        offset=offset is not None,
    )
    # Results of a computation lie in the device's memory; on CUDA what numpy hands over does not.
    return Packed(words=mx.array(words), form=form, deep=deep, arrival_counters=arrival_counters).copy()


def _name(dtype: mx.Dtype) -> str:
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise NectarError(f"parameters of type {dtype} cannot be packed: use float16, bfloat16 or float32")


class _Reader:
    """One head's parameters in the form the kernel wants."""

    def __init__(self, head: Stored, storage: str, target_units: int) -> None:
        self.head, self.storage, self.target_units = head, storage, target_units

    def matrix(self, *names: str) -> _Matrix:
        parts = [self._matrix(self.head[n]) for n in names]
        scales = [p.scales for p in parts if p.scales is not None]
        return _Matrix(np.concatenate([p.data for p in parts]), np.concatenate(scales) if scales else None)

    def _matrix(self, x: mx.array | Quantized) -> _Matrix:
        if self.storage.startswith("int"):
            q = x if isinstance(x, Quantized) else quantize(x, bits=int(self.storage[3:]))
            return _Matrix(np.array(q.data), np.array(q.scales))
        if isinstance(x, Quantized):
            raise NectarError(f"quantised parameters cannot be packed as {self.storage}: pass their number of bits")
        return _Matrix(np.array(x.astype(DTYPES[self.storage]).view(mx.uint8)), None)

    def vector(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        x = self.head[name]
        assert isinstance(x, mx.array), name
        return np.array(x.astype(mx.float32)).reshape(-1)

    def constants(self, out: str, score: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.concatenate([self.vector(out), self.vector(score)[:1]])


def _columns(*vectors: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.stack(vectors, axis=1).astype(np.float32)


def _quadrature(r: _Reader) -> tuple[list[_Work], Any]:
    return [_Work(NODES, (r.matrix("keys"), r.matrix("values")), _columns(r.vector("bias")))], np.zeros(0, np.float32)


def _corrected(r: _Reader) -> tuple[list[_Work], Any]:
    scalars = _columns(r.vector("b_gate"), r.vector("b_up"), r.vector("w_score"))
    gated = _Work(GATED, (r.matrix("w_gate"), r.matrix("w_up"), r.matrix("w_out")), scalars)
    return [*_quadrature(r)[0], gated], r.constants("b_out", "b_score")


def _networks(r: _Reader) -> tuple[list[_Work], Any]:
    w_score = r.vector("score.w_out")
    skip = r.matrix("target.skip", "score.skip")
    work = [_Work(LINEAR, (skip,), _columns(np.arange(len(skip.data))))]
    if r.target_units:
        n = len(r.vector("target.b_in"))
        work += [
            _Work(GIVEN, (r.matrix("target.w_out"),), _columns(np.arange(n))),
            _Work(GIVEN_SCORE, (), _columns(r.target_units + np.arange(len(w_score)), w_score)),
        ]
    else:
        target = (r.matrix("target.w_in"), r.matrix("target.w_out"))
        work += [
            _Work(PLAIN, target, _columns(r.vector("target.b_in"))),
            _Work(SCORE, (r.matrix("score.w_in"),), _columns(r.vector("score.b_in"), w_score)),
        ]
    return work, r.constants("target.b_out", "score.b_out")


_WORK = {Quadrature.kind: _quadrature, Corrected.kind: _corrected, TargetScore.kind: _networks}


def _deep(bank: TargetScore, dtype: mx.Dtype) -> HeadArrays:
    """The hidden layers only, in the type that stock matmuls take them in."""
    outer = ("w_out", "b_out", "skip")
    return {n: a.astype(dtype) for n, a in bank.parameters.items() if not n.endswith(outer)}


def _layout(
    work: Sequence[Sequence[_Work]], constants: Sequence[Any], blocks: int, offset: np.ndarray[Any, Any] | None
) -> tuple[Words, int]:
    """All heads' work -> the buffer and the number of blocks. offset: `Bank.offset`."""
    flat = [w for head in work for w in head]
    heads: list[tuple[int, ...]] = []
    plan: list[tuple[int, ...]] = []
    spans: list[Words] = []
    at = 0  # words after the tables

    def place(parts: list[Words]) -> int:
        nonlocal at
        start = at
        spans.extend(parts)
        at += sum(len(p) for p in parts)
        return start

    pieces = iter(_pieces([w.row_bytes * len(w.scalars) for w in flat], [len(w.scalars) for w in flat], blocks))
    for k, head in enumerate(work):
        first = nodes = len(plan)
        for w in head:
            rows, cut = len(w.scalars), next(pieces)
            for i in range(cut):
                start, stop = rows * i // cut, rows * (i + 1) // cut
                plan.append((k, w.kind, stop - start, place(w.span(start, stop))))
            nodes = len(plan) if w.kind == NODES else nodes
        heads.append((first, nodes, len(plan), place([_words(constants[k])])))
    table = np.array([*heads, *plan], np.uint32)
    before = [table.reshape(-1), _words(b"" if offset is None else offset)]
    table[:, 3] += sum(len(part) for part in before)
    padding = np.zeros(4, np.uint32)  # Metal: a buffer of at least eight values stays in the device address space
    return np.concatenate([*before, *spans, padding]), len(plan)


def _pieces(nbytes: Sequence[int], rows: Sequence[int], blocks: int) -> list[int]:
    """How many blocks each piece of work is cut into: `blocks` in all where there are rows enough, the largest block
    as small as can be."""
    pieces = [min(1, n) for n in rows]
    for _ in range(blocks - sum(pieces)):
        largest = max(range(len(rows)), key=lambda i: nbytes[i] / pieces[i] if pieces[i] < rows[i] else 0)
        pieces[largest] += pieces[largest] < rows[largest]
    return pieces


def _words(x: Any) -> Words:
    """Bytes or an array -> 32-bit words, filled up with zeros to a multiple of 16 bytes."""
    data = x if isinstance(x, bytes) else np.ascontiguousarray(x).tobytes()
    return np.frombuffer(data + bytes(-len(data) % 16), np.uint32)


def activations(deep: HeadArrays, queries: mx.array) -> mx.array:
    """Both networks' last hidden layers, [K, N, target units + score units] float32, for queries [K, N, D]."""
    parts = []
    for name in ("target", "score"):
        p = {n.removeprefix(f"{name}."): a for n, a in deep.items() if n.startswith(f"{name}.")}
        hidden = _silu(_affine(queries, p["w_in"], p["b_in"]))
        for layer in range(1, len(p) // 2):
            hidden = hidden + _silu(_affine(hidden, p[f"w_{layer}"], p[f"b_{layer}"]))
        parts.append(hidden)
    both = mx.concatenate(parts, axis=-1)
    missing = max(0, 8 - both.size)  # Metal: fewer than eight values would lie in another address space
    return mx.pad(both, [(0, 0), (0, 0), (0, missing)])


def _affine(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
    return mx.addmm(b[:, None].astype(w.dtype), x.astype(w.dtype), w.swapaxes(1, 2)).astype(mx.float32)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


__all__ = ["Packed", "activations", "group_size", "pack"]
