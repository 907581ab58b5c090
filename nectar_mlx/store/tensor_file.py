"""The safetensors files under .nectar, .kv and checkpoints: equal arrays and metadata give equal bytes, and one digest.

8 bytes: the header's length, little-endian. The header, JSON, padded with spaces to a multiple of 8:
`{"__metadata__": {name: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [start, end]}, ...}`. Then the
arrays, row-major and end to end in the header's order. A sealed file ends with the array `checksum`, uint8 [32]: the
sha256 of every byte before it.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import mlx.core as mx
import msgspec
import numpy as np

from ..core import json_text
from ..core.files import write_atomically
from ..core.types import AnyArray
from ..errors import FIT_AGAIN, NectarError

Tensors = dict[str, mx.array]
Arrays = dict[str, AnyArray]
_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
}
_CHECKSUM, _CHECKSUM_BYTES = "checksum", 32
_PIECE = 1 << 20  # bytes that are read at a time
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MOST_ARRAYS = 4096
_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]  # MLX's largest
_Offset = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """Where an array lies: its bytes [start, end) behind the header."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Offset, _Offset]

    @property
    def span(self) -> tuple[int, int]:
        return self.data_offsets


class _Header(NamedTuple):
    """metadata: text beside the arrays. start: where the arrays' bytes begin in the file."""

    metadata: dict[str, str]
    entries: dict[str, _Entry]
    start: int


def write(path: Path, arrays: Mapping[str, mx.array | AnyArray], metadata: Mapping[str, str]) -> None:
    """Writes the arrays in their order; the file appears whole or not at all. NectarError if it cannot be written, or
    if its metadata are more than is read again."""

    def write_to(file: BinaryIO) -> None:
        for piece in _pieces(arrays, metadata):
            file.write(piece)

    write_atomically(path, write_to)


def write_sealed(path: Path, arrays: Mapping[str, mx.array | AnyArray], metadata: Mapping[str, str]) -> None:
    """The same with a checksum at its end, for `read_sealed`."""

    def write_to(file: BinaryIO) -> None:
        sha = hashlib.sha256()
        *pieces, _ = _pieces({**arrays, _CHECKSUM: np.zeros(_CHECKSUM_BYTES, np.uint8)}, metadata)
        for piece in pieces:
            file.write(piece)
            sha.update(piece)
        file.write(sha.digest())

    write_atomically(path, write_to)


