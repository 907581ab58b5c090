"""The .nectar: one safetensors file with all that a model needs to answer about a context.

Tensors: the prefix's token ids, the heads (`layout`), and what the other layers keep (`states`). Metadata are text or
JSON. `digest` covers all of them, `tensors_sha256`, which covers every tensor, among them; the file's own checksum
covers every byte (`tensor_file`). Tensors and metadata are in the order of their names, so that equal contents
give equal bytes. Versions: docs/format.md.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .. import __version__
from ..core import json_text
from ..core.types import JsonObject
from ..errors import FIT_AGAIN, NectarError
from ..heads import HeadArrays
from . import schema, tensor_file
from .layout import Layout, Shared, alone, pack
from .tensor_file import Tensors

if TYPE_CHECKING:  # commands import this module, and mlx-lm takes seconds
    from ..mlxlm.attention_patch import Geometry
    from ..mlxlm.kept import Kept

FORMAT, _FIRST = "nectar-2", "nectar-1"  # in the first one `digest` is of the tensors, and nothing covers the metadata
_DIGESTS = {"digest", "tensors_sha256", "prefix_sha256", "model_sha256", "tokenizer_sha256"}
_TEXTS = _DIGESTS | {"format", "model", "nectar_mlx", "source"}
_NEEDED = _TEXTS - {"source"} | {"geometry", "layout", "report"}
Metadata = JsonObject


def contents(
    layout: Layout,
    heads: Sequence[HeadArrays],
    *,
    prefix: Sequence[int],
    windows: "Mapping[int, Kept]",
    offsets: Sequence[mx.array | None] = (),
    shared: Shared = alone,
) -> Tensors:
    """All tensors of a file, quantized: writing them loses nothing more.

    heads: layer by layer. windows: what the layers without heads keep, by layer. offsets, shared: as for `layout.pack`.
    """
    packed = pack(layout, heads, offsets=offsets, shared=shared)
    tensors = {"prefix": mx.array(list(prefix), dtype=mx.int32)} | packed
    return tensors | {f"windows.{layer}.{name}": x for layer, k in windows.items() for name, x in k.tensors().items()}


def description(
    tensors: Tensors,
    layout: Layout,
    geometry: "Geometry",
    *,
    provenance: Mapping[str, object],
    report: Mapping[str, object],
    chunks: Sequence[int] = (),
) -> Metadata:
    """The metadata of a file.

    provenance: `model`, `model_sha256`, `tokenizer_sha256`, and what else is to be kept (`adapter`, `config`,
    `source`). report: what was measured. chunks: lengths in tokens of the chunks that the prefix ends with.
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


def write(path: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Writes the file: all of it appears, or nothing changes. NectarError if it cannot be written, or not read again:
    it may be about to take the place of one that can."""
    try:
        strings = {k: v if k in _TEXTS else json.dumps(v, allow_nan=False) for k, v in metadata.items()}
    except ValueError:
        raise NectarError(f"{path} is not written: a number in its metadata is not finite") from None
    strings |= {"format": FORMAT, "tensors_sha256": tensor_file.digest(tensors)}
    strings["digest"] = tensor_file.metadata_digest(strings)
    tensor_file.write_sealed(path, dict(sorted(tensors.items())), dict(sorted(strings.items())))


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


def read(path: Path) -> tuple[Tensors, Metadata]:
    """The file's tensors and metadata, checked against its digests; NectarError for anything but a whole .nectar."""
    metadata = _metadata(path)
    tensors = (tensor_file.read if metadata["format"] == _FIRST else tensor_file.read_sealed)(path)
    if tensor_file.digest(tensors) != metadata["tensors_sha256"]:
        raise NectarError(f"{path} is damaged: its contents do not match its checksum", advice=FIT_AGAIN)
    prefix = tensors.get("prefix")
    if prefix is None or prefix.dtype != mx.int32 or prefix_digest(tensors) != metadata["prefix_sha256"]:
        raise NectarError(f"{path} is damaged: its prefix does not match its checksum", advice=FIT_AGAIN)
    with damage_named(path):
        schema.check(metadata, tensors)
    return tensors, metadata


def check_header(path: Path) -> None:
    """NectarError where a file's size or metadata are not as they were written; its tensors are neither read nor
    checked, so that a changed byte in one goes unnoticed."""
    _metadata(path)


def check_whole(path: Path) -> None:
    """The same, and NectarError where a byte was changed: all of the file is read."""
    if _metadata(path)["format"] != _FIRST:
        tensor_file.check_seal(path)


def model_name(path: Path) -> str:
    """The model that a file was fitted on; its tensors are neither read nor checked."""
    return str(_metadata(path)["model"])


def report(path: Path) -> JsonObject:
    """What was measured of a file when it was fitted; its tensors are neither read nor checked."""
    told = _metadata(path)["report"]
    return told if isinstance(told, dict) else {}


def source(path: Path) -> str:
    """What a file says that its text is; its tensors are neither read nor checked."""
    return str(_metadata(path).get("source", ""))


def tensors_digest(path: Path) -> str:
    """The digest of a file's tensors, to which its key file belongs; they are neither read nor checked."""
    return str(_metadata(path)["tensors_sha256"])


def _metadata(path: Path) -> Metadata:
    strings = tensor_file.metadata(path)
    version = strings.get("format", "")
    if version == _FIRST and "digest" in strings:
        strings["tensors_sha256"] = strings["digest"]
    elif version != FORMAT:
        raise NectarError(f"{path} {_of_another_version(version)}")
    if missing := _NEEDED - strings.keys():
        raise NectarError(f"{path} is damaged: {', '.join(sorted(missing))} missing", advice=FIT_AGAIN)
    if version == FORMAT and strings["digest"] != tensor_file.metadata_digest(strings):
        raise NectarError(f"{path} is damaged: its metadata do not match their checksum", advice=FIT_AGAIN)
    with damage_named(path):
        return {k: v if k in _TEXTS else json_text.decode(v) for k, v in strings.items()}


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """NectarError, with the path, for what is raised inside where a file is damaged."""
    try:
        yield
    except (NectarError, ValueError) as error:
        reason = (error.message if isinstance(error, NectarError) else str(error)).removeprefix("the file is damaged: ")
        raise NectarError(f"{path} is damaged: {reason}", advice=FIT_AGAIN) from None


def _of_another_version(version: str) -> str:
    """Why a file of this format cannot be read."""
    number = version.removeprefix("nectar-")
    if number.isdecimal() and len(number) < 6 and int(number) > int(FORMAT.removeprefix("nectar-")):
        return f"is of a later version ({version}, known up to {FORMAT}): install a newer nectar_mlx"
    return f"is not a .nectar of this version (expected {FORMAT}): fit the text again"


def is_nectar(path: Path) -> bool:
    """Whether a file says that it is a .nectar, of any version; it may still be damaged."""
    try:
        return tensor_file.metadata(path).get("format", "").startswith("nectar-")
    except NectarError:
        return False
