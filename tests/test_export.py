"""Exported nodes and prompt caches say what the file says, to readers that know nothing of this library."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache
from safetensors import safe_open

from nectar_mlx import NectarError, cli, export, interchange
from tests import oracle, toys

N = 60
HYBRID = Path(__file__).parent / "data" / "hybrid-nectar-2.nectar"


def written(nectar, tmp_path, **options):
    path = tmp_path / "nodes.safetensors"
    interchange.write_nodes(nectar, path, **options)
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss", "qwen3"])
def test_nodes_give_each_heads_attention(architecture, tmp_path):
    """Plain numpy over the exported arrays, against the bank in the file."""
    model = toys.toy(architecture)
    nectar = toys.picked(model, toys.random_tokens(N), 10, bits=16)
    tensors, metadata = written(nectar, tmp_path, dtype="float32")
    scale, layers = float(metadata["scale"]), [i for i in range(99) if f"layers.{i}.keys" in tensors]
    assert len(layers) == len(nectar.banks) and int(metadata["start"]) == N
    assert tensors["prefix"].tolist() == nectar.prefix
    for layer, bank in zip(layers, nectar.banks, strict=True):
        keys, values, bias = [tensors[f"layers.{layer}.{name}"] for name in ("keys", "values", "bias")]
        queries = mx.random.normal((len(keys), 5, keys.shape[-1]), key=mx.random.key(layer)) * 3
        output, log_normalizer = oracle.attention(queries, keys, values, scale=scale, bias=bias)
        part = bank(queries)
        common = 0.0 if bank.offset is None else scale * (np.array(queries) * np.array(bank.offset)[:, None]).sum(-1)
        np.testing.assert_allclose(part.output, output, atol=1e-4)
        np.testing.assert_allclose(np.array(part.log_normalizer) + common, log_normalizer, atol=1e-3)
    windows = json.loads(metadata["windows"])
    assert {int(layer) for layer in windows} == nectar.windows.keys()
    for layer, window in nectar.windows.items():
        np.testing.assert_array_equal(tensors[f"layers.{layer}.window_keys"], np.array(window.keys))


def test_half_precision_is_the_default(tmp_path):
    nectar = toys.picked(toys.toy("llama"), toys.random_tokens(N), 10)
    tensors, _ = written(nectar, tmp_path)
    assert tensors["layers.0.keys"].dtype == np.float16 and tensors["layers.0.bias"].dtype == np.float32


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_prompt_cache_answers_as_the_file(architecture, tmp_path):
    model = toys.toy(architecture)
    nectar = toys.exact(model, toys.random_tokens(N))
    interchange.write_prompt_cache(nectar, tmp_path / "cache.safetensors")
    tail = mx.array([toys.random_tokens(7, seed=1)])
    stock = model(tail, cache=load_prompt_cache(str(tmp_path / "cache.safetensors")))
    np.testing.assert_allclose(model(tail, cache=nectar.make_cache()), stock, atol=2e-5)


def test_the_command(tmp_path, capsys):
    toys.picked(toys.toy("llama"), toys.random_tokens(N), 10).save(tmp_path / "a.nectar")
    assert export.main([str(tmp_path / "a.nectar"), str(tmp_path / "a.safetensors")]) == 0
    assert "position 60" in capsys.readouterr().err
    assert mx.load(str(tmp_path / "a.safetensors"))["layers.0.keys"].shape == (2, 10, 16)


def test_of_a_hybrid_the_nodes_alone_are_written_and_the_command_says_so(tmp_path, capsys):
    assert export.main([str(HYBRID), str(tmp_path / "a.safetensors")]) == 0
    assert "exact keys" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    path = tmp_path / "a.nectar"
    nectar = toys.picked(toys.toy("llama"), toys.random_tokens(N), 10)
    nectar.save(path)
    assert export.main([str(path), str(tmp_path / "x"), "--prompt-cache"]) == cli.FAULT
    assert export.main([str(path), str(path)]) == cli.FAULT
    assert export.main([str(path), str(tmp_path / "none" / "x")]) == cli.FAULT
    assert all(line.startswith("nectar export: ") for line in capsys.readouterr().err.splitlines())
    nectar.banks[0].parameters["values"] = nectar.banks[0].parameters["values"] * 1e9
    with pytest.raises(NectarError, match="beyond float16"):
        interchange.write_nodes(nectar, tmp_path / "big.safetensors")


@pytest.mark.parametrize("option", [(), ("--prompt-cache",)])
def test_only_what_was_exported_is_replaced(option, tmp_path, capsys):
    model = toys.toy("gemma3_text")
    path, letter, weights = (tmp_path / name for name in ("a.nectar", "letter.txt", "model.safetensors"))
    toys.exact(model, toys.random_tokens(N)).save(path)
    letter.write_text("a letter")
    mx.save_safetensors(str(weights), {"w": mx.zeros(3)}, {"format": "mlx"})
    for other in (letter, weights):
        held = other.read_bytes()
        assert export.main([str(path), str(other), *option]) == cli.FAULT
        assert "name another file" in capsys.readouterr().err and other.read_bytes() == held
    for _ in range(2):
        assert export.main([str(path), str(tmp_path / "out"), *option]) == 0
