"""Every supported architecture behind a context equals the stock model that reads it; others are refused by name."""

import inspect
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from nectar_mlx import Nectar, NectarError
from nectar_mlx.fitting.samples import self_study
from nectar_mlx.mlxlm import attention_patch, class_source, hook
from tests import toys
from tests.fitting.toy_fit import FEW_TOGETHER

PREFIX = toys.random_tokens(70)
TURN = toys.random_tokens(37, seed=1)


@pytest.mark.parametrize("architecture", sorted(toys.ARCHITECTURES))
@pytest.mark.parametrize("chunks", [(37,), (1, 5, 30, 1), (16, 21)], ids=str)
def test_exact_context_equals_the_stock_model(architecture, chunks):
    model = toys.toy(architecture)
    stock = model(mx.array([PREFIX + TURN]), cache=make_prompt_cache(model))[0, len(PREFIX) :]
    nectar = toys.exact(model, PREFIX)
    cache = nectar.make_cache()
    start, logits = 0, []
    for chunk in chunks:
        logits.append(model(mx.array([TURN[start : start + chunk]]), cache=cache)[0])
        start += chunk
    np.testing.assert_allclose(np.array(mx.concatenate(logits)), np.array(stock), atol=2e-4, rtol=2e-4)
    without = model(mx.array([TURN]), cache=make_prompt_cache(model))[0]
    assert float(mx.abs(without - stock).max()) > 0.05, "the context must matter, or this test proves nothing"


@pytest.mark.parametrize("architecture", sorted(toys.ARCHITECTURES))
def test_file_round_trip(architecture, tmp_path):
    model = toys.toy(architecture)
    nectar = toys.picked(model, PREFIX, 12)
    nectar.save(tmp_path / "toy.nectar")
    loaded = Nectar.load(tmp_path / "toy.nectar", model)
    logits = [model(mx.array([TURN]), cache=n.make_cache()) for n in (nectar, loaded)]
    assert mx.array_equal(*logits)
    assert loaded.nbytes == nectar.nbytes


def test_context_shorter_than_the_window():
    model = toys.toy("gemma3_text")
    short = PREFIX[:9]
    stock = model(mx.array([short + TURN]), cache=make_prompt_cache(model))[0, len(short) :]
    ours = model(mx.array([TURN]), cache=toys.exact(model, short).make_cache())[0]
    np.testing.assert_allclose(np.array(ours), np.array(stock), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("length", [512, 513, 1025])
def test_reading_in_chunks_keeps_the_window_in_order(length):
    model = toys.toy("gemma3_text")
    prefix = toys.random_tokens(length, seed=2)
    stock = model(mx.array([prefix + TURN]), cache=make_prompt_cache(model))[0, len(prefix) :]
    ours = model(mx.array([TURN]), cache=toys.exact(model, prefix).make_cache())[0]
    np.testing.assert_allclose(np.array(ours), np.array(stock), atol=3e-4, rtol=3e-4)


def test_a_missing_window_is_damage(tmp_path):
    model = toys.toy("gemma3_text")
    nectar = toys.picked(model, PREFIX, 12)
    del nectar.tensors["windows.0.keys"]
    nectar.save(tmp_path / "toy.nectar")
    with pytest.raises(NectarError, match=r"damaged.*windows\.0\.keys"):
        Nectar.load(tmp_path / "toy.nectar", model)


def test_geometry():
    geometry = attention_patch.route(toys.toy("gemma3_text"))
    assert geometry.windows == (24, 24, 0)
    assert geometry.fitted == (2,)
    assert geometry.cache_bytes(100) == 2 * 2 * 2 * 16 * (24 + 24 + 100)
    assert geometry.scale == pytest.approx(12**-0.5)
    assert attention_patch.route(toys.toy("granite")).scale == pytest.approx(0.2)


def test_a_model_of_an_unknown_type_is_taken_if_the_proof_succeeds():
    model = toys.toy("llama")
    model.model_type = "a_model_of_tomorrow"
    assert attention_patch.route(model).model_type == "a_model_of_tomorrow"


def test_a_model_whose_attention_cannot_be_routed_is_refused(monkeypatch):
    """mlx-lm may change under us: a layer that bypasses the shared attention must not go unnoticed."""
    from mlx_lm.models import qwen2

    model = toys.toy("qwen2")
    monkeypatch.setattr(
        qwen2, "scaled_dot_product_attention", lambda q, k, v, cache, scale, mask: mx.zeros_like(q), raising=True
    )
    with pytest.raises(NectarError, match="cannot be routed"):
        attention_patch.route(model)


def test_stock_caches_are_untouched_by_routing():
    model = toys.toy("qwen3")
    tokens = mx.array([TURN])
    before = model(tokens, cache=make_prompt_cache(model))
    attention_patch.route(model)
    after = model(tokens, cache=make_prompt_cache(model))
    np.testing.assert_allclose(np.array(after), np.array(before), atol=1e-5)  # silu is rounded otherwise


def test_classes_are_parsed_once_and_only_where_their_file_asks_for_it(monkeypatch):
    """It takes longer than a small model does."""
    parsed, getsource = [], inspect.getsource

    def noted(x):
        if isinstance(x, type):
            parsed.append(x)
        return getsource(x)

    monkeypatch.setattr(inspect, "getsource", noted)
    class_source.mentions.cache_clear()
    attention_patch.route(toys.toy("llama"))
    assert parsed == []
    for _ in range(2):
        attention_patch.route(toys.toy("deepseek_v3"))
    assert parsed and len(parsed) == len(set(parsed))


def test_stock_caches_while_attached():
    model = toys.toy("gemma3_text")
    nectar = toys.exact(model, PREFIX)
    with nectar.attach(model):
        assert [type(c).__name__ for c in attention_patch.make_prompt_cache_of(model)] == [
            "RotatingKVCache",
            "RotatingKVCache",
            "KVCache",
        ]
        assert make_prompt_cache(model)[2].offset == len(PREFIX)
    assert make_prompt_cache(model)[2].offset == 0


def test_sinks_against_plain_softmax():
    from nectar_mlx.core.attention import causal
    from nectar_mlx.mlxlm.cache import with_sinks

    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, h, 5, 8)) for h in (4, 2, 2))
    sinks = rng.normal(size=4)
    part = causal(*(mx.array(x.astype(np.float32)) for x in (q, k, v)), scale=0.5)
    found = with_sinks(part, mx.array(sinks.astype(np.float32))).output
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = np.where(np.tri(5) > 0, 0.5 * q @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores)
    expected = weights @ v / (weights.sum(-1) + np.exp(sinks)[None, :, None])[..., None]
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


