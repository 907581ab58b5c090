"""The .nectar: one safetensors file with all that a model needs to answer about a context.

Tensors: the prefix's token ids, the heads (`layout`), and what the other layers keep (`states`). Metadata
are text or JSON; `digest` covers every tensor. Tensors and metadata are in the order of their names, so that equal
contents give equal bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .. import __version__
from ..core.types import JsonObject
from ..errors import NectarError
from ..heads import HeadArrays
from . import tensor_file
from .layout import Layout, pack
from .tensor_file import Tensors

if TYPE_CHECKING:  # commands import this module, and mlx-lm takes seconds
    from ..mlxlm.attention_patch import Geometry
    from ..mlxlm.kept import Kept

FORMAT = "nectar-1"
_TEXTS = {"format", "digest", "prefix_sha256", "model", "model_sha256", "tokenizer_sha256", "nectar_mlx", "source"}
_NEEDED = _TEXTS - {"source"} | {"geometry", "layout", "report"}
Metadata = JsonObject


def contents(
    layout: Layout,
    heads: Sequence[HeadArrays],
    *,
    prefix: Sequence[int],
    windows: "Mapping[int, Kept]",
    offsets: Sequence[mx.array | None] = (),
) -> Tensors:
    """All tensors of a file, quantized: writing them loses nothing more.

    heads: layer by layer. windows: what the layers without heads keep, by layer. offsets: as for `layout.pack`.
    """
    tensors = {"prefix": mx.array(list(prefix), dtype=mx.int32)} | pack(layout, heads, offsets=offsets)
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

    provenance: `model`, `model_sha256`, `tokenizer_sha256`, and what else is to be kept (`config`, `source`). report:
    what was measured. chunks: lengths in tokens of the chunks that the prefix ends with.
    """
    return {
        "nectar_mlx": __version__,
        "prefix_sha256": _prefix_digest(tensors),
        "geometry": geometry.to_dict(),
        "layout": asdict(layout),
        "report": dict(report),
        "chunks": list(chunks) if len(chunks) > 1 else [],
        **provenance,
    }


def _prefix_digest(tensors: Tensors) -> str:
    """sha256 of the token ids, as little-endian int32."""
    return hashlib.sha256(np.ascontiguousarray(np.array(tensors["prefix"]), dtype="<i4").data).hexdigest()


def write(path: Path, tensors: Tensors, metadata: Metadata) -> None:
    """Writes the file: all of it appears, or nothing changes. NectarError if it cannot be written."""
    strings = {k: v if k in _TEXTS else json.dumps(v) for k, v in metadata.items()}
    strings |= {"format": FORMAT, "digest": tensor_file.digest(tensors)}
    tensor_file.write(path, dict(sorted(tensors.items())), dict(sorted(strings.items())))


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
    """The file's tensors and metadata, checked against its digest; NectarError for anything but a whole .nectar."""
    metadata, tensors = _metadata(path), tensor_file.read(path)
    if tensor_file.digest(tensors) != metadata["digest"]:
        raise NectarError(f"{path} is damaged: its contents do not match its checksum; fit it again")
    if "prefix" not in tensors or _prefix_digest(tensors) != metadata["prefix_sha256"]:
        raise NectarError(f"{path} is damaged: its prefix does not match its checksum; fit it again")
    return tensors, metadata


def model_name(path: Path) -> str:
    """The model that a file was fitted on; its tensors are neither read nor checked."""
    return str(_metadata(path)["model"])


def _metadata(path: Path) -> Metadata:
    strings = tensor_file.metadata(path)
    if strings.get("format") != FORMAT:
        raise NectarError(f"{path} is not a .nectar of this version (expected {FORMAT}): fit the text again")
    if missing := _NEEDED - strings.keys():
        raise NectarError(f"{path} is damaged: {', '.join(sorted(missing))} missing; fit it again")
    try:
        return {k: v if k in _TEXTS else json.loads(v) for k, v in strings.items()}
    except (ValueError, RecursionError) as error:
        raise NectarError(f"{path} is damaged: {error}") from None


def is_nectar(path: Path) -> bool:
    """Whether a file says that it is a .nectar, of any version; it may still be damaged."""
    try:
        return tensor_file.metadata(path).get("format", "").startswith("nectar-")
    except NectarError:
        return False
