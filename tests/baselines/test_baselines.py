"""Every baseline on a toy: at most the bytes it was given, deterministic, exact where it keeps everything."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from nectar_mlx.baselines import (
    BASELINES,
    NO_CONTEXT,
    EvalConfig,
    EvalContext,
    cartridge,
    choose,
    fixed_pattern,
    kvzip,
    snap,
)
from nectar_mlx.core.device import device, using
from nectar_mlx.errors import NectarError
from nectar_mlx.fitting import fidelity, prefill
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore
from nectar_mlx.mlxlm import attention_patch, hook, prompts
from tests import oracle, toys

TEXT = "The brig left Ostend on 4 May. Her master was Anna Velde, and she carried 299 casks of amber. " * 4
TOKENIZER = toys.tokenizer()
SIZED = [b for b in BASELINES.values() if b.sized]


def make_context(architecture="llama", **arguments):
    model = toys.toy(architecture, **arguments)
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, prompts.prefix(TOKENIZER, TEXT), geometry)
    return EvalContext(
        model=model,
        tokenizer=TOKENIZER,
        geometry=geometry,
        context=context,
        config=EvalConfig(samples=400, answer_tokens=6, seed=1),
    )


@pytest.fixture(scope="module")
def ctx():
    return make_context()


@pytest.fixture(scope="module")
def windowed():
    return make_context("gemma3_text")


def divergence(ctx, view):
    conversations = [Conversation(ctx.ask("Who was her master?"), toys.random_tokens(9, seed=3))]
    conversations += [Conversation(ctx.ask("How many casks?"), toys.random_tokens(4, seed=4))]
    divergences = fidelity.compare(
        ctx.model, ctx.context.make_cache, {"it": view.make_cache}, conversations, prompts={"it": view.prompt}
    )
    return float(divergences["it"].kl.mean())


@pytest.fixture(scope="module")
def floor(ctx):
    return divergence(ctx, BASELINES[NO_CONTEXT].build(ctx, 0))


@pytest.mark.parametrize("name", [b.name for b in SIZED if b.name != "Cartridge"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_sized_method_stays_within_its_bytes(ctx, name, share):
    nbytes = int(share * ctx.geometry.cache_bytes(ctx.length))
    view = BASELINES[name].build(ctx, nbytes)
    assert 0.6 * nbytes < view.nbytes <= nbytes
    assert np.isfinite(divergence(ctx, view))


@pytest.mark.parametrize("name", [b.name for b in SIZED if b.name != "Cartridge"])
def test_a_sized_method_refuses_what_cannot_be_kept(ctx, name):
    with pytest.raises(NectarError):
        BASELINES[name].build(ctx, 40)


@pytest.mark.parametrize(
    "name", ["sinks + window", "fixed pattern", "keep most attended", "SnapKV", "expected attention", "KVzip"]
)
def test_a_method_that_keeps_every_key_is_exact_to_rounding(ctx, name, floor):
    view = BASELINES[name].build(ctx, 10 * ctx.geometry.cache_bytes(ctx.length))
    assert view.banks[0].sizes[0] == (ctx.length,)
    assert divergence(ctx, view) < 0.01 * floor


@pytest.mark.parametrize("name", ["keep most attended", "SnapKV", "Attention Matching"])
def test_sliding_windows_are_kept_and_counted(windowed, name):
    nbytes = int(0.5 * windowed.geometry.cache_bytes(windowed.length))
    view = BASELINES[name].build(windowed, nbytes)
    assert windowed.window_bytes < view.nbytes <= nbytes
    assert view.windows.keys() == windowed.context.windows.keys()


def test_more_bytes_bring_attention_matching_closer(ctx, floor):
    full = ctx.geometry.cache_bytes(ctx.length)
    few, many = (divergence(ctx, BASELINES["Attention Matching"].build(ctx, int(s * full))) for s in (0.05, 0.3))
    assert many < few < floor


def test_no_context_is_an_ordinary_chat_about_the_question(ctx):
    view = BASELINES[NO_CONTEXT].build(ctx, 0)
    prompt = ctx.ask("Who?")
    stock = ctx.model(mx.array([ctx.head + prompt]))[0, -1]
    ours = ctx.model(mx.array([prompt]), cache=view.make_cache())[0, -1]
    np.testing.assert_allclose(np.array(ours), np.array(stock), atol=1e-4)
    assert TOKENIZER.decode(ctx.head) == "<|im_start|>user\n"
    assert ctx.document == TEXT.strip()


def test_an_empty_cache_has_only_the_live_tokens(ctx):
    view, prompt = BASELINES["nothing"].build(ctx, 0), ctx.ask("Who?")
    ours = ctx.model(mx.array([prompt]), cache=view.make_cache())[0, -1]
    stock = ctx.model(mx.array([prompt]))[0, -1]  # RoPE is relative: alone, positions do not matter
    np.testing.assert_allclose(np.array(ours), np.array(stock), atol=2e-3)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.53125), (4, 0.28125)])
def test_the_quantized_cache_costs_what_mlx_lm_stores(bits, share):
    ctx = make_context(hidden_size=256)  # heads of 64
    view = BASELINES[f"{bits}-bit KV cache"].build(ctx, 0)
    full = ctx.geometry.cache_bytes(ctx.length)
    assert view.nbytes == int(share * full)
    from mlx_lm.models.cache import QuantizedKVCache

    stock, (keys, values) = QuantizedKVCache(64, bits), ctx.layer(0)
    stock.update_and_fetch(keys[None].astype(mx.bfloat16), values[None].astype(mx.bfloat16))
    n = stock.offset
    stored = sum(x[..., :n, :].nbytes for part in (stock.keys, stock.values) for x in part)
    assert stored * ctx.n_layers == view.nbytes
    form = {"group_size": 64, "bits": bits}
    expected = mx.dequantize(*mx.quantize(keys, **form), **form)
    assert mx.array_equal(view.banks[0].parameters["keys"], expected)


def test_heads_that_mlx_lm_cannot_quantize_are_refused(ctx):
    with pytest.raises(NectarError, match="16"):
        BASELINES["4-bit KV cache"].build(ctx, 0)


def test_most_attended_keeps_the_keys_that_matter(ctx):
    nbytes = int(0.1 * ctx.geometry.cache_bytes(ctx.length))
    view = BASELINES["keep most attended"].build(ctx, nbytes)
    (count,) = view.banks[1].sizes[0]
    best = np.sort(np.argsort(-np.array(ctx.importance[1][0]))[:count])
    keys = np.array(ctx.layer(1)[0][0])[best]
    error = np.abs(np.array(view.banks[1].parameters["keys"][0]) - keys).max()
    assert error <= np.abs(keys).max() / 127  # int8 with a scale a group


class WatchedCache(KVCache):
    """Keeps the causal attention weights [H, T, T] of a call."""

    def attend(self, queries, keys, values, *, scale, mask):
        repeated = oracle.repeat_heads(np.array(keys, np.float64), queries.shape[1])
        scores = scale * np.array(queries, np.float64)[0] @ repeated[0].swapaxes(1, 2)
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        self.weights = weights / weights.sum(-1, keepdims=True)
        return hook.stock_attention(queries, keys, values, cache=None, scale=scale, mask=mask)


def test_kvzip_scores_are_the_largest_attention_of_a_repetition(ctx, monkeypatch):
    monkeypatch.setattr(kvzip, "_CHUNK", 60)
    text, n, expected = ctx.context.prefix[len(ctx.head) :], ctx.length, 0.0
    requests = [ctx.ask("Repeat the previous context exactly.") + text[:60]]
    for start in range(60, len(text), 60):
        cue = TOKENIZER.decode(text[start - 8 : start])
        asked = ctx.ask(f"Repeat the part of the previous context exactly, starting with {cue}")
        requests.append(asked + text[start : start + 60])
    assert len(requests) > 1
    for tokens in requests:
        caches = [WatchedCache() for _ in range(ctx.n_layers)]
        mx.eval(ctx.model(mx.array([ctx.context.prefix + tokens]), cache=caches))
        seen = np.stack([cache.weights[:, n:, :n].max(1) for cache in caches])
        expected = np.maximum(expected, seen.reshape(ctx.n_heads, -1, n).max(1))
    np.testing.assert_allclose(kvzip.repetition_scores(ctx), expected, atol=1e-4)


def test_kvzip_keeps_the_template_and_more_keys_where_they_matter(ctx):
    view = BASELINES["KVzip"].build(ctx, int(0.3 * ctx.geometry.cache_bytes(ctx.length)))
    sizes = [count for bank in view.banks for (count,) in bank.sizes]
    assert min(sizes) >= len(ctx.head) and len(set(sizes)) > 1
    first = np.array(view.banks[0].unstack()[0]["keys"][: len(ctx.head)])
    keys = np.array(ctx.layer(0)[0][0, : len(ctx.head)])
    assert np.abs(first - keys).max() <= np.abs(keys).max() / 127


def test_snap_pools_over_neighbours():
    weights = mx.zeros((1, 30)).at[0, 10].add(1.0)
    kept = np.flatnonzero(np.array(snap.pooled(weights))[0])
    assert kept.tolist() == list(range(7, 14))


@pytest.mark.parametrize("length, count", [(50, 3), (50, 50), (51, 20), (5000, 400), (300, 299), (7, 5)])
def test_the_fixed_pattern_keeps_different_places_evenly(length, count):
    places, _ = fixed_pattern.support(length, count)
    assert places == sorted(set(places)) and len(places) == min(count, length)
    assert places[0] == 0 and places[-1] in (length - 1, min(count, 4) - 1)
    gaps = np.diff(places)
    assert gaps.max(initial=1) <= max(length // 2, 2 * 8 * length // count)


def test_sparse_prefill_is_all_keys_of_the_sparse_way_of_reading(ctx):
    view = BASELINES["sparse prefill"].build(ctx, 0)
    read = prefill.read_text(ctx.model, ctx.context.prefix, ctx.geometry, prefill="fixed")
    assert view.nbytes == ctx.geometry.cache_bytes(ctx.length)
    for ours, expected in zip(view.banks, read.banks, strict=True):
        assert mx.array_equal(ours.parameters["keys"], expected.parameters["keys"])
    assert not mx.allclose(view.banks[-1].parameters["keys"], ctx.layer(ctx.n_layers - 1)[0], atol=1e-3)


def test_passages_are_put_in_front_of_the_question(ctx):
    view = BASELINES["BM25 passages"].build(ctx, int(0.5 * ctx.geometry.cache_bytes(ctx.length)))
    conversation = Conversation(ctx.ask("Who was Anna Velde?"))
    assert view.prompt is not None
    shown = TOKENIZER.decode(view.prompt(conversation))
    assert shown.startswith(prompts.INTRODUCTION) and "Velde" in shown.split("Who was")[0]
    assert view.prompt(conversation)[-len(conversation.prompt) :] == conversation.prompt


def test_the_last_question_of_a_talk_chooses_the_passages(ctx):
    view = BASELINES["BM25 passages"].build(ctx, int(0.3 * ctx.geometry.cache_bytes(ctx.length)))
    last, messages = "Who was Anna Velde?", [{"role": "user", "content": "On which day in May did she leave Ostend?"}]
    messages += [{"role": "assistant", "content": "On 4 May the brig left."}, {"role": "user", "content": last}]
    talk = prompts.prompt(TOKENIZER, messages)
    assert view.prompt is not None
    chosen, alone, by_all = map(
        view.prompt, (Conversation(talk, question=last), Conversation(ctx.ask(last)), Conversation(talk))
    )
    assert chosen[: -len(talk)] == alone[: -len(ctx.ask(last))] != by_all[: -len(talk)]
    assert chosen[-len(talk) :] == talk


@pytest.mark.parametrize("name", ["Attention Matching", "Attention Matching + budgets"])
def test_nodes_in_int8_are_fewer_in_as_many_bytes(ctx, name):
    nbytes = int(0.2 * ctx.geometry.cache_bytes(ctx.length))
    best, plain = (BASELINES[n].build(ctx, nbytes) for n in (name, f"{name} in int8"))
    nodes, fewer = (sum(count for bank in view.banks for (count,) in bank.sizes) for view in (best, plain))
    # 16 numbers of 5 bits with a scale of 16, twice, and a bias: 26 bytes; of 8 bits: 38.
    assert fewer / nodes == pytest.approx(26 / 38, abs=0.03)


def test_samples_are_the_same_where_they_stay_on_the_device(ctx):
    samples, conversations = ctx.samples, ctx.conversations
    with using(replace(device(), linux_cpu=False)):
        on_device = ctx.replay(conversations)
    assert isinstance(on_device, DeviceSampleStore) and on_device.count == samples.count
    every_seventh = np.arange(0, samples.count, 7)
    for ours, theirs in zip(on_device.heads([1, 5], every_seventh), samples.heads([1, 5], every_seventh), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-3, atol=1e-3)  # of 16-bit floats


def test_training_a_cartridge_lowers_the_loss(ctx):
    nbytes = int(0.1 * ctx.geometry.cache_bytes(ctx.length))
    start, trained = (cartridge.cartridge(ctx, nbytes, steps=steps) for steps in (0, 12))
    assert trained.nbytes <= nbytes
    answered = ctx.answered[:8]
    views = {"start": start.make_cache, "trained": trained.make_cache}
    divergences = fidelity.compare(ctx.model, ctx.context.make_cache, views, answered)
    assert divergences["trained"].kl.mean() < 0.8 * divergences["start"].kl.mean()


def test_names_are_chosen_as_they_are_typed():
    assert [b.name for b in choose("Attention-Matching-Budgets, no context")] == [
        "Attention Matching + budgets",
        "no context",
    ]
    assert choose("none") == []
    extra = {"Cartridge", "sparse prefill", "Attention Matching in int8", "Attention Matching + budgets in int8"}
    assert set(BASELINES) - {b.name for b in choose("all")} == extra
    assert len(choose("all,cartridge,snapkv")) == len(choose("all")) + 1
    with pytest.raises(NectarError, match="there is no baseline 'magic'"):
        choose("magic")
