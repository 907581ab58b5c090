"""Fitting layer by layer against the ordinary way: the same attention, the same answers, far less memory."""

import json
from contextlib import contextmanager
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest
from nectar_mlx.fitting.fitter import Fitter, silent

from nectar_mlx import NectarError, fit, models, store
from nectar_mlx.core.device import device
from nectar_mlx.fitting import fitted_chunk, layers, layerwise, pipeline, prefill
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.fitted_chunk import FittedChunk
from nectar_mlx.fitting.layers import LayerRunner
from nectar_mlx.fitting.layerwise import LayerwiseFitter
from nectar_mlx.fitting.samples import capture, self_study
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch, prompts
from nectar_mlx.mlxlm.cache import NectarCache
from tests import toys
from tests.fitting.test_fit import FAST, TEXT

EVERY = sorted(toys.ARCHITECTURES)
SMALL = FAST | {"budget": 0.5, "context_tokens": 300}


@pytest.fixture(scope="module")
def tokenizer():
    return toys.tokenizer()


def fitter(model, tokenizer, **options):
    config = FitConfig(**SMALL | options)
    geometry = attention_patch.route(model)
    prefix = prompts.prefix(tokenizer, TEXT, max_tokens=config.context_tokens)
    return LayerwiseFitter(model, tokenizer, prefix, geometry, config, progress=silent, checkpoint=Checkpoint(None))


@pytest.mark.parametrize("architecture", EVERY)
def test_layers_one_by_one_are_the_model(architecture):
    model = toys.toy(architecture)
    by_layer = LayerRunner(model, attention_patch.route(model))
    tokens = mx.array([toys.random_tokens(40), toys.random_tokens(40, seed=1)])
    hidden = by_layer.embed(tokens)
    for layer in range(len(model.layers)):
        hidden = by_layer.layer(layer, hidden, None)
    np.testing.assert_allclose(by_layer.logits(hidden), model(tokens), atol=1e-5)


def test_a_model_that_does_more_than_call_its_layers_is_named(monkeypatch):
    model = toys.toy("llama")
    geometry = attention_patch.route(model)
    plain = type(model.model).__call__
    monkeypatch.setattr(type(model.model), "__call__", lambda self, *a, **k: 2 * plain(self, *a, **k) + 1)
    LayerRunner(model, geometry)  # what follows the layers is the model's own
    layer = type(model.layers[0])
    inside, calls = layer.__call__, []

    def counting(self, x, *others, **named):
        calls.append(1)
        return inside(self, x, *others, **named) + len(calls)

    monkeypatch.setattr(layer, "__call__", counting)
    with pytest.raises(NectarError, match="llama models cannot be fitted layer by layer"):
        LayerRunner(model, geometry)


