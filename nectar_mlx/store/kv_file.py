"""The file beside a .nectar: the context's own keys and values, read a row at a time, never whole.

`book.nectar.0123456789abcdef.kv` is a safetensors file, named by the digest of the tensors that it belongs to, so that
the keys of an old and of a new .nectar can lie side by side while one replaces the other. Before, there was one name,
`book.nectar.kv`, which is still read.
 `rows` [layers, n_kv_heads, n, row bytes] holds each token's key and value (int8
with a scale a group, or bfloat16) side by side, so that reading a token is reading one short run of bytes, and a
checksum, which differs by row and file too. The other arrays are small, are read at once and have one checksum with the
metadata: the router's index, the text, and the characters of it that each token stands for.
"""

import mmap
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..core.quantize import group_size, quantize
from ..errors import NectarError
from . import tensor_file
from .tensor_file import Arrays

FORMAT = "nectar-kv-4"
_UNCOVERED, _LINEAR = "nectar-kv-2", ("nectar-kv-2", "nectar-kv-3")  # nothing covers the metadata; rows' old checksums
_DIGITS = 16  # of the digest, in the file's name
_ODD = np.uint32(2654435761)
BITS = 8
Rows = npt.NDArray[np.uint8]


class RowFormat(NamedTuple):
    """How one token's key and value lie in a row."""

    head_dim: int
    bits: int

    @property
    def groups(self) -> int:
        return self.head_dim // group_size(self.head_dim) if self.bits == 8 else 0

    @property
    def nbytes(self) -> int:
        return self.payload + 4

    @property
    def payload(self) -> int:
        return 2 * (self.head_dim * self.bits // 8 + 2 * self.groups)

    def pack(self, keys: mx.array, values: mx.array) -> Rows:
        """keys, values [K, n, D] -> rows without checksums, [K, n, payload]."""
        if self.bits == 16:
            return np.concatenate([np.array(x.astype(mx.bfloat16).view(mx.uint8)) for x in (keys, values)], axis=-1)
        parts = [quantize(x, bits=8) for x in (keys, values)]
        arrays = [p.data for p in parts] + [p.scales for p in parts]
        return np.concatenate([np.array(mx.contiguous(x).view(mx.uint8)) for x in arrays], axis=-1)

    def unpack(self, rows: Rows) -> tuple[mx.array, mx.array]:
        """rows [..., nbytes] -> keys, values [..., D] float32."""
        D = self.head_dim
        if self.bits == 16:
            bits = np.ascontiguousarray(rows[..., : self.payload]).view(np.uint16).astype(np.uint32) << 16
            pair = mx.array(bits.view(np.float32))
            return pair[..., :D], pair[..., D:]
        scales = np.ascontiguousarray(rows[..., 2 * D : self.payload]).view(np.float16).astype(np.float32)
        with np.errstate(invalid="ignore"):  # `KeyFile.read` refuses what is not finite
            data = rows[..., : 2 * D].view(np.int8).reshape(*rows.shape[:-1], 2 * self.groups, -1) * scales[..., None]
        pair = mx.array(data.reshape(*rows.shape[:-1], 2 * D))
        return pair[..., :D], pair[..., D:]


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """Every token's key and value, in memory or in a mapped file.

    rows: [layers, K, n, row bytes]. small: what else the file holds (`retrieval.sketch`, `retrieval.sources`). nectar:
    the digest of the .nectar that this belongs to. version: of the rows' checksums. mapped: the file, None in memory.
    """

    rows: Rows = field(repr=False)
    format: RowFormat
    small: Arrays = field(repr=False)
    nectar: str
    version: str = FORMAT
    mapped: mmap.mmap | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, layers: Sequence[tuple[mx.array, mx.array]], *, small: Arrays, nectar: str, bits: int = BITS
    ) -> "KeyFile":
        """layers: keys and values [K, n, D] of each layer with full attention."""
        K, n, D = layers[0][0].shape
        form = RowFormat(D, bits)
        file = cls(rows=np.empty((len(layers), K, n, form.nbytes), np.uint8), format=form, small=small, nectar=nectar)
        for layer, (keys, values) in enumerate(layers):
            rows = file.rows[layer]
            rows[..., : form.payload] = form.pack(keys, values)
            at = np.arange(layer * K * n, (layer + 1) * K * n).reshape(K, n)
            rows[..., form.payload :] = file._checksums(rows, at)[..., None].view(np.uint8)
        return file

    @property
    def tokens(self) -> int:
        return int(self.rows.shape[2])

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)

    def read(self, layer: int, positions: npt.NDArray[np.integer]) -> tuple[mx.array, mx.array]:
        """Keys and values [K, ..., D] at positions [K, ...] of one layer. NectarError if a row is damaged."""
        if self.mapped is not None and not tensor_file.is_whole(self.mapped):
            raise NectarError("the .kv file was cut short while it was open: fit again, or delete it")
        K = positions.shape[0]
        first = (layer * K + np.arange(K)) * self.tokens
        # The tokens of a prompt read mostly the same rows.
        at, again = np.unique(positions + first.reshape(K, *[1] * (positions.ndim - 1)), return_inverse=True)
        rows = self.rows.reshape(-1, self.format.nbytes)[at]
        if not np.array_equal(rows[..., self.format.payload :].view(np.uint32)[..., 0], self._checksums(rows, at)):
            raise NectarError("the .kv file is damaged: fit again, or delete it and answer from the .nectar alone")
        places = mx.array(again.reshape(positions.shape).astype(np.int32))
        keys, values = self.format.unpack(rows)
        if not (mx.isfinite(keys).all() & mx.isfinite(values).all()).item():
            raise NectarError("the .kv file is damaged: it holds numbers that are not finite; fit again, or delete it")
        return keys[places], values[places]

    def _checksums(self, rows: Rows, at: npt.NDArray[np.integer]) -> npt.NDArray[np.uint32]:
        """Of rows [..., nbytes], the at-th of the file, counted over all heads: any one wrong byte changes one, and
        many wrong bytes do but for one time in 2^32."""
        words = np.ascontiguousarray(rows[..., : self.format.payload]).view(np.uint32)
        mixed = words * (2 * np.arange(1, words.shape[-1] + 1, dtype=np.uint32) + 1)
        if self.version not in _LINEAR:  # in which two flipped signs have the checksum of none
            mixed = (mixed ^ mixed >> np.uint32(15)) * _ODD
            mixed ^= mixed >> np.uint32(13)
        of_row = at.astype(np.uint32) * _ODD + np.uint32(int(self.nectar[:8], 16))  # another one of each row and file
        return np.asarray(mixed.sum(-1, dtype=np.uint32) + of_row)

    def layer(self, layer: int) -> tuple[mx.array, mx.array]:
        """All of a layer's keys and values, [K, n, D]."""
        K, n = self.rows.shape[1:3]
        return self.read(layer, np.broadcast_to(np.arange(n), (K, n)))

    def write(self, path: Path) -> None:
        """Writes the file: all of it appears, or nothing changes. NectarError if it cannot be written."""
        metadata = {
            "format": self.version,
            "nectar": self.nectar,
            "head_dim": str(self.format.head_dim),
            "bits": str(self.format.bits),
            "small_sha256": tensor_file.digest(self.small),
        }
        metadata["digest"] = tensor_file.metadata_digest(metadata)
        tensor_file.write(path, {**self.small, "rows": self.rows}, metadata)

    @classmethod
    def open(cls, path: Path, *, nectar: str, shape: tuple[int, int, int]) -> "KeyFile":
        """Maps the file; shape: its layers, KV heads, tokens. NectarError unless it is whole and the .nectar's own."""
        metadata = tensor_file.metadata(path)
        version = metadata.get("format", "")
        if version not in (FORMAT, *_LINEAR):
            raise NectarError(f"{path} is not a .kv file of this version")
        covered = version != _UNCOVERED or "digest" in metadata
        if covered and metadata.get("digest") != tensor_file.metadata_digest(metadata):
            raise NectarError(f"{path} is damaged: its metadata do not match their checksum")
        if metadata.get("nectar") != nectar:
            raise NectarError(f"{path} belongs to another .nectar")
        head_dim, bits = metadata.get("head_dim", ""), metadata.get("bits", "")
        if not re.fullmatch(r"[1-9][0-9]{0,4}", head_dim) or bits not in ("8", "16"):
            raise NectarError(f"{path} is damaged: its rows are of no known form")
        form = RowFormat(int(head_dim), int(bits))
        arrays, mapped = tensor_file.map_arrays(path)
        rows = arrays.pop("rows", None)
        if rows is None or rows.dtype != np.uint8 or rows.shape != (*shape, form.nbytes):
            raise NectarError(f"{path} is damaged: its rows are not those of its .nectar")
        small = {name: np.array(array) for name, array in arrays.items()}
        if tensor_file.digest(small) != metadata.get("small_sha256"):
            raise NectarError(f"{path} is damaged: its contents do not match its checksum")
        return cls(rows=rows, format=form, small=small, nectar=nectar, version=version, mapped=mapped)


def kv_path(nectar: str | Path, digest: str) -> Path:
    """Where the keys of a .nectar are written. digest: of its tensors."""
    return Path(f"{nectar}.{digest[:_DIGITS]}.kv")


def find_keys(nectar: str | Path, digest: str) -> Path:
    """Where the keys of a .nectar are, if there are any: older versions had a name without a digest."""
    path, before = kv_path(nectar, digest), Path(f"{nectar}.kv")
    return before if before.is_file() and not path.is_file() else path


def remove_stale_keys(nectar: Path, *, but: Path | None) -> None:
    """Removes the keys of a .nectar that stood there before. but: what belongs to the one that is there now."""
    pattern = re.escape(nectar.name) + rf"(\.[0-9a-f]{{{_DIGITS}}})?\.kv"
    for path in nectar.parent.iterdir():
        if path != but and re.fullmatch(pattern, path.name) and _is_key_file(path):
            with suppress(OSError):  # it belongs to no file any more, so no answer reads it
                path.unlink()


def _is_key_file(path: Path) -> bool:
    try:
        return tensor_file.metadata(path).get("format", "").startswith("nectar-kv-")
    except NectarError:
        return False
