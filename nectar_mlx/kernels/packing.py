"""A layer's head functions as one buffer, laid out in the order in which the decode kernel reads it.

The work of every KV head is cut into blocks of about equal bytes, a block being some rows of one kind of work: nodes,
hidden units or rows of a linear path. Each block is one contiguous span (its matrices, then its scalars) that one
threadgroup streams. All places are in 32-bit words, every span starts at a multiple of 16 bytes:

    heads   n_kv_heads x (first block, end of its node blocks, end of its blocks, place of its constants)
    plan    blocks x (KV head, `WorkKind`, rows, place)
    offsets n_kv_heads x [D] float32: what a head's keys are relative to (`Bank.offset`), if there is anything
    spans   one a block
    constants of each head: b_out [D], b_score, 0, 0, 0 (float32)

A kind of head says what its work is (`Bank.decode_work`). A matrix is rows of `HEAD_DIM` values in the storage type
and, where it is quantised, the rows' float16 scales behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..core.quantize import Quantized, Stored, quantize
from ..core.types import AnyArray, FloatArray, WordArray
from ..errors import NectarError
from ..heads import Bank
from ..heads.work import Layer, Network, WorkItem, WorkKind

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What of a packed layer the choice of a kernel depends on.

    `flight` and `tile` are for trials: what `Variant` calls so, instead of what is known to be good.
    """

    kind: str  # of the heads
    work: frozenset[WorkKind]
    storage: str  # float16, bfloat16, float32, int8 or int4
    n_kv_heads: int
    head_dim: int
    scale: float
    blocks: int
    backend: str
    one_launch: bool = False  # whether one launch both reads and merges
    offset: bool = False  # whether keys are relative to something
    flight: int | None = None
    tile: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """One layer's parameters for the decode kernel: `words` as described above, and the hidden layers of networks that
    have more than one, which run as stock matmuls."""

    words: mx.array
    form: Form
    networks: tuple[Network, ...] = ()

    @property
    def n_kv_heads(self) -> int:
        return self.form.n_kv_heads

    def copy(self) -> "Packed":
        """The same in memory of its own."""
        words = self.words + mx.array(0, mx.uint32)
        mx.eval(words, self.networks)
        return replace(self, words=words)

    @property
    def nbytes(self) -> int:
        layers = [layer for network in self.networks for layer in network]
        return int(self.words.nbytes) + sum(layer.weights.nbytes + layer.bias.nbytes for layer in layers)


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
    """Lay out one layer's bank (M = n_kv_heads heads, ragged sizes).

    dtype: of the matrices with bits = 16, which means "not quantised"; by default the parameters' own. bits 8 and 4
    quantise as `quantize` does. heads: the heads' parameters, unpadded, instead of the bank's own; matrices may be
    `Quantized` already, in as many bits. blocks: threadgroups to cut a layer into.
    backend: where it will be read. one_launch: whether one launch will both read and merge.
    Raises NectarError for a kind or head_dim that the kernel does not know.
    """
    heads = heads or [dict(head) for head in bank.unstack()]
    work = bank.decode_work()
    if work is None:
        raise NectarError(f"no kernel evaluates heads of kind {bank.kind!r}: decode with plain operations")
    storage = f"int{bits}" if bits < 16 else _name(dtype or next(iter(bank.parameters.values())).dtype)
    offset = None if bank.offset is None else np.array(bank.offset.astype(mx.float32))
    rows = [[_rows(head, item, storage) for item in work.items] for head in heads]
    words, n_blocks = _layout(rows, [_constants(head, work.constants) for head in heads], blocks, offset)
    form = Form(
        kind=bank.kind,
        work=work.kinds,
        storage=storage,
        n_kv_heads=len(heads),
        head_dim=bank.head_dim,
        scale=bank.scale,
        blocks=n_blocks,
        backend=backend,
        one_launch=one_launch,
        offset=offset is not None,
    )
    networks = tuple(_cast(network, dtype or mx.float16) for network in work.networks)
    # Results of a computation lie in the device's memory; on CUDA what numpy hands over does not.
    return Packed(words=mx.array(words), form=form, networks=networks).copy()


def _name(dtype: mx.Dtype) -> str:
    for name, known in DTYPES.items():
        if dtype == known:
            return name
    raise NectarError(f"parameters of type {dtype} cannot be packed: use float16, bfloat16 or float32")


def _cast(network: Network, dtype: mx.Dtype) -> Network:
    """In the type that stock matmuls take it in."""
    return tuple(Layer(layer.weights.astype(dtype), layer.bias.astype(dtype)) for layer in network)


@dataclass(frozen=True)
class _Matrix:
    """Rows as the bytes that the kernel reads: data [rows, n] and scales [rows, D / group] (or none)."""

    data: AnyArray
    scales: AnyArray | None

    @property
    def row_bytes(self) -> int:
        return int(self.data[:1].nbytes) + (0 if self.scales is None else int(self.scales[:1].nbytes))

    def words(self, start: int, stop: int) -> WordArray:
        data = self.data[start:stop].tobytes()
        return _words(data if self.scales is None else data + self.scales[start:stop].tobytes())


