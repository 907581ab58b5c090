"""The safetensors files under .nectar, .kv and checkpoints: equal arrays and metadata give equal bytes, and one digest.

8 bytes: the header's length, little-endian. The header, JSON, padded with spaces to a multiple of 8:
`{"__metadata__": {name: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [start, end]}, ...}`. Then the
arrays, row-major and end to end in the header's order. A sealed file ends with the array `checksum`, uint8 [32]: the
sha256 of every byte before it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypedDict

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from ..core.files import write_atomically
from ..core.types import AnyArray, ByteArray
from ..errors import NectarError

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


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def write(path: Path, arrays: Mapping[str, mx.array | AnyArray], metadata: Mapping[str, str]) -> None:
    """Writes the arrays in their order; the file appears whole or not at all. NectarError if it cannot be written."""

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


def read_sealed(path: Path) -> Tensors:
    """All arrays of a file that `write_sealed` wrote. NectarError as for `metadata`, and where a byte was changed."""
    if not path.is_file():
        raise NectarError(f"{path}: no such file")
    sha, left = hashlib.sha256(), path.stat().st_size - _CHECKSUM_BYTES
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            sha.update(piece)
            left -= len(piece)
        if left or file.read() != sha.digest():
            raise NectarError(f"{path} is damaged: its bytes do not match its checksum")
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
    if not path.is_file():
        raise NectarError(f"{path}: no such file")
    with _damage_named(path), safe_open(path, framework="numpy") as file:  # compares the header with the file's length
        return dict(file.metadata() or {})


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """NectarError for what is raised inside where a file is damaged."""
    try:
        yield
    except (SafetensorError, OSError, OverflowError, ValueError, TypeError) as error:
        raise NectarError(f"{path} is not a .nectar or .kv file, or is cut short ({error})") from None


def read(path: Path) -> Tensors:
    """All arrays of a file, in memory. NectarError as for `metadata`."""
    entries, data = _mapped(path)
    with _damage_named(path):
        return {name: _tensor(entry, data) for name, entry in entries.items()}


def map_arrays(path: Path) -> Arrays:
    """All arrays of a file, on the disk until they are used, bfloat16 as uint16. NectarError as for `metadata`."""
    entries, data = _mapped(path)
    with _damage_named(path):
        return {name: _array(entry, data) for name, entry in entries.items()}


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
    return len(text).to_bytes(8, "little") + text


def _mapped(path: Path) -> tuple[dict[str, _Entry], ByteArray]:
    """The header's entries, and the bytes behind the header."""
    metadata(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    if unknown := {entry["dtype"] for entry in entries.values()} - _TYPES.keys():
        raise NectarError(f"{path} holds arrays of a type that is not read: {', '.join(sorted(unknown))}")
    data = np.memmap(path, np.uint8, "r")
    return entries, data[8 + length :]


def _array(entry: _Entry, data: ByteArray) -> AnyArray:
    (start, end), dtype = entry["data_offsets"], _TYPES[entry["dtype"]]
    return data[start:end].view("uint16" if dtype == "bfloat16" else dtype).reshape(entry["shape"])


def _tensor(entry: _Entry, data: ByteArray) -> mx.array:
    array = mx.array(np.array(_array(entry, data)))  # a copy: the file's own arrays may begin anywhere
    return array.view(mx.bfloat16) if entry["dtype"] == "BF16" else array