def test_compute_type_of_a_quantized_model():
    model = toys.toy("llama")
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    assert attention_patch.compute_type(model) == mx.bfloat16


@pytest.mark.fit
@pytest.mark.parametrize("architecture", sorted(toys.ARCHITECTURES))
def test_fitting(monkeypatch, architecture):
    """A fit runs on every architecture, and knows more of the text than a model that never saw it."""
    monkeypatch.setattr(self_study, "FEWEST_TOGETHER", FEW_TOGETHER)
    model, tokenizer = toys.toy(architecture), toys.tokenizer()
    text = "the quick brown fox jumps over the lazy dog; who is he? the answer is here. " * 6
    few = {"queries": 150, "conversations": 8, "checks": 2, "answer_tokens": 8, "steps": 8}
    nectar = Nectar.fit(model, tokenizer, text, budget=0.6, **few)
    assert nectar.layout.n_layers == len(nectar.geometry.fitted)
    prompt = mx.array([nectar.prompt(tokenizer, "who is the fox?")])
    truth = toys.exact(model, nectar.prefix)
    logits = [
        model(prompt, cache=cache) for cache in (truth.make_cache(), nectar.make_cache(), make_prompt_cache(model))
    ]
    fitted, without = (float(mx.abs(x - logits[0]).mean()) for x in logits[1:])
    assert fitted < 0.5 * without


def test_routing_costs_a_model_without_a_context_next_to_nothing(monkeypatch):
    """At most 2% of a decode step, even of a toy's: the wrapper's own time against the step's, in one run."""
    model = toys.toy("llama")
    attention_patch.route(model)
    cache = make_prompt_cache(model)
    model(mx.array([PREFIX]), cache=cache)

    def seconds(call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def step():
        mx.eval(model(mx.array([[5]]), cache=cache))

    x = mx.zeros((1, 4, 1, 16))

    def stock(queries, keys, values, cache, scale, mask=None, sinks=None):
        return queries

    monkeypatch.setattr(hook, "stock_attention", stock)
    wrapped = min(
        seconds(lambda: hook.attention(x, x, x, cache=cache[0], scale=1.0, mask=None), 2000) for _ in range(5)
    )
    direct = min(seconds(lambda: stock(x, x, x, cache=cache[0], scale=1.0, mask=None), 2000) for _ in range(5))
    monkeypatch.undo()
    whole = min(seconds(step, 20) for _ in range(5))
    assert toys.LAYERS * (wrapped - direct) < 0.02 * whole