@pytest.mark.parametrize("architecture", EVERY)
def test_what_a_layer_hears_is_what_the_full_cache_would_see(tokenizer, architecture):
    """Teacher-forced layer by layer: the captured rows equal those of the whole model behind the whole text."""
    model = toys.toy(architecture)
    ours = fitter(model, tokenizer, queries=4000)
    ours.conversations = [
        Conversation(
            toys.random_tokens(6 + i % 3, seed=i),
            toys.random_tokens(5 + i, seed=90 + i),
            split="held_out" if i == 4 else "train",
        )
        for i in range(device().passage_conversations + 3)
    ]
    context = prefill.read_text(model, ours.prefix, ours.geometry)
    K, G = ours.geometry.n_kv_heads, ours.geometry.n_heads // ours.geometry.n_kv_heads
    expected = heard(model, context, ours.conversations)
    seen = 0
    for layer, one in enumerate(ours.layers()):
        bank = context.banks[layer]
        np.testing.assert_allclose(absolute(one.context.banks[0]), absolute(bank), atol=2e-4)
        np.testing.assert_allclose(one.context.banks[0].parameters["values"], bank.parameters["values"], atol=2e-4)
        for study, split in ((one.study, "train"), (one.held_out, "held_out")):
            tokens = sum(len(c.prompt) + len(c.answer) - 1 for c in ours.conversations if c.split == split)
            assert study.rows == tokens * G
            rows = study.heads(range(K))
            found, wanted = (np.array(x, dtype=np.float32)[0] for x in (rows.queries, expected[layer][split]))
            apart = np.abs(found[:, None] - wanted[None]).max(-1)  # the rows come in another order
            assert found.shape == wanted.shape and apart.min(0).max() < 2e-2 and apart.min(1).max() < 2e-2
        seen += 1
    assert seen == len(context.banks) and ours.windows.keys() == context.windows.keys()
    for layer, window in context.windows.items():
        np.testing.assert_allclose(ours.windows[layer].keys, window.keys, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
def test_both_ways_hear_the_same_of_a_chunk(tokenizer, architecture):
    """Heads that do not stand for the opening: its share of the attention is counted to the live tokens."""
    model = toys.toy(architecture)
    geometry, opening = attention_patch.route(model), 20
    told = {"progress": silent, "checkpoint": Checkpoint(None), "skip": opening}
    prefix, config = toys.random_tokens(90), FitConfig(**SMALL | {"queries": 4000})
    context, K = prefill.read_text(model, prefix, geometry), geometry.n_kv_heads
    by_layer = LayerwiseFitter(model, tokenizer, prefix, geometry, config, **told)
    at_once = Fitter(model, tokenizer, context, geometry, config, **told)
    at_once.conversations = by_layer.conversations = [
        Conversation(
            toys.random_tokens(6, seed=i), toys.random_tokens(5, seed=90 + i), split="held_out" if i == 4 else "train"
        )
        for i in range(5)
    ]
    at_once.hear()
    for layer, one in enumerate(by_layer.layers()):
        assert one.length == at_once.length == 70
        np.testing.assert_allclose(absolute(one.banks[0]), absolute(context.banks[layer])[:, opening:], atol=2e-4)
        mine, theirs = at_once.study.heads(range(layer * K, layer * K + K)), one.study.heads(range(K))
        for name in ("queries", "output", "live_output", "log_normalizer", "live_log_normalizer"):
            np.testing.assert_allclose(*(np.array(getattr(x, name), np.float32) for x in (mine, theirs)), atol=2e-2)
        keys = context.banks[layer].parameters["keys"]
        scores = mine.queries.astype(mx.float32) @ keys.swapaxes(1, 2) * geometry.scale
        np.testing.assert_allclose(mine.log_normalizer, mx.logsumexp(scores[..., opening:], axis=-1), atol=2e-2)
        assert (mine.live_log_normalizer >= mx.logsumexp(scores[..., :opening], axis=-1) - 2e-2).all()


def absolute(bank):
    return bank.parameters["keys"] + bank.offset[:, None]


def heard(model, context, conversations):
    """Per layer and split, the queries [K, rows, D] of conversations, each conversation on its own."""
    found = [{"train": [], "held_out": []} for _ in context.banks]
    for conversation in conversations:
        caches = [
            capture.CaptureCache(c.bank, c.context) if isinstance(c, NectarCache) else c for c in context.make_cache()
        ]
        fed = (conversation.prompt + conversation.answer)[:-1]
        mx.eval(model(mx.array([fed]), cache=caches))
        studied = [c for c in caches if isinstance(c, capture.CaptureCache)]
        for layer, cache in enumerate(studied):
            found[layer][conversation.split].append(cache.take(np.ones((1, len(fed)), bool)).queries)
    return [{split: mx.concatenate(x, axis=1) for split, x in layer.items()} for layer in found]


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gemma3", "gpt_oss", "qwen3_moe"))]
)
def test_it_fits_about_as_well_as_the_ordinary_way(tokenizer, architecture):
    model = toys.toy(architecture)
    options = SMALL | {"steps": 100, "context_tokens": 700}
    ordinary, ours = (
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**options, layerwise=choice)) for choice in (False, True)
    )
    assert ours.report["layerwise"] and "layerwise" not in ordinary.report
    assert ours.nbytes <= 1.05 * ordinary.nbytes  # the same budget, another split of it to be rounded
    tokens = ours.prompt(tokenizer, "Who runs?")
    full = model(mx.array([ours.prefix + tokens]))[:, len(ours.prefix) :]
    caches = [None, ordinary.make_cache(), ours.make_cache()]
    none, one, two = (float(mx.abs(model(mx.array([tokens]), cache=c) - full).mean()) for c in caches)
    assert two < max(2 * one, 0.5 * none)
    assert np.isfinite([ours.report["kl"], *ours.report["error"]]).all()