@dataclass(frozen=True)
class _Rows:
    """A `WorkItem` of one head: matrices [rows, D] and scalars [rows, n]."""

    kind: WorkKind
    matrices: list[_Matrix]
    scalars: FloatArray

    def __len__(self) -> int:
        return len(self.scalars)

    @property
    def nbytes(self) -> int:
        return len(self) * (sum(m.row_bytes for m in self.matrices) + 4 * int(self.scalars.shape[1]))

    def span(self, start: int, stop: int) -> list[WordArray]:
        return [*(m.words(start, stop) for m in self.matrices), _words(self.scalars[start:stop].tobytes())]


def _rows(head: Stored, item: WorkItem, storage: str) -> _Rows:
    matrices = [_matrix(head, names, storage) for names in item.matrices]
    vectors = {name: _vector(head, name) for name in item.scalars if isinstance(name, str)}
    count = len(matrices[0].data) if matrices else len(next(iter(vectors.values())))
    columns = [vectors[x] if isinstance(x, str) else x + np.arange(count) for x in item.scalars]
    return _Rows(item.kind, matrices, np.stack(columns, axis=1).astype(np.float32))


def _matrix(head: Stored, names: str | tuple[str, ...], storage: str) -> _Matrix:
    if isinstance(names, tuple):
        parts = [_matrix(head, name, storage) for name in names]
        scales = [part.scales for part in parts if part.scales is not None]
        return _Matrix(np.concatenate([part.data for part in parts]), np.concatenate(scales) if scales else None)
    x = head[names]
    if storage.startswith("int"):
        q = x if isinstance(x, Quantized) else quantize(x, bits=int(storage[3:]))
        return _Matrix(np.array(q.data), np.array(q.scales))
    if isinstance(x, Quantized):
        raise NectarError(f"quantised parameters cannot be packed as {storage}: pass their number of bits")
    return _Matrix(np.array(x.astype(DTYPES[storage]).view(mx.uint8)), None)


def _vector(head: Stored, name: str) -> FloatArray:
    x = head[name]
    assert isinstance(x, mx.array), name
    return np.array(x.astype(mx.float32)).reshape(-1)


def _constants(head: Stored, names: tuple[str, str] | None) -> WordArray:
    vectors = [_vector(head, name) for name in names or ()]
    return _words(b"".join(vector.tobytes() for vector in vectors))


def _layout(
    heads: Sequence[Sequence[_Rows]], constants: Sequence[WordArray], blocks: int, offset: FloatArray | None
) -> tuple[WordArray, int]:
    """All heads' rows -> the buffer and the number of blocks. offset: `Bank.offset`."""
    table: list[tuple[int, ...]] = []  # of heads
    plan: list[tuple[int, ...]] = []
    spans: list[WordArray] = []
    place = 0  # of the next span, in words after the tables
    cuts = _cuts([rows for head in heads for rows in head], blocks)
    for k, (head, constant) in enumerate(zip(heads, constants, strict=True)):
        first = node_stop = len(plan)
        for rows in head:
            for start, stop in _evenly(len(rows), next(cuts)):
                plan.append((k, rows.kind, stop - start, place))
                span = rows.span(start, stop)
                spans += span
                place += sum(len(words) for words in span)
            node_stop = len(plan) if rows.kind == WorkKind.NODES else node_stop
        table.append((first, node_stop, len(plan), place))
        spans.append(constant)
        place += len(constant)
    tables = np.array([*table, *plan], np.uint32)
    offsets = _words(b"" if offset is None else offset.tobytes())
    tables[:, 3] += tables.size + len(offsets)
    padding = np.zeros(4, np.uint32)  # Metal: a buffer of at least eight values stays in the device address space
    return np.concatenate([tables.reshape(-1), offsets, *spans, padding]), len(plan)


def _cuts(items: Sequence[_Rows], blocks: int) -> Iterator[int]:
    """How many blocks each item is cut into: `blocks` in all where there are rows enough, the largest block as small as
    can be."""
    cuts = [min(1, len(rows)) for rows in items]
    for _ in range(blocks - sum(cuts)):
        divisible = [i for i, rows in enumerate(items) if cuts[i] < len(rows)]
        if not divisible:
            break
        cuts[max(divisible, key=lambda i: items[i].nbytes / cuts[i])] += 1
    return iter(cuts)


def _evenly(rows: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each block."""
    for i in range(blocks):
        yield rows * i // blocks, rows * (i + 1) // blocks


def _words(data: bytes) -> WordArray:
    """32-bit words, filled up with zeros to a multiple of 16 bytes."""
    return np.frombuffer(data + bytes(-len(data) % 16), np.uint32)


def activations(networks: Sequence[Network], queries: mx.array) -> mx.array:
    """The networks' last hidden layers side by side, [K, N, units] float32, for queries [K, N, D]."""
    outputs = []
    for first, *others in networks:
        hidden = _silu(_affine(queries, first))
        for layer in others:
            hidden = hidden + _silu(_affine(hidden, layer))
        outputs.append(hidden)
    joined = mx.concatenate(outputs, axis=-1)
    missing = max(0, 8 - joined.size)  # Metal: fewer than eight values would lie in another address space
    return mx.pad(joined, [(0, 0), (0, 0), (0, missing)])


def _affine(x: mx.array, layer: Layer) -> mx.array:
    w, b = layer
    return mx.addmm(b[:, None].astype(w.dtype), x.astype(w.dtype), w.swapaxes(1, 2)).astype(mx.float32)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)
