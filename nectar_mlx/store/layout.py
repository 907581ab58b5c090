"""How heads lie in tensors.

All heads of a kind share a few tensors: a parameter's values of all layers and heads end to end (`heads.keys`), cut by
`sizes` [layers · n_kv_heads, len(Size)]. Vectors are stored as float16, matrices in one of two ways: quantized in
groups (`heads.keys` [groups, group] and `heads.keys.scales` [groups]); or, where the layout has no `bits`,
entropy-coded (`grids`): the integers of all matrices, head by head, in `heads.numbers`, their steps in `heads.grids`.
`offsets` bfloat16 [layers · n_kv_heads, head_dim] are what each head's keys are relative to; older files have none,
their keys are absolute.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np

from ..core.quantize import Quantized, Stored, dequantize, group_size, quantize, unpack_integers
from ..core.types import ByteArray
from ..errors import NectarError
from ..heads import ALIASES, KINDS, Bank, HeadArrays
from . import grids
from .grids import Block, GridMatrix
from .tensor_file import Tensors

BITS = (4, 5, 6, 7, 8, 16)  # of a matrix entry; 16 = float
HALF_MAX = 65504.0  # the largest float16
CODED = ("heads.grids", "heads.numbers")  # tensors of entropy-coded matrices
LARGEST = 1e9  # of any number in a file: those of models are far smaller, and products of these stay finite
# (pieces, make): what `make` makes of all pieces of work, in their order.
Shared = Callable[[Sequence[slice], Callable[[Sequence[slice]], list[Tensors]]], list[Tensors]]
_Parameter = TypeVar("_Parameter", bound=mx.array | Quantized)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How heads lie in tensors: their kind, how many there are and how wide they are. bits: of a matrix entry, one of
    BITS, or None: every row in as many as it needs. value_dim: how much of a value is stored, where a model's values
    are narrower than its keys; the rest of it is zero. 0: as wide as keys."""

    kind: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    scale: float
    bits: int | None
    value_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ALIASES.get(self.kind, self.kind))
        if self.kind not in KINDS or self.bits not in (*BITS, None) or not 0 <= self.value_dim <= self.head_dim > 0:
            raise ValueError(f"unknown layout: {self}")

    @property
    def bank(self) -> type[Bank]:
        return KINDS[self.kind]

    @property
    def group(self) -> int:
        """Numbers that share a scale: whole groups make a key, and a value."""
        return group_size(math.gcd(self.head_dim, self.value_dim))

    def shapes(self, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of every parameter of a head of this size, as it is stored."""
        shapes = self.bank.shapes(size, self.head_dim)
        return {name: (*s[:-1], self.value_dim) if self._is_narrow(name) else s for name, s in shapes.items()}

    def narrowed(self, head: HeadArrays) -> HeadArrays:
        """A head as it is stored."""
        return {name: x[..., : self.value_dim] if self._is_narrow(name) else x for name, x in head.items()}

    def widened(self, head: HeadArrays) -> HeadArrays:
        """A stored head, its values as wide as its keys."""
        missing = [(0, 0), (0, self.head_dim - self.value_dim)]
        return {name: mx.pad(x, missing) if self._is_narrow(name) else x for name, x in head.items()}

    def _is_narrow(self, name: str) -> bool:
        return 0 < self.value_dim < self.head_dim and name in self.bank.made_of_values


# (layout, tensors, name, start, shape): one parameter of one head; start: where it lies among the values of all heads.
_Read = Callable[[Layout, Tensors, str, int, tuple[int, ...]], _Parameter]


def head_bytes(layout: Layout, size: tuple[int, ...], *, bits: float = grids.MEAN_BITS) -> float:
    """Bytes that a head of this size takes in the file; about so many where it is coded, in so many bits a number."""
    return sum(_parameter_bytes(layout, shape, bits) for shape in layout.shapes(size).values())


def _parameter_bytes(layout: Layout, shape: tuple[int, ...], bits: float) -> float:
    if len(shape) == 1 or layout.bits == 16:
        return 2 * math.prod(shape)
    if layout.bits is None:
        return grids.expected_bytes(shape[0], shape[1], bits=bits)
    return math.prod(shape) * (layout.bits / 8 + 2 / layout.group)


def mean_bits(layout: Layout, tensors: Tensors) -> float:
    """Bits that an entry of a matrix takes in the file, on average."""
    if layout.bits is not None:
        return layout.bits
    shapes = [shape for size in _sizes(layout, tensors) for shape in _matrix_shapes(layout, size).values()]
    return round(8 * tensors["heads.numbers"].nbytes / max(1, sum(map(math.prod, shapes))), 2)


def alone(pieces: Sequence[slice], make: Callable[[Sequence[slice]], list[Tensors]]) -> list[Tensors]:
    """`Shared` of a single process."""
    return make(pieces)


def pack(
    layout: Layout,
    heads: Sequence[HeadArrays],
    *,
    offsets: Sequence[mx.array | None] = (),
    shared: Shared = alone,
) -> Tensors:
    """All heads, layer by layer -> the tensors of the file. offsets: of each layer's heads, [K, D]; none are zero.
    shared: what is made of all pieces of work, in their order; ranks can share it."""
    sizes = [layout.bank.size_of(h) for h in heads]
    heads = [layout.narrowed(head) for head in heads]
    tensors: Tensors = {"sizes": mx.array(sizes, dtype=mx.int32)}
    if any(offset is not None for offset in offsets):
        zero = mx.zeros((layout.n_kv_heads, layout.head_dim))
        tensors["offsets"] = mx.concatenate([zero if x is None else x for x in offsets]).astype(mx.bfloat16)
    for name, array in heads[0].items():
        flat = [h[name].reshape(-1, h[name].shape[-1]) if array.ndim > 1 else h[name] for h in heads]
        if array.ndim == 1:
            tensors[f"heads.{name}"] = mx.concatenate(flat).astype(mx.float16)
        elif layout.bits == 16:
            matrices = mx.concatenate([a.reshape(-1) for a in flat])
            tensors[f"heads.{name}"] = matrices if layout.kind == "exact" else _in_16_bits(matrices)
        elif layout.bits is not None:
            parts = [quantize(a.reshape(-1, layout.group), bits=layout.bits) for a in flat]
            tensors[f"heads.{name}"] = mx.concatenate([p.data for p in parts])
            tensors[f"heads.{name}.scales"] = mx.concatenate([p.scales for p in parts])[:, 0]
    if layout.bits is None:
        tensors |= _packed_matrices([h[n] for h in heads for n in _matrix_shapes(layout, sizes[0])], shared)
    mx.eval(tensors)
    return tensors


def _packed_matrices(matrices: Sequence[mx.array], shared: Shared) -> Tensors:
    """Matrices [rows, D], entropy-coded. shared: as for `pack`."""

    def coded(pieces: Sequence[slice]) -> list[Tensors]:
        values = [[np.array(x.astype(mx.float32)) for x in matrices[piece]] for piece in pieces]
        return [{n: mx.array(x) for n, x in block._asdict().items()} for block in grids.coded(values)]

    made = shared(grids.blocks([x.size for x in matrices]), coded)
    every = [Block(**{name: np.array(x) for name, x in block.items()}) for block in made]
    return _named(grids.join(every, [x.shape for x in matrices]))


def _in_16_bits(matrices: mx.array) -> mx.array:
    """Fitted matrices are float32, and budgets count two bytes an entry."""
    fits = not matrices.size or bool(mx.abs(matrices).max() < HALF_MAX)
    return matrices.astype(mx.float16 if fits else mx.bfloat16)


def _named(parts: tuple[ByteArray, ByteArray]) -> Tensors:
    return {name: mx.array(data) for name, data in zip(CODED, parts, strict=True)}


def unpack(layout: Layout, tensors: Tensors, *, half: bool = False, trusted: bool = False) -> list[Bank]:
    """The tensors of the file -> one bank a layer. NectarError if the tensors do not fit each other.

    half: matrices of fewer than 16 bits in float16 instead of float32, which changes them far less than rounding did.
    trusted: that no number is not finite is checked elsewhere.
    """
    banks, halved, offsets = list[Bank](), half and layout.bits != 16, _offsets(layout, tensors)
    for heads, offset in zip(_layers(layout, tensors, _floats), offsets, strict=True):
        if not trusted:
            check_finite((name, x) for head in heads for name, x in head.items())
        heads = [layout.widened(head) for head in heads]
        heads = [{n: _halved(x) if halved and x.ndim > 1 else x for n, x in head.items()} for head in heads]
        banks.append(layout.bank.stack(heads, scale=layout.scale, offset=offset))
        mx.eval(banks[-1].parameters)  # layer by layer: on the way from bits to floats there is far more
    return banks


def check_finite(arrays: Iterable[tuple[str, mx.array]]) -> None:
    """NectarError that names the first array with a number that is not finite, or that no model has."""
    for name, x in arrays:
        if not mx.issubdtype(x.dtype, mx.floating) or not x.size:
            continue
        if not (mx.abs(x.astype(mx.float32)) <= LARGEST).all().item():
            raise NectarError(f"the file is damaged: {name} holds numbers that are not finite or far too large")


def _halved(x: mx.array) -> mx.array:
    """In float16, if that can hold it."""
    return x.astype(mx.float16) if not x.size or bool(mx.abs(x).max() < HALF_MAX) else x


def _offsets(layout: Layout, tensors: Tensors) -> list[mx.array | None]:
    """Of each layer's heads, [K, D] float32."""
    if "offsets" not in tensors:
        return [None] * layout.n_layers
    offsets = tensors["offsets"]
    if offsets.shape != (layout.n_layers * layout.n_kv_heads, layout.head_dim):
        raise NectarError("the file is damaged: its offsets are not those of its heads")
    return list(offsets.astype(mx.float32).reshape(layout.n_layers, layout.n_kv_heads, -1))


def integer_heads(layout: Layout, tensors: Tensors) -> list[list[Stored]]:
    """Every layer's heads with the file's own integers, a byte each, in all matrices whose rows are whole groups."""
    return list(_layers(layout, tensors, _integers))


def select_nodes(layout: Layout, tensors: Tensors, nodes: Sequence[np.ndarray]) -> Tensors:
    """The same heads with some of their nodes only, nodes[i] (indices) of head i; nothing is rounded again. For
    quadratures, whose parameters all have one row a node."""
    sizes = np.array(tensors["sizes"])[:, 0]
    rows = np.concatenate([start + chosen for start, chosen in zip(np.cumsum(sizes) - sizes, nodes, strict=True)])
    selected: Tensors = {"sizes": mx.array([[len(chosen)] for chosen in nodes], dtype=mx.int32)}
    if "offsets" in tensors:
        selected["offsets"] = tensors["offsets"]
    for name, tensor in tensors.items():
        if name.startswith("heads.") and name not in CODED:
            groups = tensor.shape[0] // int(sizes.sum())  # of a node
            selected[name] = tensor[mx.array((rows[:, None] * groups + np.arange(groups)).ravel())]
    if layout.bits is None:
        chosen = [n for n in nodes for _ in _matrix_shapes(layout, (1,))]
        matrices = zip(_matrices(layout, tensors), chosen, strict=True)
        selected |= _named(grids.encode([GridMatrix(m.integers[n], m.exponents[n]) for m, n in matrices]))
    mx.eval(selected)
    return selected


def _matrices(layout: Layout, tensors: Tensors) -> Iterator[GridMatrix]:
    """The entropy-coded matrices, head by head."""
    shapes = [shape for size in _sizes(layout, tensors) for shape in _matrix_shapes(layout, size).values()]
    scales, integers = [np.array(_tensor(tensors, name)) for name in CODED]
    return grids.decode(scales, integers, shapes)


def _matrix_shapes(layout: Layout, size: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Of a head's parameters, in storage order, those that are matrices."""
    shapes = layout.shapes(size)
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) > 1}


