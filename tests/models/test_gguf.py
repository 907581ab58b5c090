"""GGUF files written here from random mlx-lm models must load back as the same models."""

import os
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, llama, qwen2, qwen3
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from nectar_mlx import NectarError, models
from nectar_mlx.fitting import machines
from nectar_mlx.models.gguf_tokenizer import SPLITS

TEXT = (
    "We'll see 1234 naïve finds, x_1 = [3.14]; they're here.\n\n  Two spaces, a\ttab, 你好 and 🙂.\r\n"
    "The quick brown fox jumps over the lazy dog; THE DOG DOESN'T care about 2024 or 100000 foxes.\n"
)
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
GEMMA3 = {"num_hidden_layers": 7, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 4}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3_text}
# Where a block of a K-quantized tensor keeps its float16 scales, and values that make weights of about 0.1.
K_SCALES = {"Q4_K": {0: 4e-4, 2: 3e-3}, "Q6_K": {208: 5e-5}}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small byte-level BPE, split as GPT-2 does."""
    return train_byte_level(SPLITS["gpt-2"])


def train_byte_level(splits: tuple[str, ...], *, end: str = "<|im_end|>") -> Tokenizer:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    words = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", end],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


def toy_model(arch: str, vocab_size: int, **changes: Any) -> Any:
    extra: dict[str, Any] = {"qwen2": {}, "gemma3": GEMMA3}.get(arch, {"head_dim": 24})
    module, model_type = ARCHITECTURES[arch], "gemma3_text" if arch == "gemma3" else arch
    arguments = {"rope_theta": 50000.0, "tie_word_embeddings": False} | SIZES | extra | changes
    arguments |= {"model_type": model_type, "vocab_size": vocab_size}
    model = module.Model(module.ModelArgs.from_dict(arguments))
    if arch == "gemma3":
        model.sanitize({})  # ties its embeddings
    mx.random.seed(1)
    weights = [(name, 0.2 * mx.random.normal(array.shape)) for name, array in tree_flatten(model.parameters())]
    shift = 0 if arch == "gemma3" else 1  # Gemma's norms multiply by 1 + weight
    model.load_weights([(name, shift + array if "norm" in name else array) for name, array in weights])
    return model


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows, one row at a time: row i and row i + D/2 of a head become neighbours."""
    size = len(rows) // heads
    order = [head * size + i + half * size // 2 for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges_of(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


def write_gguf(
    path: Path, model: Any, tokenizer: Tokenizer, kind: str = "F32", pre: str = "gpt-2"
) -> dict[str, mx.array]:
    """Write a model as GGUF and give back the weights that a reader must find, quantization included."""
    args, arch = model.args, model.args.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_embedding_length(args.hidden_size)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_context_length(args.max_position_embeddings)
    if getattr(args, "head_dim", None):
        writer.add_key_length(args.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(args.sliding_window)
    write_scaling(writer, args)
    write_tokenizer(writer, tokenizer, pre)
    expected = {}
    for name, array in tree_flatten(model.parameters()):
        values = np.array(array)
        stored = kind if values.ndim == 2 else "F32"
        quantization = gguf.GGMLQuantizationType[stored]
        data = random_blocks(values.shape, kind) if stored in K_SCALES else gguf.quants.quantize(values, quantization)
        expected[name] = mx.array(gguf.quants.dequantize(data, quantization))
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = args.num_attention_heads if "q_proj" in name else args.num_key_value_heads
            data = interleaved(data, heads)
        elif arch == "gemma3" and "norm" in name:
            data = data + 1
        writer.add_tensor(gguf_name(name, arch), data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def random_blocks(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Weights of a kind that gguf reads but does not write: random bytes, with sensible scales where they belong."""
    values_per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(shape[0]).integers(0, 256, (*shape[:-1], shape[-1] // values_per_block, block_bytes))
    blocks = blocks.astype(np.uint8)
    for start, scale in K_SCALES[kind].items():
        blocks[..., start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_scaling(writer: gguf.GGUFWriter, args: Any) -> None:
    scaling = args.rope_scaling
    if not scaling:
        return
    if scaling["rope_type"] == "llama3":
        head_dim = args.head_dim
        inverse = args.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", llama3_divisors(inverse, scaling).astype(np.float32))
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if "original_max_position_embeddings" in scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def llama3_divisors(inverse: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each frequency by, from its definition: none, all, or between the two wavelengths."""
    low, high, original = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    divisors = []
    for frequency in inverse:
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors)


def gguf_name(name: str, arch: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    names = GEMMA3_NAMES if arch == "gemma3" else NAMES
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{suffix}"
    return f"{names[stem]}.{suffix}"


def assert_same_logits(path: Path, model: Any, expected: dict[str, mx.array], tolerance: float) -> None:
    loaded, _ = models.load(str(path))
    tokens = mx.array([[5, 17, 3, 200, 41, 7, 7, 299, 0, 12, 55]])
    model.load_weights(list(expected.items()))
    want, got = np.array(model(tokens)), np.array(loaded(tokens))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
    # What has to be close must also be able to differ.
    assert np.abs(want - np.roll(want, 1, axis=1)).max() > 0.1 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_logits_are_those_of_the_weights(arch: str, kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = toy_model(arch, tokenizer.get_vocab_size())
    expected = write_gguf(tmp_path / "toy.gguf", model, tokenizer, kind)
    kept = {"F32": mx.float32, "F16": mx.float16}.get(kind, mx.bfloat16)
    rounded = {name: array.astype(kept).astype(mx.float32) for name, array in expected.items()}
    assert_same_logits(tmp_path / "toy.gguf", model, rounded, 1e-5)


@pytest.mark.parametrize("kind", sorted(K_SCALES))
def test_k_quantizations(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = toy_model("llama", tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=256, head_dim=64)
    expected = write_gguf(tmp_path / "toy.gguf", model, tokenizer, kind)
    rounded = {name: array.astype(mx.bfloat16).astype(mx.float32) for name, array in expected.items()}
    assert_same_logits(tmp_path / "toy.gguf", model, rounded, 1e-5)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "default head_dim": ("llama", {"head_dim": None}),
    "biases": ("llama", {"attention_bias": True}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "gemma3, linear": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3 of 27B": ("gemma3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    "yarn": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_settings_survive(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    arch, changes = CHANGES[case]
    model = toy_model(arch, tokenizer.get_vocab_size(), **changes)
    expected = write_gguf(tmp_path / "toy.gguf", model, tokenizer)
    assert_same_logits(tmp_path / "toy.gguf", model, expected, 1e-5)


def test_it_is_converted_once_and_later_called_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_gguf(tmp_path / "toy.gguf", toy_model("qwen3", tokenizer.get_vocab_size()), tokenizer)
    lines: list[str] = []
    folder = models.resolve(str(tmp_path / "toy.gguf"), log=lines.append).path
    assert len(lines) == 1 and "once" in lines[0]
    source = models.resolve(str(tmp_path / "toy.gguf"), log=lines.append)
    assert source.path == folder and len(lines) == 1, "it is not converted again"
    assert source.description == "toy.gguf: the GGUF file, as it was converted once"


def test_a_disk_without_room_for_it_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model("qwen3", tokenizer.get_vocab_size())
    write_gguf(tmp_path / "toy.gguf", model, tokenizer)
    monkeypatch.setattr("nectar_mlx.models.gguf.free_space", lambda folder: 20_000_000)
    with pytest.raises(NectarError, match="NECTAR_CACHE names another folder") as error:
        models.resolve(str(tmp_path / "toy.gguf"))
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    monkeypatch.setattr("nectar_mlx.models.gguf.free_space", lambda folder: 20_000_000 + weights)
    models.resolve(str(tmp_path / "toy.gguf"))


def test_a_fit_of_it_is_estimated(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = toy_model("qwen3", tokenizer.get_vocab_size())
    write_gguf(tmp_path / "toy.gguf", model, tokenizer)
    shape, args = machines.named_shape(str(tmp_path / "toy.gguf")), model.args
    assert (shape.name, shape.geometry.n_layers, shape.window) == (
        "toy.gguf", args.num_hidden_layers, args.max_position_embeddings,
    )  # fmt: skip
    assert shape.vocabulary == args.vocab_size * args.hidden_size
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with pytest.raises(NectarError, match="none"):
        machines.named_shape(str(tmp_path / "none.gguf"))


def test_gemma3_ends_a_turn_with_a_token_that_its_file_does_not_name(tmp_path: Path) -> None:
    tokenizer = train_byte_level(SPLITS["gpt-2"], end="<eos>")
    tokenizer.add_special_tokens(["<end_of_turn>"])
    size = tokenizer.get_vocab_size()
    write_gguf(tmp_path / "toy.gguf", toy_model("gemma3", size), tokenizer)
    assert models.load(str(tmp_path / "toy.gguf"))[1].eos_token_ids == {2, size - 1}


def test_large_models_are_written_in_shards(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nectar_mlx.models.gguf.SHARD_BYTES", 50_000)
    model = toy_model("llama", tokenizer.get_vocab_size())
    expected = write_gguf(tmp_path / "toy.gguf", model, tokenizer)
    assert_same_logits(tmp_path / "toy.gguf", model, expected, 1e-5)
    assert len(list(models.resolve(str(tmp_path / "toy.gguf")).path.glob("model*.safetensors"))) > 3


def test_is_converted_once_until_the_file_changes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, lines = tmp_path / "toy.gguf", []
    for _ in range(2):
        write_gguf(path, toy_model("llama", tokenizer.get_vocab_size()), tokenizer)
        first, second = (models.resolve(str(path), log=lines.append) for _ in range(2))
        assert first == second
    assert len(lines) == 2 and "converting toy.gguf" in lines[0]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "text", "magic only", "header cut", "tensors cut", "huge counts"])
def test_a_broken_file_is_one_line(damage: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "toy.gguf"
    write_gguf(path, toy_model("llama", tokenizer.get_vocab_size()), tokenizer)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"not a model at all, just a text that someone renamed",
            "magic only": whole[:4],
            "header cut": whole[:3000],
            "tensors cut": whole[: len(whole) // 2],
            "huge counts": whole[:8] + b"\xff" * 16 + whole[24:],
        }[damage]
    )
    with pytest.raises(NectarError, match=r"toy\.gguf") as error:
        models.load(str(path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*")), "half a conversion was left behind"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "gemma3n"}, "gemma3n"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"llama.attention.head_count": None}, "lacks llama.attention.head_count"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.head_count": "four"}, "do not describe a model"),
        ({"tokenizer.ggml.merges": ["no such"]}, "tokenizer is damaged"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer is damaged"),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], said: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nectar_mlx.models import gguf as converter

    write_gguf(tmp_path / "toy.gguf", toy_model("llama", tokenizer.get_vocab_size()), tokenizer)
    read = converter.read

    def changed(path: Path) -> Any:
        metadata, tensors = read(path)
        metadata |= change
        return {key: value for key, value in metadata.items() if value is not None}, tensors

    monkeypatch.setattr(converter, "read", changed)
    with pytest.raises(NectarError, match=said) as error:
        models.load(str(tmp_path / "toy.gguf"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_real_gemma3_completes_a_text() -> None:
    if "NECTAR_GEMMA3_GGUF" not in os.environ:
        pytest.skip("set NECTAR_GEMMA3_GGUF to the path of gemma-3-270m's .gguf file")
    model, tokenizer = models.load(os.environ["NECTAR_GEMMA3_GGUF"])
    prompt = tokenizer.encode("The first ten prime numbers are 2, 3, 5,")
    assert prompt[0] == tokenizer.bos_token_id
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) == " 7, 11, 13, 17, 19, "