def _pieces(arrays: Mapping[str, mx.array | AnyArray], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """What a file consists of: its header, then array by array."""
    yield _header(arrays, metadata)
    for array in arrays.values():
        yield _bits(array).data.cast("B") if array.nbytes else b""


def check_seal(path: Path) -> None:
    """NectarError where a byte of a file that `write_sealed` wrote was changed. All of it is read, and nothing kept."""
    sha = hashlib.sha256()
    with _opened(path) as file:
        left = os.fstat(file.fileno()).st_size - _CHECKSUM_BYTES
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            sha.update(piece)
            left -= len(piece)
        if left or file.read() != sha.digest():
            raise NectarError(f"{path} is damaged: its bytes do not match its checksum", advice=FIT_AGAIN)


def read_sealed(path: Path) -> Tensors:
    """All arrays of a file that `write_sealed` wrote. NectarError as for `metadata`, and where a byte was changed."""
    check_seal(path)
    tensors = read(path)
    tensors.pop(_CHECKSUM, None)
    return tensors


def digest(arrays: Mapping[str, mx.array | AnyArray]) -> str:
    """sha256 (hex) over every array's name, type, shape and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype} {array.shape};".encode())
        sha.update(_bits(array).data)
    return sha.hexdigest()


def metadata_digest(metadata: Mapping[str, str]) -> str:
    """sha256 (hex) over all text beside the arrays but `digest`, in the order of names."""
    covered = {name: text for name, text in metadata.items() if name != "digest"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def metadata(path: Path) -> dict[str, str]:
    """The text beside the arrays. NectarError if there is no such file, or it is cut short or no safetensors file."""
    return _header_of(path).metadata


def read(path: Path) -> Tensors:
    """All arrays of a file, in memory. NectarError as for `metadata`."""
    header = _header_of(path)
    with _opened(path) as file:
        return {name: _tensor(entry, file, header.start) for name, entry in header.entries.items()}


def map_arrays(path: Path) -> tuple[Arrays, mmap.mmap]:
    """All arrays of a file, on the disk until they are used, bfloat16 as uint16, and what maps it. To use what a file
    that was cut no longer has ends the process: `is_whole` tells. NectarError as for `metadata`."""
    header = _header_of(path)
    with _opened(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8)[header.start :]
        arrays: Arrays = {
            name: data[slice(*entry.span)].view(_numpy_type(entry)).reshape(entry.shape)
            for name, entry in header.entries.items()
        }
        return arrays, mapped


def is_whole(mapped: mmap.mmap) -> bool:
    """Whether a mapped file is still as long as when it was mapped."""
    return mapped.size() >= len(mapped)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """NectarError for what is raised inside where a file is damaged, or, because of an OSError, cannot be read."""
    try:
        yield
    except OSError as error:
        raise NectarError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        text = f"if it is a text, `nectar fit --context {path}` makes one of it"
        advice = {".nectar": FIT_AGAIN, ".kv": ""}.get(path.suffix, text)
        raise NectarError(f"{path} is not a .nectar or .kv file, or is cut short ({error})", advice=advice) from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, to read from. NectarError where there is none; inside, as for `_damage_named`."""
    with _damage_named(path):
        if not path.is_file():
            raise NectarError(f"{path} is a folder" if path.is_dir() else f"{path}: no such file")
        with open(path, "rb") as file:
            yield file


def _header_of(path: Path) -> _Header:
    """The header, of which nothing is believed: the arrays lie end to end and fill the file, and each has as many bytes
    as its type and shape say. Nothing is allocated by a number in it."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, json_text.MOST_BYTES):
            raise ValueError("it has no header")
        text = file.read(length)
        if text.count(b'"dtype"') > _MOST_ARRAYS:
            raise ValueError("it has too many arrays")
        if any(space in text for space in b"\t\n\r"):  # a changed space would go unnoticed where no checksum covers it
            raise ValueError("its header is not as it is written")
        fields = json_text.decode(text)
    with _damage_named(path):
        return _checked(fields, start=8 + length, size=size)


def _checked(fields: object, *, start: int, size: int) -> _Header:
    """ValueError unless the header describes the rest of a file of this size."""
    if not isinstance(fields, dict):
        raise ValueError("its header is no object")
    metadata = json_text.typed(fields.pop("__metadata__", {}), dict[str, str])
    entries = json_text.typed(fields, dict[str, _Entry])
    if unknown := {entry.dtype for entry in entries.values()} - _TYPES.keys():
        raise ValueError(f"arrays of a type that is not read: {', '.join(sorted(unknown))[:80]}")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.span):
        count = math.prod(max(1, n) for n in entry.shape)  # of an empty array as well: numpy has limits there, too
        if count > 1 << 48 or entry.span != (end, end + math.prod(entry.shape) * _numpy_type(entry).itemsize):
            raise ValueError("its arrays are not as long as their shapes say, or not end to end")
        end = entry.span[1]
    if start + end != size:
        raise ValueError("its arrays do not fill it")
    return _Header(metadata, entries, start)


def _numpy_type(entry: _Entry) -> np.dtype[Any]:
    """bfloat16, which numpy does not have, is uint16."""
    dtype = _TYPES[entry.dtype]
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _bits(array: mx.array | AnyArray) -> AnyArray:
    """The array as numpy has it, row-major; bfloat16, which it does not have, as uint16."""
    if isinstance(array, mx.array):
        array = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return np.ascontiguousarray(array)


def _header(arrays: Mapping[str, mx.array | AnyArray], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + int(array.nbytes)
        dtype = _NAMES[str(array.dtype).removeprefix("mlx.core.")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        json_text.check_size(text)
    except ValueError as error:
        raise NectarError(f"the file cannot be written: {error} to be read again; fit fewer documents") from None
    return len(text).to_bytes(8, "little") + text


def _tensor(entry: _Entry, file: BinaryIO, start: int) -> mx.array:
    file.seek(start + entry.span[0])
    array = mx.array(np.fromfile(file, _numpy_type(entry), math.prod(entry.shape)).reshape(entry.shape))
    return array.view(mx.bfloat16) if entry.dtype == "BF16" else array
