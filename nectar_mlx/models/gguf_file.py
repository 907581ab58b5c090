"""Reading a .gguf file that nobody vouches for: every length, count, type and offset is checked before it is used.

The file: magic, version, the counts of tensors and settings; the settings; name, shape, type and offset of each tensor;
the tensors' bytes, each at a multiple of the alignment. Little-endian. Time and memory are those of the file's size.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from ..core.types import AnyArray, ByteArray, JsonObject
from ..errors import NectarError

_MOST_SETTINGS, _MOST_TENSORS, _MOST_ITEMS = 4096, 1 << 16, 1 << 20  # the last of an array
_MOST_NAME = 1024  # bytes
_MOST_TEXT = 4 << 20  # of one setting
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """shape: rows first. data: the bytes [..., row bytes], in the file until they are used."""

    name: str
    shape: tuple[int, ...]
    tensor_type: gguf.GGMLQuantizationType
    data: ByteArray


def read(path: Path) -> tuple[JsonObject, dict[str, Tensor]]:
    """The settings and the tensors, by name; NectarError for anything but a whole GGUF file."""
    try:
        data: ByteArray = np.memmap(path, np.uint8, "r")
        with memoryview(data.data) as view:
            return _read(_Cursor(view), data)
    except (OSError, ValueError) as error:
        raise NectarError(f"{path}: not a whole GGUF file ({str(error).splitlines()[0]})") from None


class _Cursor:
    """A place in the file. Every method raises ValueError where what it reads is cut short or impossible."""

    def __init__(self, view: memoryview):
        self._view, self.at = view, 0

    def take(self, count: int) -> memoryview:
        if count > len(self._view) - self.at:
            raise ValueError("it is cut short")
        self.at += count
        return self._view[self.at - count : self.at]

    def integer(self, form: str, most: int) -> int:
        (number,) = struct.unpack(form, self.take(struct.calcsize(form)))
        if number > most:
            raise ValueError(f"{number:,} is too much")
        return int(number)

    def text(self, most: int) -> str:
        return str(self.take(self.integer("<Q", most)), "utf-8")

    def value(self) -> Any:
        """A setting: a number, a text, a list of texts, or an array of numbers."""
        kind = self.integer("<I", 12)
        if kind == _STRING:
            return self.text(_MOST_TEXT)
        if kind != _ARRAY:
            return self._numbers(kind, 1).item()
        kind, count = self.integer("<I", 12), self.integer("<Q", _MOST_ITEMS)
        if kind == _STRING:
            return [self.text(_MOST_TEXT) for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> AnyArray:
        if kind not in _NUMBERS:
            raise ValueError("a list of lists")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).copy()


def _read(file: _Cursor, data: ByteArray) -> tuple[JsonObject, dict[str, Tensor]]:
    if bytes(file.take(4)) != b"GGUF" or file.integer("<I", 3) < 2:
        raise ValueError("another magic or version")
    n_tensors, n_settings = file.integer("<Q", _MOST_TENSORS), file.integer("<Q", _MOST_SETTINGS)
    settings: JsonObject = {}
    for _ in range(n_settings):
        name = file.text(_MOST_NAME)
        if name in settings:
            raise ValueError(f"{name} is there twice")
        settings[name] = file.value()
    entries = [_entry(file) for _ in range(n_tensors)]
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise ValueError("its alignment is none")
    tensors, end = dict[str, Tensor](), 0
    start = -(-file.at // alignment) * alignment
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        rows = _row_shape(shape, kind)
        if name in tensors or offset % alignment or offset < end or start + offset + math.prod(rows) > len(data):
            raise ValueError(f"the tensor {name} is there twice, lies in another or is cut short")
        end = offset + math.prod(rows)
        tensors[name] = Tensor(name, shape, kind, data[start + offset : start + end].reshape(rows))
    return settings, {name: tensors[name] for name, *_ in entries}


def _entry(file: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name, n_dims = file.text(_MOST_NAME), file.integer("<I", 4)
    shape = tuple(file.integer("<Q", (1 << 31) - 1) for _ in range(n_dims))[::-1]
    kind = gguf.GGMLQuantizationType(file.integer("<I", 1 << 16))
    if not shape or min(shape) < 1:
        raise ValueError(f"the tensor {name} is empty")
    return name, shape, kind, file.integer("<Q", 1 << 62)


def _row_shape(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[int, ...]:
    """The shape of a tensor's bytes."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError("a row is no whole number of blocks")
    return (*shape[:-1], shape[-1] // block * nbytes)