def _sizes(layout: Layout, tensors: Tensors) -> list[tuple[int, ...]]:
    rows: Any = tensors["sizes"].tolist()
    sizes = [tuple(row) for row in rows]
    if len(sizes) != layout.n_layers * layout.n_kv_heads:
        raise NectarError("the file is damaged: its heads are not those of its model")
    if min(map(min, sizes), default=0) < 0:
        raise NectarError("the file is damaged: a head has less than no parameters")
    return sizes


def _layers(layout: Layout, tensors: Tensors, read: _Read[_Parameter]) -> Iterator[list[dict[str, _Parameter]]]:
    """The heads of each layer. read: how a parameter that is not entropy-coded is taken from its tensor."""
    sizes, K, ends = _sizes(layout, tensors), layout.n_kv_heads, dict[str, int]()
    coded = _matrices(layout, tensors) if layout.bits is None else iter(())
    for i in range(0, len(sizes), K):
        heads: list[dict[str, _Parameter]] = [{} for _ in range(K)]
        for head, size in zip(heads, sizes[i : i + K], strict=True):
            for name, shape in layout.shapes(size).items():
                if layout.bits is None and len(shape) > 1:
                    head[name] = cast(_Parameter, mx.array(next(coded).values))
                    continue
                start = ends.get(name, 0)
                ends[name] = start + math.prod(shape)
                if ends[name] > _count(layout, _tensor(tensors, f"heads.{name}")):
                    raise NectarError(f"the file is damaged: {name} is shorter than its sizes say")
                head[name] = read(layout, tensors, name, start, shape)
        yield heads
    for name, end in ends.items():
        if end != _count(layout, tensors[f"heads.{name}"]):
            raise NectarError(f"the file is damaged: {name} is longer than its sizes say")


