"""Fits of model families whose layers keep more than keys: states, shared keys, latent vectors."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from nectar_mlx import Nectar
from nectar_mlx.fitting import fisher, prefill, state_bits
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.mlxlm.kept import State
from tests import toys
from tests.fitting.toy_fit import FAST, SHORT_ANSWERS, TEXT

FITTED = ("qwen3_next", "falcon_h1", "nemotron_h", "gemma3n", "gemma4", "deepseek_v3", "minicpm3", "kimi_linear")


@pytest.mark.parametrize("family", FITTED)
def test_a_fit_knows_the_text(family, toy_fit, tmp_path):
    nectar = toy_fit(family, budget=0.5, context_tokens=200)
    model, tokenizer = toys.toy(family), toys.tokenizer()
    prompt = mx.array([nectar.prompt(tokenizer, "who is the fox?")])
    truth = model(prompt, cache=toys.exact(model, nectar.prefix).make_cache())
    nectar.save(tmp_path / "toy.nectar")
    loaded = Nectar.load(tmp_path / "toy.nectar", model)
    caches = (loaded.make_cache(), make_prompt_cache(model))
    fitted, without = (float(mx.abs(model(prompt, cache=cache) - truth).mean()) for cache in caches)
    assert fitted < 0.5 * without
    assert nectar.report["kl"] < nectar.report["kl_no_context"]


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "nemotron_h", "kimi_linear"])
def test_states_are_coded_in_as_few_bits_as_the_loss_allows(family, toy_fit):
    nectar = toy_fit(family, budget=0.5, context_tokens=200)
    state = nectar.report["state"]
    assert state["bits"] in (8, 16) and 0 <= state["kl"] <= state_bits.LOSS
    kept = [k for k in nectar.windows.values() if isinstance(k, State)]
    assert state["bytes"] == sum(k.nbytes for k in kept)
    numbers = sum(x.size for k in kept for x in k.arrays)
    assert numbers <= state["bytes"] <= 2 * numbers


def test_states_that_lose_too_much_are_kept_as_they_are(monkeypatch):
    monkeypatch.setattr(state_bits, "LOSS", -1.0)
    nectar = toys.fit(
        toys.toy("qwen3_next"), toys.tokenizer(), TEXT, config=FitConfig(**FAST, budget=0.5, context_tokens=200)
    )
    assert nectar.report["state"]["bits"] == 32
    context = prefill.read_text(toys.toy("qwen3_next"), nectar.prefix, nectar.geometry)
    for layer, kept in context.windows.items():
        for found, expected in zip(nectar.windows[layer].arrays, kept.arrays, strict=True):
            assert mx.array_equal(found, expected)


@pytest.mark.parametrize("family", ["falcon_h1", "gemma4", "deepseek_v3", "mistral4"])
def test_sensitivity_through_the_whole_model(family):
    """Models whose layers are not called one by one: the same derivative as by small differences."""
    model = toys.toy(family)
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, toys.random_tokens(30), geometry)
    conversation = Conversation(toys.random_tokens(4, seed=1), toys.random_tokens(5, seed=2))
    found = dict(fisher._gradients_at_once(model, context, [conversation], geometry=geometry))
    direction = mx.random.normal((1, geometry.n_heads, 8, geometry.head_dim), key=mx.random.key(3))

    def likelihood(step):
        caches = context.make_cache(fisher.ProbedCache)
        for index, (_, cache) in enumerate(fisher.attention_caches(caches)):
            cache.probe = step * direction * (index == 0)
        tokens = conversation.prompt + conversation.answer
        logits = model(mx.array([tokens[:-1]]), cache=caches)[0, len(conversation.prompt) - 1 :]
        chosen = fisher.log_probabilities(logits)[mx.arange(5), mx.array(conversation.answer)]
        return float(chosen.sum())

    by_differences = (likelihood(3e-3) - likelihood(-3e-3)) / 6e-3
    np.testing.assert_allclose(float((found[0] * direction).sum()), by_differences, rtol=0.05, atol=2e-3)


def test_a_sensitivity_layer_by_layer_is_the_same_as_at_once():
    model = toys.toy("qwen3_next")
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, toys.random_tokens(30), geometry)
    conversation = Conversation(toys.random_tokens(4, seed=1), toys.random_tokens(5, seed=2))
    by_layers = dict(fisher._gradients(fisher.LayerRunner(model, geometry), context, [conversation], geometry=geometry))
    at_once = dict(fisher._gradients_at_once(model, context, [conversation], geometry=geometry))
    for layer, gradient in at_once.items():
        np.testing.assert_allclose(np.array(by_layers[layer]), np.array(gradient), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("chunked", [False, True], ids=["layerwise", "chunks"])
def test_a_hybrid_is_fitted_layer_by_layer_and_in_chunks(chunked):
    """In chunks, the states kept are those behind the last one: the question follows it."""
    model, tokenizer = toys.toy("qwen3_next"), toys.tokenizer()
    options = {"layerwise": True, "context_tokens": 200} if not chunked else {}
    if chunked:
        model.args.max_position_embeddings = 1024 + 300
    nectar = toys.fit(model, tokenizer, TEXT, config=FitConfig(**SHORT_ANSWERS, budget=0.5, **options))
    assert bool(nectar.chunks) == chunked
    assert nectar.report["kl"] < nectar.report["kl_no_context"]
    last = nectar.prefix if not chunked else nectar._ids.text(len(nectar.chunks) - 1)
    context = prefill.read_text(model, last, nectar.geometry)
    for layer, kept in context.windows.items():
        for found, expected in zip(nectar.windows[layer].arrays, kept.arrays, strict=True):
            np.testing.assert_allclose(np.array(found), np.array(expected), atol=2e-3, rtol=2e-3)


def test_the_check_is_of_the_file_where_the_model_does_not_agree_with_itself(toy_fit):
    """mlx-lm's plamo3 sees a key more where tokens are read together. A file that keeps all keys is exact all the same,
    and the default budget is found."""
    assert toy_fit("plamo3", budget=1.0).report["kl"] < 1e-3
    assert toy_fit("plamo3", budget="auto").report["budget"] < 0.3
