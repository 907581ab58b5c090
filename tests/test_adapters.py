"""Adapters: a file that was fitted with one answers with it alone, and says what to give."""

import json

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from nectar_mlx import Nectar, NectarError, ask, inspect, models, serve
from nectar_mlx.__main__ import main
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.models import adapters
from tests import toys
from tests.fitting.toy_fit import FAST
from tests.serving.running import Running
from tests.serving.running import ask as ask_server

QUESTION = "who is the fox?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy's folder with a .nectar, `plain`, and two adapters; `with_adapter` is fitted with the first."""
    folder = tmp_path_factory.mktemp("adapters")
    toys.book(folder, name="plain")
    first = toys.adapter(folder / "first")
    toys.adapter(folder / "second", seed=1)
    model, tokenizer = models.load(str(folder / "model"), adapter=first)
    nectar = toys.fit(
        model, tokenizer, "The fox runs. " * 20, name=str(folder / "model"), config=FitConfig(**FAST | {"steps": 3})
    )
    nectar.save(folder / "with_adapter.nectar")
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_is_loaded_and_exact_heads_answer_as_the_stock_model(kind, folder, tmp_path):
    path = toys.adapter(tmp_path / kind, kind)
    model = models.load(str(folder / "model"), adapter=path)[0]
    prefix, turn = toys.random_tokens(40), toys.random_tokens(8, seed=1)
    expected = model(mx.array([prefix + turn]))[:, -8:]
    assert mx.allclose(model(mx.array([turn]), cache=toys.exact(model, prefix).make_cache()), expected, atol=2e-3)
    assert not mx.allclose(toys.toy("llama")(mx.array([prefix + turn]))[:, -8:], expected, atol=0.1)
    again = models.load(str(folder / "model"), adapter=path)[0]
    assert adapters.of(again) == adapters.of(model) and adapters.of(model).path == path
    assert models.fingerprint(again) == models.fingerprint(model)


def test_the_scale_of_an_adapter_is_part_of_it(folder, tmp_path):
    loaded = [
        models.load(str(folder / "model"), adapter=toys.adapter(tmp_path / str(scale), scale=scale))[0]
        for scale in (4.0, 8.0)
    ]
    assert adapters.of(loaded[0]).sha256 != adapters.of(loaded[1]).sha256
    assert models.fingerprint(loaded[0]) != models.fingerprint(loaded[1])


