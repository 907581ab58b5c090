"""A .gguf file as an ordinary mlx-lm folder: config.json, safetensors, tokenizer.json, chat template.

Architectures llama, qwen2, qwen3 and gemma3 (its text part). Every tensor is dequantized, into the type that the model
runs in (bfloat16, or float16 or float32 where most of the file already is), one shard at a time.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm  # noqa: F401  keeps transformers from advising to install PyTorch
import numpy as np
import transformers

from nectar_mlx.core.files import free_space
from nectar_mlx.core.progress import Progress, silent
from nectar_mlx.core.types import AnyArray, JsonObject
from nectar_mlx.errors import NectarError
from nectar_mlx.models import gguf_settings, gguf_tokenizer
from nectar_mlx.models.gguf_file import Tensor, read

SHARD_BYTES = 1 << 30
_LARGEST = 1e5  # of a weight: models have some hundreds, and with these all products are still finite

_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# By the name in the file: mlx-lm's, and transformers' class.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_TOKENIZER_BYTES = 20_000_000  # the 49,152 tokens of SmolLM2 take 3.5 MB; the largest vocabularies have 262,144
_TYPES = {"F32": mx.float32, "F16": mx.float16}


def convert(path: Path, folder: Path, *, progress: Progress = silent) -> None:
    """Write the model in `path` (.gguf) into `folder`, which exists and is empty, the way `mlx_lm.load` reads it.

    Raises NectarError for a file that is no GGUF, or whose architecture, weights or tokenizer are not supported, and
    where the folder's disk has no room for it.
    """
    with _described(path):
        metadata, tensors = read(path)
        config = _config(path, metadata, tensors)
        gguf_settings.check_tensors(metadata, config, tensors)
        _check_room(path, folder, tensors)
        gguf_tokenizer.build(path, metadata).save_pretrained(folder)
        for number, shard in enumerate(_shards(path, config, tensors, progress), start=1):
            mx.save_safetensors(str(folder / f"model-{number:05}.safetensors"), shard, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def read_config(path: Path) -> JsonObject:
    """What `convert` would write into config.json; no weights are read. Raises NectarError as it does."""
    with _described(path):
        return _config(path, *read(path))


@contextmanager
def _described(path: Path) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NectarError(f"{path}: its settings do not describe a model ({reason})") from error


def _config(path: Path, metadata: JsonObject, tensors: Mapping[str, Tensor]) -> JsonObject:
    arch = str(metadata.get("general.architecture"))[:40]
    if arch not in _ARCHITECTURES:
        raise NectarError(f"{path}: architecture {arch!r} is not supported as GGUF; take an mlx-community folder of it")

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    if value("expert_count"):
        raise NectarError(f"{path}: mixtures of experts are not supported as GGUF; take an mlx-community folder of it")
    if lacking := [f"{arch}.{key}" for key in _REQUIRED if not value(key)]:
        raise NectarError(f"{path}: not a whole {arch} model: it lacks {', '.join(lacking)}")
    gguf_settings.check_model(arch, metadata)
    if "token_embd.weight" not in tensors:
        raise NectarError(f"{path}: not a whole {arch} model: it lacks token_embd.weight")
    hidden, heads = value("embedding_length"), value("attention.head_count")
    model_type, architecture = _ARCHITECTURES[arch]
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        # Where there is none, transformers takes any large tokenizer for an early Mistral's, and warns of its splits.
        "transformers_version": transformers.__version__,
        "hidden_size": hidden,
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
        "vocab_size": len(tensors["token_embd.weight"].data),
        "max_position_embeddings": value("context_length"),
        "rope_theta": float(value("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(path, value, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    if arch == "gemma3":
        config |= _gemma3(path, value, head_dim=config["head_dim"])
    return {key: item for key, item in config.items() if item is not None}


def _gemma3(path: Path, value: Any, *, head_dim: int) -> JsonObject:
    """What only Gemma 3 has. The file leaves out what llama.cpp assumes: the pattern of the sliding windows, their RoPE
    base, and the scale of the scores, which follows from head_dim in all models but the one of 27B.
    """
    window, pattern = value("attention.sliding_window", 0), value("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, int) or value("final_logit_softcapping"):
        raise NectarError(f"{path}: its sliding windows or capped logits are not those of Gemma 3")
    is_27b = value("block_count") == 62
    return {
        "query_pre_attn_scalar": value("embedding_length") // value("attention.head_count") if is_27b else head_dim,
        "rope_local_base_freq": float(value("rope.freq_base_swa", 10000.0)),
        "sliding_window": window,
        "sliding_window_pattern": pattern if window else 1,
    }


def _rope_scaling(path: Path, value: Any, tensors: Mapping[str, Tensor]) -> JsonObject | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(path, value, _divisors(tensors["rope_freqs.weight"]))
    kind = value("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(value("rope.scaling.factor"))}
    if kind == "yarn":
        original = value("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": float(value("rope.scaling.factor")),
            "original_max_position_embeddings": original,
        }
    raise NectarError(f"{path}: RoPE scaling {kind!r} is not supported as GGUF; take an mlx-community folder of it")


def _llama3_scaling(path: Path, value: Any, divisors: AnyArray) -> JsonObject:
    """Name the Llama 3 scaling whose frequency divisors these are: the file keeps only their values."""
    low, high, original = 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * value("rope.freq_base", 10000.0) ** (np.arange(len(divisors)) / len(divisors))
    factor = float(divisors.max())
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(expected, divisors, rtol=1e-3):
        raise NectarError(f"{path}: its RoPE frequencies are not Llama 3's; take an mlx-community folder of the model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _divisors(tensor: Tensor) -> AnyArray:
    divisors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError("its RoPE frequencies are none")
    return divisors


def _end_tokens(metadata: JsonObject) -> list[int]:
    ids = [metadata.get(f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id")]
    if metadata["general.architecture"] == "gemma3" and "tokenizer.chat_template" in metadata:
        # llama.cpp knows the end of a turn by its name, so files need not say which token it is.
        ids += [n for n, token in enumerate(metadata.get("tokenizer.ggml.tokens", [])) if token == "<end_of_turn>"]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _check_room(path: Path, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """NectarError where the weights do not fit the disk: MLX and tokenizers raise there what nobody expects."""
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    needed, free = int(numbers) * _dtype(tensors).size + _TOKENIZER_BYTES, free_space(folder)
    if needed > free:
        raise NectarError(
            f"{path.name}: its conversion takes {needed / 1e6:,.0f} MB; {folder.parent} has room for "
            f"{free / 1e6:,.0f} MB: free some, or NECTAR_CACHE names another folder"
        )


def _dtype(tensors: Mapping[str, Tensor]) -> mx.Dtype:
    """The type that most of the weights have, or can be dequantized to."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.tensor_type.name] += math.prod(tensor.shape)
    return _TYPES.get(sizes.most_common(1)[0][0], mx.bfloat16)


