"""What the settings and tensors of a .gguf file must be, checked before anything is converted."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np

from ..core import json_text
from ..core.types import JsonObject
from .gguf_file import Tensor

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
_Base = Annotated[float, msgspec.Meta(ge=1, le=1e12)]
_Factor = Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]
_Piece = Annotated[str, msgspec.Meta(max_length=1024)]
_Pair = Annotated[str, msgspec.Meta(max_length=2049)]
MOST_TEMPLATE = 1 << 20  # characters


class _Model(msgspec.Struct):
    """Settings of an architecture, without its name in front. What is missing is named elsewhere."""

    block_count: _Layers | None = None
    embedding_length: _Size | None = None
    feed_forward_length: _Size | None = None
    context_length: _Length | None = None
    heads: _Size | None = msgspec.field(name="attention.head_count", default=None)
    kv_heads: _Size | None = msgspec.field(name="attention.head_count_kv", default=None)
    head_dim: _Size | None = msgspec.field(name="attention.key_length", default=None)
    epsilon: Annotated[float, msgspec.Meta(ge=1e-12, le=1)] | None = msgspec.field(
        name="attention.layer_norm_rms_epsilon", default=None
    )
    rope_base: _Base = msgspec.field(name="rope.freq_base", default=1e4)
    local_rope_base: _Base = msgspec.field(name="rope.freq_base_swa", default=1e4)
    scaling: _Word = msgspec.field(name="rope.scaling.type", default="none")
    factor: _Factor | None = msgspec.field(name="rope.scaling.factor", default=None)
    original: _Length | None = msgspec.field(name="rope.scaling.original_context_length", default=None)
    window: _Index = msgspec.field(name="attention.sliding_window", default=0)


class _Tokenizer(msgspec.Struct):
    """`tokenizer.ggml.*`"""

    model: _Word | None = None
    pre: _Word = "default"
    tokens: list[_Piece] = []
    merges: list[_Pair] = []
    token_type: list[int] = []
    scores: list[float] = []
    bos_token_id: _Index | None = None
    eos_token_id: _Index | None = None
    eot_token_id: _Index | None = None
    unknown_token_id: _Index | None = None
    padding_token_id: _Index | None = None
    add_bos_token: bool | None = None
    add_space_prefix: bool | None = None


def check_model(arch: str, metadata: JsonObject) -> None:
    """ValueError unless the settings of an architecture are of their types and in their ranges."""
    model = json_text.typed(_part(metadata, f"{arch}."), _Model)
    for name in ("rope_base", "local_rope_base", "factor"):
        if not np.isfinite(getattr(model, name) or 0.0):
            raise ValueError(f"its {name} is not finite")
    heads = model.heads or 1
    if (model.head_dim is None and (model.embedding_length or 0) % heads) or heads % (model.kv_heads or heads):
        raise ValueError(f"{heads} heads do not share {model.embedding_length} numbers, or {model.kv_heads} KV heads")
    lacking = {"linear": model.factor is None, "yarn": None in (model.factor, model.original)}
    if lacking.get(model.scaling):
        raise ValueError(f"its RoPE scaling {model.scaling} has no factor or no original length")
    if (model.head_dim or 2) % 2:
        raise ValueError("its heads have an odd number of dimensions")


def check_tokenizer(metadata: JsonObject) -> None:
    """ValueError unless the tokenizer's lists are as long as each other and its ids are in them."""
    tokenizer = json_text.typed(_part(metadata, "tokenizer.ggml."), _Tokenizer)
    count = len(tokenizer.tokens)
    for name in ("token_type", "scores"):
        if count and f"tokenizer.ggml.{name}" in metadata and len(getattr(tokenizer, name)) != count:
            raise ValueError(f"{name} is not as long as its tokens")
    if not np.isfinite(tokenizer.scores).all():
        raise ValueError("a score is not finite")
    if "" in tokenizer.tokens or len(set(tokenizer.tokens)) < count:
        raise ValueError("a token is empty, or there twice")
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str) or len(template) > MOST_TEMPLATE:
        raise ValueError("its chat template is no text, or too long")


def check_tensors(metadata: JsonObject, config: JsonObject, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless each tensor that the model needs is there, and has the shape that the settings say."""
    needed, optional = _expected(config, biases="blk.0.attn_q.bias" in tensors)
    if missing := needed.keys() - tensors.keys():
        raise ValueError(f"it lacks {min(missing)}")
    for name, tensor in tensors.items():
        stem = re.sub(r"^blk\.\d+\.", "blk.0.", name)
        shape = needed.get(name) or optional.get(name)
        if shape is None and stem in needed:
            raise ValueError(f"{name} is of a layer that it does not have")
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.shape}, which should be {shape}")
    if len(metadata.get("tokenizer.ggml.tokens", [])) > config["vocab_size"]:
        raise ValueError("it has more tokens than embeddings")


_Shapes = dict[str, tuple[int, ...]]


def _expected(config: JsonObject, *, biases: bool) -> tuple[_Shapes, _Shapes]:
    """Names and shapes of the tensors that the model needs, and of those that it may have."""
    hidden, D, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    queries, keys = D * config["num_attention_heads"], D * config["num_key_value_heads"]
    inner, kind = config["intermediate_size"], config["model_type"]
    layer: _Shapes = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    layer |= {"attn_q.weight": (queries, hidden), "attn_k.weight": (keys, hidden), "attn_v.weight": (keys, hidden)}
    layer |= {"attn_output.weight": (hidden, queries), "ffn_down.weight": (hidden, inner)}
    layer |= {"ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden)}
    if kind in ("qwen3", "gemma3_text"):
        layer |= {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
    if kind == "gemma3_text":
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if biases or kind == "qwen2":
        layer |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if biases and kind == "llama":
        layer |= {"attn_output.bias": (hidden,)}
    needed: _Shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        needed |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return needed, {"output.weight": (vocab, hidden), "rope_freqs.weight": (D // 2,)}


def _part(metadata: JsonObject, start: str) -> dict[str, Any]:
    """The settings whose names start so, arrays as lists."""
    return {
        name.removeprefix(start): value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in metadata.items()
        if name.startswith(start)
    }
