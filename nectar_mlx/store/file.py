"""One safetensors file that holds everything a model needs to answer about a context: the prefix's token ids, the heads
(`layout`), what sliding-window layers keep. `digest` covers every tensor; metadata are text, or JSON.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from .. import __version__
from ..errors import NectarError
from ..heads import HeadArrays
from .layout import Layout, Tensors, pack

if TYPE_CHECKING:  # commands import this module, and mlx-lm takes seconds
    from ..mlxlm.attention_patch import Geometry
    from ..mlxlm.cache import Window

FORMAT = "nectar-1"
_TEXTS = {"format", "digest", "prefix_sha256", "model", "model_sha256", "tokenizer_sha256", "nectar_mlx", "source"}
_NEEDED = _TEXTS - {"source"} | {"geometry", "layout", "report"}
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I8": "i1", "U8": "u1", "U16": "<u2"}
Metadata = dict[str, Any]


def contents(
    layout: Layout,
    heads: Sequence[HeadArrays],
    *,
    prefix: Sequence[int],
    windows: "Mapping[int, Window]",
    offsets: Sequence[mx.array | None] = (),
) -> Tensors:
    """All tensors of a file, quantised: writing them loses nothing more.

    heads: layer by layer. windows: what the sliding-window layers keep, by layer. offsets: as for `layout.pack`.
    """
    tensors = {"prefix": mx.array(list(prefix), dtype=mx.int32)} | pack(layout, heads, offsets=offsets)
    for layer, window in windows.items():
        tensors |= {f"windows.{layer}.keys": window.keys, f"windows.{layer}.values": window.values}
    return tensors


def description(
    tensors: Tensors,
    layout: Layout,
    geometry: "Geometry",
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
        tensors = {name: _array(entry) for name, entry in deserialize(path.read_bytes())}  # type: ignore[no-untyped-call]
    if digest(tensors) != metadata["digest"]:
        raise NectarError(f"{path} is damaged: its contents do not match its checksum; fit it again")
    if "prefix" not in tensors or _prefix_digest(tensors) != metadata["prefix_sha256"]:
        raise NectarError(f"{path} is damaged: its prefix does not match its checksum; fit it again")
    return tensors, metadata


def _array(entry: Mapping[str, Any]) -> mx.array:
    """One tensor as safetensors has it; its own conversion to MLX does not know bfloat16."""
    name = str(entry["dtype"])
    if name not in _DTYPES:
        raise ValueError(f"tensors of type {name} are not read")
    data = mx.array(np.frombuffer(entry["data"], _DTYPES[name]).reshape(entry["shape"]))
    return data.view(mx.bfloat16) if name == "BF16" else data


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
        raise NectarError(f"{path} is not a .nectar of this version (expected {FORMAT}): fit the text again")
    if missing := _NEEDED - strings.keys():
        raise NectarError(f"{path} is damaged: {', '.join(sorted(missing))} missing; fit it again")
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