def _shards(
    path: Path, config: JsonObject, tensors: Mapping[str, Tensor], progress: Progress
) -> Iterator[dict[str, mx.array]]:
    dtype = _dtype(tensors)
    shard: dict[str, mx.array] = {}
    with progress(f"converting {path.name}", len(tensors)) as done:
        for number, tensor in enumerate(tensors.values(), 1):
            if tensor.name.startswith("rope_freqs."):
                continue
            name = _weight_name(path, config["model_type"], tensor.name)
            shard[name] = mx.array(_values(path, config, tensor)).astype(dtype)
            mx.eval(shard[name])
            done(number)
            if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
                yield shard
                shard = {}
    if shard:
        yield shard


def _values(path: Path, config: JsonObject, tensor: Tensor) -> AnyArray:
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            values: AnyArray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise NectarError(f"{path}: {tensor.name} is {kind}, which cannot be dequantized") from error
    if not (np.abs(values) <= _LARGEST).all():
        raise NectarError(f"{path}: {tensor.name} holds numbers that are not finite or far too large")
    if config["model_type"] == "llama" and (match := re.search(r"attn_([qk])\.", tensor.name)):
        heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        return _split_halves(values, heads)
    # Gemma's norms multiply by 1 + weight, and llama.cpp stores that sum.
    return values - 1 if config["model_type"] == "gemma3_text" and tensor.name.endswith("norm.weight") else values


def _weight_name(path: Path, model_type: str, name: str) -> str:
    """The name that mlx-lm gives a GGUF tensor."""
    names = _LAYER_NAMES | (_GEMMA3_NAMES if model_type == "gemma3_text" else {})
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, tensor, suffix = match.groups()
        if tensor in names:
            return f"model.layers.{layer}.{names[tensor]}.{suffix}"
    elif match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        tensor, suffix = match.groups()
        if tensor in _GLOBAL_NAMES:
            return f"{_GLOBAL_NAMES[tensor]}.{suffix}"
    raise NectarError(f"{path}: the tensor {name} has no place in mlx-lm's model; take an mlx-community folder of it")


def _split_halves(rows: AnyArray, heads: int) -> AnyArray:
    """Undo the interleaving of llama's query and key rows [H*D, ...]: pairs (2i, 2i+1) become (i, i + D/2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