def _tensor(tensors: Tensors, name: str) -> mx.array:
    if name not in tensors:
        raise NectarError(f"the file is damaged: {name} is missing")
    return tensors[name]


def _count(layout: Layout, data: mx.array) -> int:
    """How many values a parameter has."""
    return int(data.size if data.ndim == 1 else data.shape[0] * layout.group)


def _floats(layout: Layout, tensors: Tensors, name: str, start: int, shape: tuple[int, ...]) -> mx.array:
    data, stop = tensors[f"heads.{name}"], start + math.prod(shape)
    if data.ndim == 1:
        plain = data[start:stop].reshape(shape)
        # Vectors are small. In float16 the number that pads a bias would be an infinity.
        return plain if layout.bits == 16 and len(shape) > 1 else plain.astype(mx.float32)
    bits, scales, group = layout.bits, _tensor(tensors, f"heads.{name}.scales"), layout.group
    assert bits is not None, "entropy-coded matrices are read elsewhere"
    if scales.shape[0] != data.shape[0] or data.nbytes * 8 != data.shape[0] * group * bits:
        raise NectarError(f"the file is damaged: {name} is not as long as its scales and bits say")
    groups = slice(start // group, -(-stop // group))
    values = dequantize(Quantized(data[groups], scales[groups, None]), bits=bits).reshape(-1)
    return values[start % group :][: stop - start].reshape(shape)


def _integers(layout: Layout, tensors: Tensors, name: str, start: int, shape: tuple[int, ...]) -> mx.array | Quantized:
    data, group = tensors[f"heads.{name}"], layout.group
    if data.ndim == 1 or len(shape) < 2 or shape[-1] % group or start % group:
        return _floats(layout, tensors, name, start, shape)
    groups = slice(start // group, (start + math.prod(shape)) // group)
    assert layout.bits is not None, "entropy-coded matrices are read elsewhere"
    integers = unpack_integers(data[groups], bits=layout.bits).astype(mx.int8)
    scales = tensors[f"heads.{name}.scales"][groups]
    return Quantized(integers.reshape(shape), scales.reshape(*shape[:-1], shape[-1] // group))
