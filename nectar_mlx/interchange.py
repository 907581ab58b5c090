"""A .nectar in forms that others read: plain nodes for any engine, and mlx-lm's prompt cache.

Nodes are a compacted KV cache with a bias a key. An engine that can add a bias to attention scores needs nothing else:

    attention(q) = softmax([scale · q·k_j + b_j, scale · q·live keys]) [v_j, live values]

with the live tokens at positions `start`, `start` + 1, … (docs/interchange.md describes the file).
"""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, save_prompt_cache

from .core.files import write_atomically
from .errors import NectarError
from .heads import Exact
from .heads.nodes import plain_nodes
from .mlxlm.kept import plain_windows
from .nectar import Nectar
from .store import tensor_file

FORMAT, VERSION = "nectar-nodes", "1"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def is_written_here(path: Path) -> bool:
    """Whether a file is one of this module's, which may be written again."""
    try:
        metadata = tensor_file.metadata(path)
    except NectarError:
        return False
    # A prompt cache's `model` is under a number of mlx-lm's.
    return metadata.get("format") == FORMAT or any(name.endswith(".model") for name in metadata)


def write_nodes(nectar: Nectar, path: str | Path, *, dtype: str = "float16") -> None:
    """Writes every head's nodes as safetensors: keys and values [n_kv_heads, m, head_dim], bias [n_kv_heads, m].

    dtype: of keys and values, a name of DTYPES; biases are float32. NectarError where heads are no nodes (networks),
    where a number is beyond the type, or the path cannot be written.
    """
    if dtype not in DTYPES:
        raise NectarError(f"nodes are written as one of {', '.join(DTYPES)}, not as {dtype}")
    windows = plain_windows(nectar.geometry, nectar.windows, "written as nodes")
    layers = nectar.geometry.fitted
    tensors = {"prefix": mx.array(nectar.prefix, dtype=mx.int32)}
    for layer, bank in zip(layers, nectar.banks, strict=True):
        nodes = plain_nodes(bank)
        tensors |= {f"layers.{layer}.{name}": nodes[name].astype(DTYPES[dtype]) for name in ("keys", "values")}
        tensors[f"layers.{layer}.bias"] = nodes["bias"].astype(mx.float32)
    for layer, window in windows.items():
        tensors[f"layers.{layer}.window_keys"] = window.keys.astype(DTYPES[dtype])
        tensors[f"layers.{layer}.window_values"] = window.values.astype(DTYPES[dtype])
    if not all(bool(mx.isfinite(x).all().item()) for x in tensors.values()):
        raise NectarError(f"a number of this file is beyond {dtype}: write bfloat16 or float32")
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "model": str(nectar.metadata["model"]),
        "model_sha256": str(nectar.metadata["model_sha256"]),
        "adapter": str(nectar.metadata.get("adapter", {}).get("path", "")),
        "start": str(nectar.start),
        "scale": repr(float(nectar.geometry.scale)),
        "windows": json.dumps({str(layer): window.size for layer, window in windows.items()}),
    }
    write_atomically(Path(path), lambda file: mx.save_safetensors(file, tensors, metadata))


def write_prompt_cache(nectar: Nectar, path: str | Path) -> None:
    """Writes mlx-lm's prompt cache: `mlx_lm.models.cache.load_prompt_cache` reads it. NectarError but for kind exact,
    whose heads are the keys and values themselves, or where the path cannot be written.
    """
    if nectar.layout.kind != Exact.kind:
        raise NectarError("a prompt cache holds every key and value: it can be written of a file of --kind exact alone")
    windows = plain_windows(nectar.geometry, nectar.windows, "written as a prompt cache")
    caches: list[Any] = nectar.make_cache()
    for layer, cache in enumerate(caches):
        if layer in windows:  # mlx-lm knows its own class alone
            caches[layer] = RotatingKVCache.from_state(cache.state)
        else:
            nodes = plain_nodes(cache.bank)
            keys, values = (nodes[name].astype(cache.bank.parameters[name].dtype)[None] for name in ("keys", "values"))
            values = values[..., : nectar.geometry.value_dim]
            caches[layer] = KVCache.from_state((keys, values, nectar.start))
    metadata = {"model": str(nectar.metadata["model"])}
    write_atomically(Path(path), lambda file: save_prompt_cache(cast(str, file), caches, metadata))