def test_what_is_reported_is_the_divergence_from_the_full_cache(tokenizer):
    from nectar_mlx.fitting import fidelity

    model = toys.toy("llama")
    ours = fitter(model, tokenizer)
    ours.converse()
    for _ in ours.layers():
        pass
    full = prefill.read_text(model, ours.prefix, ours.geometry)
    told = FittedChunk(layers=[], errors=[], rows=0, windows={}, answers=ours.answers)
    for answer in told.answers:
        by_model = fitted_chunk.heard(LayerRunner(model, ours.geometry), full, answer.conversation)
        np.testing.assert_allclose(answer.hidden, by_model.hidden, atol=1e-3)
    head = prefill.read_text(model, ours.prefix[:20], ours.geometry)
    held_out = [answer.conversation for answer in told.answers]
    assert held_out == [c for c in ours.conversations if c.split == "check" and c.answer]
    other = fidelity.compare(model, full.make_cache, {"head": head.make_cache}, held_out)["head"]
    figures = told.fidelity(LayerRunner(model, ours.geometry), full.make_cache, head.make_cache)
    assert (figures["kl"], figures["agree"], figures["gap_closed"]) == (0.0, 1.0, 1.0)
    assert figures["kl_no_context"] == pytest.approx(other.kl.mean(), abs=2e-5)


def test_passages_cover_the_text_evenly(tokenizer):
    ours = fitter(toys.toy("llama"), tokenizer, context_tokens=None)
    ours.prefix = ours.prefix[:30] + list(range(100_000))
    starts = np.sort([ours._passage(number)[60] for number in range(50)])
    assert np.diff(starts).max() < 2.5 * 100_000 / 50
    assert all(len(ours._passage(n)) <= layerwise._PASSAGE + 60 for n in range(50))


@pytest.mark.parametrize("tokens", [20, 900, 2000, 3000, 100_000])
def test_passages_and_their_conversations_take_no_more_than_a_layer_does(tokenizer, tokens):
    ours = fitter(toys.toy("llama"), tokenizer)
    ours.prefix = toys.random_tokens(tokens)
    g, config = ours.geometry, ours.config
    one = 2 * 4 * g.n_kv_heads * g.head_dim  # a token's keys and values in a layer
    hidden = 4 * ours.model.args.hidden_size
    rows = ours.queries * g.n_kv_heads * (3 * 2 * g.head_dim + 2 * 4)
    bound = max(tokens * (1.5 * one + 3 * hidden) + rows, device().layerwise_tokens * one * g.n_layers)
    together = ours._seen + ours._together * (layerwise._PROMPT + config.answer_tokens)
    assert together * one * g.n_layers <= bound
    if tokens > 50_000:
        assert (ours._seen, ours._together) == (layerwise._PASSAGE, device().passage_conversations)
    assert ours._together >= 4 and ours._seen >= 384


@pytest.mark.slow
def test_no_phase_takes_more_memory_than_fitting_a_layer():
    """The demo model and 6,000 tokens: 1.5 of a layer's keys and values, 3 of the hidden states, a layer's rows."""
    model, tokenizer = models.load(models.DEMO)
    geometry = attention_patch.route(model)
    prefix = prompts.prefix(tokenizer, " ".join(topics.values()), max_tokens=6000)
    mx.clear_cache()
    before, peaks = mx.get_active_memory(), dict[str, float]()

    @contextmanager
    def measured(phase, total):
        mx.reset_peak_memory()
        yield lambda done: None
        peaks[phase] = (mx.get_peak_memory() - before) / 1e6

    config = FitConfig(steps=2, trial_steps=2, answer_tokens=40, queries=20_000)
    ours = LayerwiseFitter(model, tokenizer, prefix, geometry, config, progress=measured, checkpoint=Checkpoint(None))
    with measured("sampling", 0):
        ours.conversations = []
        ours.conversations = ours._ask_batch(self_study.training_conversations, 0.9, lambda rows: None)
    ours.plan(0.02 * geometry.cache_bytes(len(prefix)), 0.02)
    ours.conversations = [
        Conversation(prefix[i : i + 60], prefix[i + 3000 : i + 3096], split="held_out" if i % 500 == 0 else "train")
        for i in range(0, 2500, 50)
    ]
    for layer in ours.layers():
        peaks["a layer"] = (mx.get_peak_memory() - before) / 1e6
        with measured("training", 0):
            layer.prepare()
            heads = layer.regress([(120,)] * geometry.n_kv_heads)
            layer.errors(store.unpack(layer.layout, store.pack(layer.layout, heads)))
        break
    assert len(peaks) == 8 and max(peaks.values()) < 1.05 * ours._memory / 1e6, peaks


