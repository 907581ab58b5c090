"""The .nectar file: one safetensors file that holds everything a model needs to answer about a context.

Metadata are strings; `digest` covers every tensor. All heads of a kind share a few tensors: each parameter's values
of all layers and heads end to end (`heads.keys`), cut by the sizes in `sizes` [layers · n_kv_heads, numbers a head].
Matrices are stored quantised in groups (`heads.keys` [groups, group] and `heads.keys.scales` [groups]), vectors as
float16.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from . import __version__
from .adapter import Geometry
from .cache import Window
from .errors import NectarError
from .heads import KINDS, Bank, HeadArrays
from .quantize import Quantized, Stored, dequantize, group_size, quantize, unpack_integers

FORMAT = "nectar-1"
_TEXTS = {"format", "digest", "prefix_sha256", "model", "model_sha256", "tokenizer_sha256", "nectar_mlx", "source"}
_NEEDED = _TEXTS - {"source"} | {"geometry", "layout", "report"}
BITS = (4, 5, 6, 7, 8, 16)  # of a matrix entry; 16 = float
Tensors = dict[str, mx.array]
Metadata = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How heads lie in tensors: their kind, how many and how wide, and the bits a matrix entry takes, one of BITS."""

    kind: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    scale: float
    bits: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.bits not in BITS or self.head_dim < 1:
            raise ValueError(f"unknown layout: {self}")

    @property
    def bank(self) -> type[Bank]:
        return KINDS[self.kind]


def head_bytes(layout: Layout, size: tuple[int, ...]) -> float:
    """Bytes that a head of this size takes in the file."""
    total = 0.0
    for shape in layout.bank.shapes(size, layout.head_dim).values():
        count = math.prod(shape)
        quantised = len(shape) > 1 and layout.bits < 16
        total += count * (layout.bits / 8 + 2 / group_size(layout.head_dim)) if quantised else 2 * count
    return total


def pack(layout: Layout, heads: Sequence[HeadArrays]) -> Tensors:
    """All heads, layer by layer -> the tensors of the file."""
    sizes = [layout.bank.size_of(h) for h in heads]
    tensors: Tensors = {"sizes": mx.array(sizes, dtype=mx.int32)}
    for name, array in heads[0].items():
        flat = [h[name].reshape(-1, h[name].shape[-1]) if array.ndim > 1 else h[name] for h in heads]
        if array.ndim == 1:
            tensors[f"heads.{name}"] = mx.concatenate(flat).astype(mx.float16)
        elif layout.bits == 16:
            tensors[f"heads.{name}"] = mx.concatenate([a.reshape(-1) for a in flat])
        else:
            parts = [quantize(a.reshape(-1, group_size(layout.head_dim)), bits=layout.bits) for a in flat]
            tensors[f"heads.{name}"] = mx.concatenate([p.data for p in parts])
            tensors[f"heads.{name}.scales"] = mx.concatenate([p.scales for p in parts])[:, 0]
    mx.eval(tensors)
    return tensors


def unpack(layout: Layout, tensors: Tensors, *, half: bool = False) -> list[Bank]:
    """The tensors of the file -> one bank a layer. half: matrices that were quantised in float16 instead of float32,
    which rounds them by far less than their bits did. NectarError if the tensors do not fit each other.
    """
    banks, matrices = list[Bank](), mx.float16 if half and layout.bits < 16 else None
    for heads in _layers(layout, tensors, _floats):
        heads = [{n: x.astype(matrices) if matrices and x.ndim > 1 else x for n, x in head.items()} for head in heads]
        banks.append(layout.bank.stack(heads, scale=layout.scale))
        mx.eval(banks[-1].parameters)  # layer by layer: on the way from bits to floats there is far more
    return banks


def stored(layout: Layout, tensors: Tensors) -> list[list[Stored]]:
    """Every layer's heads with the file's own integers, a byte each, in all matrices whose rows are whole groups."""
    return list(_layers(layout, tensors, _integers))


def _layers(layout: Layout, tensors: Tensors, read: Callable[..., Any]) -> Iterator[list[dict[str, Any]]]:
    """The heads of each layer; read(layout, tensors, name, start, shape) gives one parameter of one head, start being
    where it lies among the values of all heads."""
    rows: Any = tensors["sizes"].tolist()
    sizes = [tuple(row) for row in rows]
    if len(sizes) != layout.n_layers * layout.n_kv_heads:
        raise NectarError("the file is damaged: its heads are not those of its model")
    K, ends = layout.n_kv_heads, dict[str, int]()
    for i in range(0, len(sizes), K):
        heads: list[dict[str, Any]] = [{} for _ in range(K)]
        for head, size in zip(heads, sizes[i : i + K], strict=True):
            for name, shape in layout.bank.shapes(size, layout.head_dim).items():
                start = ends.get(name, 0)
                ends[name] = start + math.prod(shape)
                if min(shape) < 0 or ends[name] > _count(layout, _tensor(tensors, f"heads.{name}")):
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
    return int(data.size if data.ndim == 1 else data.shape[0] * group_size(layout.head_dim))