def test_a_file_names_its_adapter(folder, capsys):
    path, first = folder / "with_adapter.nectar", str(folder / "first")
    assert ask.main([str(path), QUESTION, "--adapter", first, "--max-tokens", "4"]) == 0
    capsys.readouterr()
    assert inspect.main([str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = models.load(str(folder / "model"), adapter=first)[0]
    assert (facts["adapter"], facts["adapter_sha256"]) == (first, adapters.of(model).sha256)
    assert inspect.main([str(folder / "plain.nectar"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == ""


@pytest.mark.parametrize(
    ("name", "given", "complaint"),
    [
        ("with_adapter", None, "with the adapter {0}/first, and the model given has none: give --adapter {0}/first"),
        ("with_adapter", "second", "with the adapter {0}/first, not with {0}/second: give --adapter {0}/first"),
        ("plain", "first", "was fitted without the adapter ({0}/first): leave it out, or fit again"),
        ("plain", "model", "{0}/model is not an adapter's folder, as mlx_lm.lora writes it: it has no adapter_config"),
    ],
)
def test_another_adapter_is_refused_in_one_line(name, given, complaint, folder, capsys):
    options = ["--adapter", str(folder / given)] if given else []
    assert ask.main([str(folder / f"{name}.nectar"), QUESTION, *options]) == 2
    out, err = capsys.readouterr()
    assert not out and complaint.format(folder) in err.splitlines()[-1]


def test_an_adapter_of_another_model_is_refused(folder, tmp_path, capsys):
    path = toys.adapter(tmp_path / "other", model_type="phi3")
    assert ask.main([str(folder / "plain.nectar"), QUESTION, "--adapter", path]) == 2
    assert f"mlx-lm cannot load the adapter {path} for this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "scale", "complaint"),
    [
        (lambda weights: weights.popitem(), 4.0, "its file has no model.layers."),
        (lambda weights: weights.update({min(weights): mx.full(weights[min(weights)].shape, mx.nan)}), 4.0, "finite"),
        (lambda weights: None, float("nan"), "the scale of model.layers"),
        (lambda weights: None, 1e39, "the scale of model.layers"),
    ],
    ids=["missing", "nan", "scale", "large scale"],
)
def test_an_adapter_that_is_incomplete_or_no_number_is_refused(change, scale, complaint, folder, tmp_path):
    path = toys.adapter(tmp_path / "bad", scale=scale)
    weights = dict(mx.load(f"{path}/adapters.safetensors"))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(f"{path}/adapters.safetensors", weights)
    with pytest.raises(NectarError, match=complaint):
        models.load(str(folder / "model"), adapter=path)


def test_an_adapter_that_was_trained_further(folder, tmp_path, capsys):
    path = toys.adapter(tmp_path / "mine")
    model, tokenizer = models.load(str(folder / "model"), adapter=path)
    toys.exact(model, [5, 6, 7], tokenizer).save(tmp_path / "x.nectar")
    toys.adapter(tmp_path / "mine", seed=9)
    with pytest.raises(NectarError, match="trained further since: fit again"):
        Nectar.load(tmp_path / "x.nectar", models.load(str(folder / "model"), adapter=path)[0])


def test_a_model_that_came_with_lora_layers(tmp_path):
    """Loaded by mlx-lm itself, which says no path."""
    model = toys.toy("llama")
    nectar = toys.picked(model, toys.random_tokens(30), 12)
    nectar.save(tmp_path / "plain.nectar")
    linear_to_lora_layers(model, 2, toys.LORA)
    for layer in model.layers[1:]:
        layer.self_attn.q_proj.lora_b = 0.1 * mx.random.normal(layer.self_attn.q_proj.lora_b.shape)
    with pytest.raises(NectarError, match=r"without the adapter \(its LoRA layers\)"):
        Nectar.load(tmp_path / "plain.nectar", model)
    toys.picked(model, toys.random_tokens(30), 12).save(tmp_path / "adapted.nectar")
    Nectar.load(tmp_path / "adapted.nectar", model)
    with pytest.raises(NectarError, match=r"LoRA layers .* the model given has none$"):
        Nectar.load(tmp_path / "adapted.nectar", toys.toy("llama"))


def test_a_fit_with_another_adapter_is_not_replaced_unasked(folder, capsys):
    (folder / "text.txt").write_text("The fox runs. " * 20)
    path = folder / "kept.nectar"
    fit = ["fit", "--context", str(folder / "text.txt"), "--model", str(folder / "model"), "--kind", "exact"]
    fit += ["--output", str(path), "--adapter", str(folder / "first")]
    assert main(fit) == 0 and main(fit) == 0
    assert main([*fit[:-1], str(folder / "second")]) == 2
    assert "--force replaces it" in capsys.readouterr().err


def test_a_server_and_an_update_take_it(folder, tmp_path, capsys):
    path, first = folder / "with_adapter.nectar", str(folder / "first")
    server = Running(serve.make_parser().parse_args([str(path), "--adapter", first, "--port", "0"]))
    try:
        answer = ask_server(server.client(), "with_adapter", QUESTION, max_tokens=4).choices[0].message.content
    finally:
        server.close()
    assert ask.main([str(path), QUESTION, "--adapter", first, "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == answer + "\n"
    (tmp_path / "text.txt").write_text("The fox runs. " * 20)
    update = ["update", str(path), "--context", str(tmp_path / "text.txt"), "--output", str(tmp_path / "new.nectar")]
    assert main(update) == 2
    assert f"give --adapter {first}" in capsys.readouterr().err
    assert main([*update, "--adapter", first]) == 0
    assert "is up to date" in capsys.readouterr().err