def test_only_one_layer_of_keys_and_values_exists(tokenizer):
    """What is held, above the model, while a layer is fitted."""
    ours = fitter(toys.toy("llama", num_hidden_layers=12), tokenizer, context_tokens=None)
    ours.prefix = toys.random_tokens(3000)
    ours.conversations = [
        Conversation(toys.random_tokens(6), toys.random_tokens(6), split="held_out" if i == 1 else "train")
        for i in range(4)
    ]
    geometry = ours.geometry
    layer = 2 * 4 * geometry.n_kv_heads * geometry.head_dim * len(ours.prefix)
    hidden = 4 * ours.model.args.hidden_size * (len(ours.prefix) + 4 * 12)
    mx.clear_cache()
    before = mx.get_active_memory()
    held = [mx.get_active_memory() - before for _ in ours.layers()]
    assert len(held) == 12
    assert max(held) < 1.05 * (layer + hidden)


def test_an_interrupted_fit_goes_on(tokenizer, tmp_path, monkeypatch):
    model = toys.toy("llama")
    config = FitConfig(**SMALL, layerwise=True)
    whole = toys.fit(model, tokenizer, TEXT, config=config)
    regress, calls = Fitter.regress, []

    def interrupted(self, sizes):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return regress(self, sizes)

    monkeypatch.setattr(Fitter, "regress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    monkeypatch.setattr(Fitter, "regress", regress)
    monkeypatch.setattr(LayerwiseFitter, "_ask_batch", lambda *a: pytest.fail("asked again"))
    trained, start = [], Fitter.start
    monkeypatch.setattr(Fitter, "start", lambda self, heads, *a: trained.extend(heads) or start(self, heads, *a))
    resumed = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    assert resumed.digest == whole.digest
    assert len(trained) == (model.args.num_hidden_layers - 2) * model.args.num_key_value_heads


def test_it_is_chosen_where_the_cache_would_not_fit(tokenizer, monkeypatch):
    model = toys.toy("llama")
    geometry = attention_patch.route(model)
    needs = pipeline._needs_layers
    bytes_of = 2 * geometry.cache_bytes(1000)  # float32
    assert needs(model, geometry, FitConfig(memory=bytes_of - 1), 1000)
    assert not needs(model, geometry, FitConfig(memory=bytes_of), 1000)
    assert not needs(model, geometry, FitConfig(memory=1, layerwise=False), 1000)
    assert not needs(model, geometry, FitConfig(memory=1, kind="exact"), 1000)
    with pytest.raises(NectarError, match="kind exact keeps"):
        needs(model, geometry, FitConfig(layerwise=True, kind="exact"), 1000)
    monkeypatch.setattr(pipeline, "free_memory", lambda: bytes_of)
    assert needs(model, geometry, FitConfig(), 1000) and not needs(model, geometry, FitConfig(), 400)


def test_the_command(tokenizer, tmp_path, capsys):
    toys.save_model(toys.toy("llama"), tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text(TEXT)
    arguments = ["--model", str(tmp_path / "model"), "--context", str(tmp_path / "book.txt"), "--budget", "0.5"]
    small = ["--queries", "300", "--steps", "5", "--context-tokens", "200", "--layerwise", "--json"]
    assert fit.main([*arguments, *small, "--output", str(tmp_path / "out.nectar")]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["layerwise"] and "s, layer by layer\n" in told.err
    assert fit.main([*arguments, "--prefill", "some", "--output", str(tmp_path / "no.nectar")]) == 2
    assert "dense or fixed" in capsys.readouterr().err


def test_walking_leaves_the_model_as_it_was():
    model = toys.toy("qwen2")
    before = type(model.layers[0]).__call__
    walked = LayerRunner(model, attention_patch.route(model))
    with pytest.raises(RuntimeError), walked.patched_layers(lambda *a, **k: None):
        raise RuntimeError
    assert type(model.layers[0]).__call__ is before and layers.LayerRunner is LayerRunner