def _floats(layout: Layout, tensors: Tensors, name: str, start: int, shape: tuple[int, ...]) -> mx.array:
    data, stop = tensors[f"heads.{name}"], start + math.prod(shape)
    if data.ndim == 1:
        plain = data[start:stop].reshape(shape)
        return plain if layout.bits == 16 else plain.astype(mx.float32)
    scales, group = _tensor(tensors, f"heads.{name}.scales"), group_size(layout.head_dim)
    if scales.shape[0] != data.shape[0] or data.nbytes * 8 != data.shape[0] * group * layout.bits:
        raise NectarError(f"the file is damaged: {name} is not as long as its scales and bits say")
    rows = slice(start // group, -(-stop // group))
    values = dequantize(Quantized(data[rows], scales[rows, None]), bits=layout.bits).reshape(-1)
    return values[start % group :][: stop - start].reshape(shape)


def _integers(layout: Layout, tensors: Tensors, name: str, start: int, shape: tuple[int, ...]) -> mx.array | Quantized:
    data, group = tensors[f"heads.{name}"], group_size(layout.head_dim)
    if data.ndim == 1 or len(shape) < 2 or shape[-1] % group or start % group:
        return _floats(layout, tensors, name, start, shape)
    rows = slice(start // group, (start + math.prod(shape)) // group)
    whole = unpack_integers(data[rows], bits=layout.bits).astype(mx.int8)
    scales = tensors[f"heads.{name}.scales"][rows]
    return Quantized(whole.reshape(shape), scales.reshape(*shape[:-1], shape[-1] // group))


def contents(
    layout: Layout, heads: Sequence[HeadArrays], *, prefix: Sequence[int], windows: Mapping[int, Window]
) -> Tensors:
    """All tensors of a file, quantised: writing them loses nothing more.

    heads: layer by layer. windows: what the sliding-window layers keep, by layer.
    """
    tensors = {"prefix": mx.array(list(prefix), dtype=mx.int32)} | pack(layout, heads)
    for layer, window in windows.items():
        tensors |= {f"windows.{layer}.keys": window.keys, f"windows.{layer}.values": window.values}
    return tensors


def description(
    tensors: Tensors,
    layout: Layout,
    geometry: Geometry,
    *,
    provenance: Mapping[str, Any],
    report: Mapping[str, Any],
    chunks: Sequence[int] = (),
) -> Metadata:
    """What a file tells beside its tensors. provenance: the model and the settings. report: what was measured.

    chunks: lengths of the last pieces of the prefix, where each was read on its own.
    """
    return {
        "nectar_mlx": __version__,
        "prefix_sha256": prefix_digest(tensors),
        "geometry": geometry.to_dict(),
        "layout": asdict(layout),
        "report": dict(report),
        "chunks": list(chunks) if len(chunks) > 1 else [],
        **provenance,
    }


def prefix_digest(tensors: Tensors) -> str:
    """sha256 of the token ids, as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(np.array(tensors["prefix"]), dtype="<i4").data).hexdigest()


def digest(tensors: Tensors) -> str:
    """sha256 over every tensor's name, type, shape and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        sha.update(f"{name} {array.dtype} {array.shape};".encode())
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        sha.update(np.ascontiguousarray(np.array(raw)).data)
    return sha.hexdigest()


def write(path: Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Writes the file in one step: all of it appears, or nothing changes. NectarError when it cannot."""
    strings = {k: v if k in _TEXTS else json.dumps(v) for k, v in metadata.items()}
    strings |= {"format": FORMAT, "digest": digest(tensors)}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".safetensors")
        os.close(handle)
        mx.save_safetensors(temporary, tensors, strings)
        with open(temporary, "rb+") as file:
            _check_written(file.fileno(), tensors)
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise NectarError(f"cannot write {path}: {reason}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """NectarError unless a .nectar can be written there, as far as can be known before."""
    if path.is_dir():
        raise NectarError(f"{path} is a folder: give a file name with --output")
    if path.exists() and not is_nectar(path):
        raise NectarError(f"{path} exists and is not a .nectar: choose another --output")
    if not path.parent.is_dir():
        raise NectarError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise NectarError(f"{path.parent} cannot be written to")


def _check_written(descriptor: int, tensors: Tensors) -> None:
    """MLX's writer does not report a full disk; a short file does."""
    if os.fstat(descriptor).st_size < sum(t.nbytes for t in tensors.values()):
        raise OSError(28, "no space left on the device")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path) -> tuple[Tensors, Metadata]:
    """The file's tensors and metadata, checked against its digest; NectarError for anything but a whole .nectar."""
    with _opened(path) as file:
        metadata = _metadata(path, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if digest(tensors) != metadata["digest"]:
        raise NectarError(f"{path} is damaged: its contents do not match its checksum; fit it again")
    return tensors, metadata


def model_name(path: Path) -> str:
    """The model that a file was fitted on, its tensors unread and unchecked."""
    with _opened(path) as file:
        return str(_metadata(path, file)["model"])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise NectarError(f"{path}: no such file")
    try:
        with safe_open(path, framework="mlx") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise NectarError(f"{path} is not a .nectar file, or is cut short ({error})") from None


def _metadata(path: Path, file: Any) -> Metadata:
    strings: dict[str, str] = file.metadata() or {}
    if strings.get("format") != FORMAT:
        raise NectarError(f"{path} is not a .nectar of this version (expected {FORMAT})")
    if missing := _NEEDED - strings.keys():
        raise NectarError(f"{path} is damaged: {', '.join(sorted(missing))} missing")
    try:
        return {k: v if k in _TEXTS else json.loads(v) for k, v in strings.items()}
    except (ValueError, RecursionError) as error:
        raise NectarError(f"{path} is damaged: {error}") from None


def is_nectar(path: Path) -> bool:
    """Whether a file says that it is one of ours (it may still be damaged)."""
    try:
        with safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get("format", "")).startswith("nectar-")
    except (SafetensorError, OSError):
        return False
