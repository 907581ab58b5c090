"""What a .nectar and a .kv may hold. Every file passes here before anything in it is decoded or allocated.

Types and ranges of the metadata are declared below (`msgspec`). Names, types and shapes of the tensors follow from
them: the layout and the sizes say how many numbers of each parameter there are, and the tensors must hold as many.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import mlx.core as mx
import msgspec
import numpy as np

from ..core import json_text
from ..core.quantize import group_size
from ..core.types import AnyArray, JsonObject
from ..errors import NectarError
from ..heads.hybrid import ANCHORS, HybridHead
from ..mlxlm.geometry import Geometry
from .layout import CODED, Layout, check_finite
from .tensor_file import Arrays, Tensors

_ENTRIES_PER_BYTE = 32  # coded integers, at most: what is fitted takes 4 bits each
_FEW = 1 << 20  # of which it does not matter how they are coded

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
_Window = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
_Scale = Annotated[float, msgspec.Meta(gt=0, le=1e3)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
_Word = Annotated[str, msgspec.Meta(max_length=4096)]


class _Layer(msgspec.Struct):
    kind: _Word
    n_heads: _Number
    n_kv_heads: _Number
    head_dim: _Number
    value_dim: _Number
    scale: _Scale
    window: _Window
    source: Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]
    states: Annotated[list[Annotated[list[_Length], msgspec.Meta(max_length=8)]], msgspec.Meta(max_length=16)]


class _Geometry(msgspec.Struct):
    """windows: of files that know of no other kinds of layers; or else shapes, and which of them each layer is."""

    model_type: _Word
    n_layers: _Count
    n_heads: _Count
    n_kv_heads: _Count
    head_dim: _Count
    scale: _Scale
    windows: Annotated[list[_Window], msgspec.Meta(max_length=1 << 16)] = []
    shapes: Annotated[list[_Layer], msgspec.Meta(max_length=1 << 12)] = []
    layers: Annotated[list[_Number], msgspec.Meta(max_length=1 << 16)] = []


class _Layout(msgspec.Struct):
    kind: _Word
    n_layers: _Count
    n_kv_heads: _Count
    head_dim: _Count
    scale: _Scale
    bits: Literal[4, 5, 6, 7, 8, 16] | None
    value_dim: _Number = 0


class _File(msgspec.Struct):
    """A file that the text was read from."""

    name: str
    reason: str | None
    characters: int
    unit: str
    places: list[Any]
    left_out: list[str]


class _New(msgspec.Struct):
    """What the check of an update found about what is new."""

    kl: float
    kl_no_context: float
    gap_closed: float


class _Report(msgspec.Struct):
    """What is read of a report; it may hold more, which is only shown."""

    verdict: str = ""
    error: list[float] = []
    seconds: dict[str, float] = {}
    kl: float | None = None
    agree: float | None = None
    kl_no_context: float | None = None
    gap_closed: float | None = None
    new: _New | None = None
    files: list[_File] = []
    packed_files: str = ""
    edits: str = ""
    text: str = ""


class _Adapter(msgspec.Struct):
    path: str
    sha256: _Word


class _Metadata(msgspec.Struct):
    model: _Word
    model_sha256: _Word
    tokenizer_sha256: _Word
    nectar_mlx: _Word
    geometry: _Geometry
    layout: _Layout
    report: _Report
    source: str = ""
    adapter: _Adapter | None = None
    config: dict[str, Any] = {}
    chunks: list[_Length] = []


def check(metadata: JsonObject, tensors: Tensors) -> None:
    """ValueError or NectarError unless these are the metadata and tensors of one .nectar, as they lie in the file."""
    known = json_text.typed(metadata, _Metadata)
    try:
        geometry = Geometry.from_dict(metadata["geometry"])
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its layers are none of a model ({error})") from None
    layout = Layout(**msgspec.structs.asdict(known.layout))
    same = all(getattr(geometry, name) == getattr(layout, name) for name in ("n_kv_heads", "head_dim", "scale"))
    same = same and layout.value_dim in (0 if geometry.value_dim == geometry.head_dim else -1, geometry.value_dim)
    _require(same and known.geometry.n_layers == geometry.n_layers, "its heads are not those of its model")
    _require(layout.n_layers == len(geometry.fitted), "its heads are not those of its model")
    _require(geometry.n_heads % geometry.n_kv_heads == 0, "its query heads do not share its KV heads")
    prefix = np.array(_tensor(tensors, "prefix", ("int32",), (None,)))
    _require(prefix.size and (prefix >= 0).all(), "its prefix is no text")
    tokens, chunked = prefix.size, sum(known.chunks)
    _require(chunked <= tokens, "its chunks are not those of its prefix")
    _require(not chunked or layout.bank.joinable, "heads of its kind are of one chunk")
    start = tokens - chunked + max(known.chunks, default=0)
    K, D = layout.n_kv_heads, layout.head_dim
    if "offsets" in tensors:
        _tensor(tensors, "offsets", ("bfloat16",), (layout.n_layers * K, D))
    _check_kept(geometry, tensors, start)
    _check_heads(layout, tensors, tokens)
    check_finite((name, x) for name, x in tensors.items() if not name.startswith("heads."))


def _check_kept(geometry: Geometry, tensors: Tensors, start: int) -> None:
    """What the layers without heads keep has the shapes of the model's layers. start: positions of the context."""
    floats, expected = ("float32", "float16", "bfloat16"), set[str]()
    for number, layer in enumerate(geometry.layers):
        name = f"windows.{number}"
        for part, width in (("keys", layer.head_dim), ("values", layer.value_dim)) if layer.window else ():
            _tensor(tensors, f"{name}.{part}", floats, (layer.n_kv_heads, min(layer.window, start), width))
            expected.add(f"{name}.{part}")
        for i, shape in enumerate(layer.states):
            state, scales = f"{name}.state.{i}", f"{name}.state.{i}.scales"
            _tensor(tensors, state, ("int8",) if scales in tensors else floats, shape)
            expected.add(state)
            if scales in tensors:
                _require(shape[-1] % group_size(shape[-1]) == 0, f"{state} is not made of whole groups")
                _tensor(tensors, scales, ("float16",), (*shape[:-1], shape[-1] // group_size(shape[-1])))
                expected.add(scales)
    held = {name for name in tensors if name.startswith("windows.")}
    _require(held == expected, f"it holds {min(held ^ expected, default='')!r}, or lacks it")


def _check_heads(layout: Layout, tensors: Tensors, tokens: int) -> None:
    """The tensors of the heads hold as many numbers as their sizes say; none is missing and none is left over."""
    shapes = _shapes(layout, tensors, tokens)
    held = {name for name in tensors if name.startswith("heads.")}
    matrices = {name for name, shape in shapes[0].items() if len(shape) > 1}
    coded = matrices if layout.bits is None else set[str]()
    expected = set(CODED if coded else ())
    for name in shapes[0].keys() - coded:
        count = sum(math.prod(shape[name]) for shape in shapes)
        expected |= _check_parameter(layout, tensors, f"heads.{name}", count, matrix=name in matrices)
    if coded:
        kept = [shape[name] for shape in shapes for name in coded]
        counts = sum(map(sum, kept)), sum(map(math.prod, kept))  # rows and columns have a number each in the grids
        for name, count in zip(CODED, counts, strict=True):
            nbytes = _tensor(tensors, name, ("uint8",), (None,)).size
            _require(count <= _ENTRIES_PER_BYTE * nbytes + _FEW, f"{name} cannot hold so many integers")
    _require(held == expected, f"it holds {min(held ^ expected, default='')!r}, or lacks it")
    _check_memory(layout, shapes)


def _shapes(layout: Layout, tensors: Tensors, tokens: int) -> list[dict[str, tuple[int, ...]]]:
    """Of every head's parameters, by the table of sizes."""
    least, K = layout.bank.size_for(1), layout.n_kv_heads
    table = np.array(_tensor(tensors, "sizes", ("int32",), (layout.n_layers * K, len(least))))
    # A unit takes a number at least, and a number a 32nd of a byte: what follows takes no longer than the file is.
    most = _FEW + _ENTRIES_PER_BYTE * sum(x.nbytes for name, x in tensors.items() if name.startswith("heads."))
    _require(((table >= 0) & (table <= most)).all(), "a head has an impossible size")
    some = table.reshape(-1, K, len(least)).max(1) >= np.minimum(least, 1)
    _require(some.all(), "a layer has no parameters")
    if layout.kind == "exact":
        _require((table == tokens).all(), "its heads do not hold every key")
    if issubclass(layout.bank, HybridHead):
        _require(tokens > ANCHORS, "its text is shorter than what is kept of it")
    shapes = [layout.shapes(tuple(size)) for size in table.tolist()]
    _require(all(shape.keys() == shapes[0].keys() for shape in shapes), "its heads are of several forms")
    return shapes


def _check_parameter(layout: Layout, tensors: Tensors, name: str, count: int, *, matrix: bool) -> set[str]:
    """The tensors that hold a parameter's `count` numbers of all heads, end to end."""
    if not matrix or layout.bits == 16:
        _tensor(tensors, name, ("float16", "bfloat16", "float32") if matrix else ("float16",), (count,))
        return {name}
    assert layout.bits is not None, "entropy-coded matrices have tensors of their own"
    group = layout.group
    groups, rest = divmod(count, group)
    _require(not rest, f"{name} is not made of whole groups")
    _tensor(tensors, name, ("int8",) if layout.bits == 8 else ("uint8",), (groups, group * layout.bits // 8))
    _tensor(tensors, f"{name}.scales", ("float16",), (groups,))
    return {name, f"{name}.scales"}


def _check_memory(layout: Layout, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """NectarError if the heads, each padded to the largest of its layer, take more memory than there is."""
    K, total = layout.n_kv_heads, 0
    for first in range(0, len(shapes), K):
        layer = shapes[first : first + K]
        largest = [[max(dims) for dims in zip(*(shape[n] for shape in layer), strict=True)] for n in layer[0]]
        total += 4 * K * sum(map(math.prod, largest))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > memory:
        raise NectarError(f"its heads take {total / 1e9:,.0f} GB of memory, more than this machine has")


def check_keys(small: Arrays, *, shape: tuple[int, int, int], head_dim: int) -> None:
    """NectarError unless these are the router's index and the text of a .kv. shape: its layers, KV heads, tokens."""
    L, K, tokens = shape
    n, rank = tokens - ANCHORS, small["sketch.codes"].shape[-1:] if "sketch.codes" in small else ()
    _array(small, "sketch.codes", "int8", (L, K, n, *rank))
    _require(0 < sum(rank) <= head_dim, "its sketches have no numbers")
    _require((_array(small, "sketch.scales", "float16", (L, K, n)) > 0).all(), "a key has no sketch")
    _array(small, "sketch.projection", "float16", (L, K, head_dim, *rank))
    _array(small, "sketch.mean", "float16", (L, K, head_dim))
    order = _array(small, "sketch.order", "int32", (L, K, n))
    _require((np.sort(order, -1) == np.arange(n)).all(), "its clusters do not hold every key")
    scanned = _array(small, "sketch.scanned", "float32", (L, K))
    _require(((scanned >= 0) & (scanned <= 1)).all(), "its shares of clusters are none")
    if "sources.text" in small or "sources.offsets" in small:
        size = small["sources.text"].size if "sources.text" in small else 0
        text = bytes(_array(small, "sources.text", "uint8", (size,))).decode()
        start, end = _array(small, "sources.offsets", "int32", (tokens, 2)).T
        inside = (start >= 0) & (start <= end) & (end <= len(text))
        _require((inside | ((start == -1) & (end == -1))).all(), "its tokens are not those of its text")


def _array(arrays: Arrays, name: str, dtype: str, shape: tuple[int, ...]) -> AnyArray:
    """One of them, finite; of this type and shape."""
    array = arrays.get(name)
    _require(array is not None and array.dtype == dtype and array.shape == shape, f"{name} is missing or misshapen")
    assert array is not None
    _require(array.dtype.kind != "f" or np.isfinite(array).all(), f"{name} holds numbers that are not finite")
    return array


def _tensor(tensors: Tensors, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> mx.array:
    """One of them, of one of these types and this shape; None: any length."""
    tensor = tensors.get(name)
    _require(tensor is not None and str(tensor.dtype).removeprefix("mlx.core.") in dtypes, f"{name} is of another type")
    assert tensor is not None
    fits = tensor.ndim == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape, strict=True))
    _require(fits, f"{name} is not as long as its heads say")
    return tensor


def _require(fact: object, fault: str) -> None:
    if not fact:
        raise NectarError(f"the file is damaged: {fault}")
