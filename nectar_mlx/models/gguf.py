"""A .gguf file as an ordinary mlx-lm folder: config.json, safetensors, tokenizer.json, chat template.

Architectures llama, qwen2 and qwen3. Every tensor is dequantised, into the type that the model runs in (bfloat16, or
float16 or float32 where most of the file already is), one shard at a time.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm  # noqa: F401  keeps transformers from advising to install PyTorch
import numpy as np
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nectar_mlx.errors import NectarError

SHARD_BYTES = 1 << 30

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
_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_TYPES = {"F32": mx.float32, "F16": mx.float16}

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits a text before byte-level BPE, by the name that llama.cpp gives the tokenizer.
_SPLITS = {
    "default": (_GPT2_WORDS,),
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "starcoder": (r"\p{N}", _GPT2_WORDS),
    "qwen2": (_WORDS % "",),
    "deepseek-r1-qwen": (_WORDS % "",),
    "llama-bpe": (_WORDS % "{1,3}",),
    "llama3": (_WORDS % "{1,3}",),
}
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def convert(path: Path, folder: Path) -> None:
    """Write the model in `path` (.gguf) into `folder`, which exists and is empty, the way `mlx_lm.load` reads it.

    Raises NectarError for a file that is no GGUF, or whose architecture, weights or tokenizer are not supported.
    """
    metadata, tensors = _read(path)
    config = _config(path, metadata, tensors)
    tokenizer = _tokenizer(path, metadata)
    tokenizer.save_pretrained(folder)
    for number, shard in enumerate(_shards(path, config, tensors), start=1):
        mx.save_safetensors(str(folder / f"model-{number:05}.safetensors"), shard, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        file = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in file.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise NectarError(f"{path}: not a whole GGUF file ({str(error).splitlines()[0]})") from error
    return metadata, {tensor.name: tensor for tensor in file.tensors}


def _config(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise NectarError(f"{path}: architecture {arch!r} is not supported as GGUF; take an mlx-community folder of it")

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    if value("expert_count"):
        raise NectarError(f"{path}: mixtures of experts are not supported as GGUF; take an mlx-community folder of it")
    if lacking := [f"{arch}.{key}" for key in _REQUIRED if not value(key)]:
        raise NectarError(f"{path}: not a whole {arch} model: it lacks {', '.join(lacking)}")
    if "token_embd.weight" not in tensors:
        raise NectarError(f"{path}: not a whole {arch} model: it lacks token_embd.weight")
    hidden, heads = value("embedding_length"), value("attention.head_count")
    config = {
        "model_type": arch,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch] + "ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(tensors["token_embd.weight"].data),
        "max_position_embeddings": value("context_length"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, value, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    return {key: item for key, item in config.items() if item is not None}


def _rope_scaling(path: Path, value: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(path, value, np.asarray(tensors["rope_freqs.weight"].data, np.float64))
    kind = value("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    if kind == "yarn":
        original = value("rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": value("rope.scaling.factor"),
            "original_max_position_embeddings": original,
        }
    raise NectarError(f"{path}: RoPE scaling {kind!r} is not supported as GGUF; take an mlx-community folder of it")


def _llama3_scaling(path: Path, value: Any, divisors: np.ndarray) -> dict[str, Any]:
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


def _end_tokens(metadata: dict[str, Any]) -> list[int]:
    names = ("eos_token_id", "eot_token_id")
    ids = (metadata.get(f"tokenizer.ggml.{name}") for name in names)
    return list(dict.fromkeys(token for token in ids if token is not None))


def _shards(path: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Iterator[dict[str, mx.array]]:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    dtype = _TYPES.get(sizes.most_common(1)[0][0], mx.bfloat16)
    console = Console(stderr=True)
    steps = track(tensors.values(), path.name, console=console, transient=True, disable=not console.is_terminal)
    shard: dict[str, mx.array] = {}
    for tensor in steps:
        if tensor.name.startswith("rope_freqs."):
            continue
        name = _weight_name(path, tensor.name)
        shard[name] = mx.array(_values(path, config, tensor)).astype(dtype)
        mx.eval(shard[name])
        if sum(array.nbytes for array in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _values(path: Path, config: dict[str, Any], tensor: Any) -> np.ndarray:
    try:
        values: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise NectarError(f"{path}: {tensor.name} is {kind}, which cannot be dequantised") from error
    if config["model_type"] == "llama" and (match := re.search(r"attn_([qk])\.", tensor.name)):
        heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        return _split_halves(values, heads)
    return values


def _weight_name(path: Path, name: str) -> str:
    """The name that mlx-lm gives a GGUF tensor."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, suffix = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
    elif match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        part, suffix = match.groups()
        if part in _GLOBAL_NAMES:
            return f"{_GLOBAL_NAMES[part]}.{suffix}"
    raise NectarError(f"{path}: the tensor {name} has no place in mlx-lm's model; take an mlx-community folder of it")


def _split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the interleaving of llama's query and key rows [H*D, ...]: pairs (2i, 2i+1) become (i, i + D/2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = value("model"), value("tokens")
    if not tokens:
        raise NectarError(f"{path}: the file carries no tokenizer")
    if kind == "gpt2":
        tokenizer = _byte_level(path, value)
    elif kind == "llama":
        tokenizer = _sentencepiece(value)
    else:
        raise NectarError(f"{path}: tokenizer {kind!r} is not supported as GGUF; take an mlx-community folder of it")
    types = value("token_type", [1] * len(tokens))
    for wanted in (_CONTROL, _USER_DEFINED):
        special = wanted == _CONTROL
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == wanted
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: value(f"{name}_token_id") for role, name in names.items()}
    roles = {role: tokens[index] for role, index in ids.items() if index is not None and index < len(tokens)}
    if value("add_bos_token", kind == "llama" or value("pre") in ("llama-bpe", "llama3")):
        _prepend(tokenizer, roles["bos_token"], ids["bos_token"])
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length", 1 << 30),
        **({"chat_template": template} if template else {}),
        **roles,
    )


def _prepend(tokenizer: Tokenizer, token: str, index: int) -> None:
    start = processors.TemplateProcessing(single=f"{token}:0 $A:0", special_tokens=[(token, index)])
    tokenizer.post_processor = start


def _byte_level(path: Path, value: Any) -> Tokenizer:
    name = value("pre", "default")
    if name not in _SPLITS:
        raise NectarError(f"{path}: tokenizer {name!r} is not supported as GGUF; take an mlx-community folder of it")
    vocabulary = {token: index for index, token in enumerate(value("tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if "qwen" in name:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(value: Any) -> Tokenizer:
    """SentencePiece's BPE as merges: a pair merges the earlier, the higher the score of what it makes."""
    tokens, scores = value("tokens"), value("scores")
    types = value("token_type", [1] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (-scores[index], piece[:cut], piece[cut:])
        for piece, index in vocabulary.items()
        if types[index] not in (_CONTROL, _BYTE)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: merge[0])
    unknown = tokens[value("unknown_token_id", 0)]
    pairs = [(left, right) for _, left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if value("add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
