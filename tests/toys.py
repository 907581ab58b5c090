"""Toys that tests share: a random model of every architecture, a tokenizer, and Nectars that need no fitting."""

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from nectar_mlx import Nectar, models, store
from nectar_mlx.fitting import pipeline, prefill
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.models import adapters
from nectar_mlx.retrieval import kv_path
from nectar_mlx.store import Layout
from tests.families import FAMILIES
from tests.more_families import MORE

VOCABULARY = 320
LAYERS = 3
_DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 24, "sliding_window_pattern": 3}
_EXPERTS = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_GPT_OSS = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "rope_theta": 10_000,
}
# model_type: the arguments beside those that all share. `mistral` is read by llama's module, as mlx-lm does.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_DENSE, **_GEMMA, "model_type": "gemma3_text"}, "vocab_size": VOCABULARY},
    "gemma3_text": _GEMMA,
    "gpt_oss": _GPT_OSS,
    "granite": _GRANITE,
    "llama": {},
    "mistral": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 24},
    "olmo2": {},
    "phi3": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": _EXPERTS,
}


def toy(model_type: str, *, seed: int = 0, **arguments: Any) -> nn.Module:
    """A random model in float32 whose attention is far from uniform."""
    module = importlib.import_module(f"mlx_lm.models.{ {'mistral': 'llama'}.get(model_type, model_type) }")
    config = {**_DENSE, **(ARCHITECTURES | FAMILIES | MORE)[model_type], **arguments, "model_type": model_type}
    if "text_config" in config:
        config["text_config"] = {**_DENSE, **config["text_config"]}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(_tree_map(model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    model.eval()
    return model


def _tree_map(parameters: Any) -> Any:
    """Larger query and key weights make attention peak; every vector becomes something other than its default."""
    changed = []
    for name, value in tree_flatten(parameters):
        if value.ndim == 1:
            value = value + 0.3 * mx.random.normal(value.shape)
        elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
            value = 3.0 * value
        changed.append((name, value))
    return tree_unflatten(changed)


def random_tokens(n: int, *, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(8, VOCABULARY, n).tolist()


def exact(model: nn.Module, prefix: Sequence[int], tokenizer: Any = None, *, name: str = "toy") -> Nectar:
    """A Nectar that keeps the context's own keys and values."""
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, prefix, geometry)
    heads = [head for bank in context.banks for head in bank.unstack()]
    return build(
        _layout(geometry, "exact", 16),
        heads,
        prefix=prefix,
        geometry=geometry,
        provenance=provenance(model, tokenizer, name),
        report={},
        windows=context.windows,
        offsets=context.offsets,
    )


def picked(model: nn.Module, prefix: Sequence[int], nodes: int, tokenizer: Any = None, *, bits: int = 8) -> Nectar:
    """A quadrature Nectar that stands on every so-many-th key of the context: far from exact, and quick to make."""
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, prefix, geometry)
    n = len(prefix)
    heads = []
    for index, head in enumerate(head for bank in context.banks for head in bank.unstack()):
        count = max(1, nodes - index % 3)  # heads of different sizes
        chosen = mx.array(np.linspace(0, n - 1, count).astype(np.int32))
        heads.append(
            {
                "keys": head["keys"][chosen],
                "values": head["values"][chosen],
                "bias": mx.full(count, float(np.log(n / count))),
            }
        )
    return build(
        _layout(geometry, "quadrature", bits),
        heads,
        prefix=prefix,
        geometry=geometry,
        provenance=provenance(model, tokenizer),
        report={"kl": 0.5, "agree": 0.7, "seconds": {"read": 0.1}},
        windows=context.windows,
        offsets=context.offsets,
    )


def fit(model: nn.Module, tokenizer: Any, text: str, **options: Any) -> Nectar:
    """`Nectar.fit` with a whole configuration, and with what only commands give."""
    return Nectar(*pipeline.fit(model, tokenizer, text, **options))


def build(
    layout: Layout,
    heads: Sequence[Any],
    *,
    prefix: Sequence[int],
    geometry: attention_patch.Geometry,
    windows: Any = None,
    offsets: Sequence[Any] = (),
    chunks: Sequence[int] = (),
    **told: Any,
) -> Nectar:
    """A Nectar of these heads, layer by layer."""
    tensors = store.contents(layout, heads, prefix=prefix, windows=windows or {}, offsets=offsets)
    described = store.description(tensors, layout, geometry, chunks=chunks, **told)
    return Nectar(tensors, described)


def _layout(geometry: attention_patch.Geometry, kind: str, bits: int) -> Layout:
    return Layout(
        kind=kind,
        n_layers=len(geometry.fitted),
        n_kv_heads=geometry.n_kv_heads,
        head_dim=geometry.head_dim,
        scale=geometry.scale,
        bits=bits,
        value_dim=0 if geometry.value_dim == geometry.head_dim else geometry.value_dim,
    )


def provenance(model: nn.Module, tokenizer: Any = None, name: str = "toy") -> dict[str, Any]:
    adapter = adapters.of(model)
    return {
        "model": name,
        "model_sha256": models.fingerprint(model),
        **({"adapter": dataclasses.asdict(adapter)} if adapter else {}),
        "tokenizer_sha256": models.tokenizer_fingerprint(tokenizer) if tokenizer is not None else "none",
        "config": {"budget": 0.1, "seed": 0},
        "source": "tests",
    }


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CHATML = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<bos>")


def tokenizer(
    template: str | None = CHAT, *, bos: str | None = None, specials: Sequence[str] = CHATML
) -> TokenizerWrapper:
    """A byte-level tokenizer of VOCABULARY tokens."""
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog, and who is he? the answer is here"] * 9, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token=bos)
    fast.chat_template = template
    return TokenizerWrapper(fast)


def save_model(model: nn.Module, folder: Path, tokenizer: TokenizerWrapper) -> Path:
    """Writes a folder that `mlx_lm.load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.args)))
    tokenizer._tokenizer.save_pretrained(folder)
    return folder


LORA = {"rank": 4, "scale": 4.0, "dropout": 0.0}


def adapter(folder: Path, kind: str = "lora", *, seed: int = 0, model_type: str = "llama", **changes: Any) -> str:
    """Writes an adapter's folder, as `mlx_lm.lora` does, with random weights."""
    model, lora = toy(model_type), LORA | changes
    if kind == "full":
        weights = {name: x for name, x in tree_flatten(model.parameters()) if ".q_proj." in name}
    else:
        linear_to_lora_layers(model, 2, lora, use_dora=kind == "dora")
        weights = {
            n: x for n, x in tree_flatten(model.parameters()) if n.rpartition(".")[2] in ("lora_a", "lora_b", "m")
        }
    key = mx.random.key(seed)
    weights = {name: x + 0.2 * mx.random.normal(x.shape, key=key) for name, x in sorted(weights.items())}
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def key_file(path: str | Path) -> Path:
    """The file of keys beside a .nectar."""
    return kv_path(path, store.tensors_digest(Path(path)))


CONTEXT = 60


class Book(NamedTuple):
    """A toy model's folder and a .nectar that names it."""

    folder: Path
    path: Path


def book(folder: Path, architecture: str = "llama", *, name: str = "book", seed: int = 0, **arguments: Any) -> Book:
    """Writes both; `seed` chooses the context, not the model."""
    words = tokenizer()
    model_folder = folder / "model"
    model = toy(architecture, **arguments)
    if not model_folder.exists():
        save_model(model, model_folder, words)
    nectar = exact(model, random_tokens(CONTEXT, seed=seed), words, name=str(model_folder))
    nectar.save(folder / f"{name}.nectar")
    return Book(model_folder, folder / f"{name}.nectar")
