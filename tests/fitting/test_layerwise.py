"""Fitting layer by layer against the ordinary way: the same attention, the same answers, far less memory."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from nectar_mlx import NectarError, fit, models, store
from nectar_mlx.core.device import device
from nectar_mlx.fitting import fidelity, layerwise, pipeline, prefill, train
from nectar_mlx.fitting.checkpoint import Checkpoint, Plan
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.fitted_chunk import Answer, ChunkTarget, FittedChunk
from nectar_mlx.fitting.kinds.quadrature import QuadratureFit
from nectar_mlx.fitting.layers import LayerRunner
from nectar_mlx.fitting.layerwise import PASSAGE, PROMPT, LayerwiseFit
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.fitting.samples import capture, self_study
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch, prompts
from nectar_mlx.mlxlm.cache import NectarCache
from nectar_mlx.retrieval.recall import Calibration
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read, shallow

EVERY = sorted(toys.ARCHITECTURES)
SMALL = FAST | {"budget": 0.5, "context_tokens": 300}


def layerwise_fit(model, tokenizer, prefix=None, *, nbytes=0.0, share=0.5, preamble=0, **options):
    """The fit of a prefix layer by layer, TEXT's first tokens unless another one is given."""
    run = fit_run(model, tokenizer, **SMALL | options)
    if prefix is None:
        prefix = prompts.prefix(tokenizer, TEXT, max_tokens=run.config.context_tokens)
    return LayerwiseFit(run, prefix, ChunkTarget(nbytes, share, preamble=preamble))


def empty_chunk():
    return FittedChunk(plan=Plan([], 0.02), layers=[], errors=[], samples=0, ahead=0, windows={}, answers=[])


def random_conversations(count):
    """The fifth one is held out."""
    return [
        Conversation(
            toys.random_tokens(6 + i % 3, seed=i),
            toys.random_tokens(5 + i, seed=90 + i),
            split="held_out" if i == 4 else "train",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("architecture", [*EVERY, "plamo3"])  # whose masks reach a key further than its caches
def test_layers_one_by_one_are_the_model(architecture):
    """Also behind what a cache holds, and for a single token."""
    model = toys.toy(architecture)
    by_layer = LayerRunner(model, attention_patch.route(model))
    tokens = mx.array([toys.random_tokens(40), toys.random_tokens(40, seed=1)])
    own, caches = make_prompt_cache(model), make_prompt_cache(model)
    calls = [(tokens, [None] * len(caches), None), *((piece, caches, own) for piece in (tokens, tokens, tokens[:, :1]))]
    for piece, behind, own_behind in calls:
        hidden = by_layer.embed(piece)
        for layer, cache in enumerate(behind):
            hidden = by_layer.layer(layer, hidden, cache)
        np.testing.assert_allclose(by_layer.logits(hidden), model(piece, cache=own_behind), atol=1e-5)


def test_a_model_that_does_more_than_call_its_layers_is_named(monkeypatch):
    model = shallow()
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


@pytest.mark.parametrize("architecture", ["bailing_moe_linear", "gpt2"])
def test_a_model_that_tells_more_than_its_layers_where_a_text_ends_is_named(architecture):
    """It is as expected where nothing stands before the tokens."""
    model = toys.toy(architecture)
    with pytest.raises(NectarError, match=f"{architecture} models cannot be fitted layer by layer"):
        LayerRunner(model, attention_patch.route(model))


@pytest.mark.parametrize("architecture", EVERY)
def test_a_layers_samples_are_those_of_the_whole_model(tokenizer, architecture):
    """Conversations replayed layer by layer, and by the whole model behind the whole text."""
    model = toys.toy(architecture)
    ours, chunk = layerwise_fit(model, tokenizer, queries=4000), empty_chunk()
    conversations = random_conversations(device().passage_conversations + 3)
    context = read(ours.run, ours.prefix)
    K = ours.run.geometry.n_kv_heads
    expected = replayed_queries(model, context, conversations)
    layers = 0
    for layer, kind in enumerate(ours.layers(conversations, chunk)):
        (bank,), whole = kind.data.context.banks, context.banks[layer]
        np.testing.assert_allclose(absolute(bank), absolute(whole), atol=2e-4)
        np.testing.assert_allclose(bank.parameters["values"], whole.parameters["values"], atol=2e-4)
        for samples, split in ((kind.data.train, "train"), (kind.data.held_out, "held_out")):
            tokens = sum(len(c.prompt) + len(c.answer) - 1 for c in conversations if c.split == split)
            assert samples.count == tokens * ours.run.group
            queries, wanted = (
                np.array(x, dtype=np.float32)[0] for x in (samples.heads(range(K)).queries, expected[layer][split])
            )
            apart = np.abs(queries[:, None] - wanted[None]).max(-1)  # the samples come in another order
            assert queries.shape == wanted.shape and apart.min(0).max() < 2e-2 and apart.min(1).max() < 2e-2
        layers += 1
    assert layers == len(context.banks) and chunk.windows.keys() == context.windows.keys()
    for layer, window in context.windows.items():
        np.testing.assert_allclose(chunk.windows[layer].keys, window.keys, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
def test_both_ways_capture_the_same_of_a_chunk(tokenizer, architecture):
    """Heads that do not stand for the preamble: its share of the attention is counted to the live tokens."""
    model, preamble = toys.toy(architecture), 20
    prefix, conversations = toys.random_tokens(90), random_conversations(5)
    by_layer = layerwise_fit(model, tokenizer, prefix, preamble=preamble, queries=4000)
    run, K = by_layer.run, by_layer.run.geometry.n_kv_heads
    context = read(run, prefix, preamble=preamble)
    at_once = capture.capture(run, context, conversations)
    for layer, kind in enumerate(by_layer.layers(conversations, empty_chunk())):
        assert kind.length == context.length == 70
        np.testing.assert_allclose(absolute(kind.banks[0]), absolute(context.banks[layer])[:, preamble:], atol=2e-4)
        samples, theirs = at_once.train.heads(range(layer * K, layer * K + K)), kind.data.train.heads(range(K))
        for name in samples._fields:
            pair = (np.array(getattr(x, name), np.float32) for x in (samples, theirs))
            np.testing.assert_allclose(*pair, atol=2e-2)
        keys = context.banks[layer].parameters["keys"]
        scores = samples.queries.astype(mx.float32) @ keys.swapaxes(1, 2) * run.geometry.scale
        np.testing.assert_allclose(samples.log_normalizer, mx.logsumexp(scores[..., preamble:], axis=-1), atol=2e-2)
        assert (samples.live_log_normalizer >= mx.logsumexp(scores[..., :preamble], axis=-1) - 2e-2).all()


def absolute(bank):
    return bank.parameters["keys"] + bank.offset[:, None]


def replayed_queries(model, context, conversations):
    """Per layer and split, the queries [K, samples, D] of conversations, each conversation on its own."""
    queries = [{"train": [], "held_out": []} for _ in context.banks]
    for conversation in conversations:
        caches = [
            capture.CaptureCache(c.bank, c.context) if isinstance(c, NectarCache) else c for c in context.make_cache()
        ]
        fed = (conversation.prompt + conversation.answer)[:-1]
        mx.eval(model(mx.array([fed]), cache=caches))
        capturing = [c for c in caches if isinstance(c, capture.CaptureCache)]
        for layer, cache in enumerate(capturing):
            queries[layer][conversation.split].append(cache.take(np.ones((1, len(fed)), bool)).queries)
    return [{split: mx.concatenate(x, axis=1) for split, x in layer.items()} for layer in queries]


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gemma3", "gpt_oss", "qwen3_moe"))]
)
def test_it_fits_about_as_well_as_the_ordinary_way(toy_fit, architecture):
    model = shallow(architecture)
    options = {"kind": "quadrature", "budget": 0.5, "steps": 120, "context_tokens": 500}
    ordinary, ours = toy_fit(architecture, **options), toy_fit(architecture, **options, layerwise=True)
    assert ours.report["layerwise"] and "layerwise" not in ordinary.report
    assert 0 < ours.report["ahead"] <= 1024  # so that where there is memory for it more text is appended
    assert ours.nbytes <= 1.05 * ordinary.nbytes  # the same budget, another split of it to be rounded
    tokens = ours.prompt(toys.tokenizer(), "Who runs?")
    full = model(mx.array([ours.prefix + tokens]))[:, len(ours.prefix) :]
    caches = [None, ordinary.make_cache(), ours.make_cache()]
    none, one, two = (float(mx.abs(model(mx.array([tokens]), cache=c) - full).mean()) for c in caches)
    assert two < max(2 * one, 0.5 * none)
    assert np.isfinite([ours.report["kl"], *ours.report["error"]]).all()


def test_what_is_reported_is_the_divergence_from_the_full_cache(tokenizer):
    model = shallow()
    ours, chunk = layerwise_fit(model, tokenizer), empty_chunk()
    conversations, runner = ours.study(), LayerRunner(model, ours.run.geometry)
    for _ in ours.layers(conversations, chunk):
        pass
    full, head = read(ours.run, ours.prefix), read(ours.run, ours.prefix[:20])
    for answer in chunk.answers:
        by_model = Answer.replayed(runner, full, answer.conversation)
        np.testing.assert_allclose(answer.hidden, by_model.hidden, atol=1e-3)
    checks = [answer.conversation for answer in chunk.answers]
    assert checks == [c for c in conversations if c.split == "check" and c.answer]
    without = fidelity.compare(model, full.make_cache, {"head": head.make_cache}, checks)["head"]
    figures = chunk.check(runner, full.make_cache, head.make_cache, recall=Calibration(ours.prefix))
    assert (figures["kl"], figures["agree"], figures["gap_closed"]) == (0.0, 1.0, 1.0)
    assert figures["kl_no_context"] == pytest.approx(without.kl.mean(), abs=2e-5)


def test_passages_cover_the_text_evenly(tokenizer):
    model, head = shallow(), prompts.prefix(tokenizer, TEXT)[:30]
    ours = layerwise_fit(model, tokenizer, head + list(range(100_000)))
    passages = [ours.passage(number) for number in range(50)]
    assert np.diff(np.sort([passage[60] for passage in passages])).max() < 2.5 * 100_000 / 50
    assert all(len(passage) <= PASSAGE + 60 for passage in passages)


@pytest.mark.parametrize("tokens", [20, 900, 2000, 3000, 100_000])
def test_passages_and_their_conversations_take_no_more_than_a_layer_does(tokenizer, tokens):
    model = shallow()
    ours = layerwise_fit(model, tokenizer, toys.random_tokens(tokens))
    g, config = ours.run.geometry, ours.run.config
    one = 2 * 4 * g.n_kv_heads * g.head_dim  # a token's keys and values in a layer
    hidden = 4 * model.args.hidden_size
    samples = ours.wanted["train"] * g.n_kv_heads * (3 * 2 * g.head_dim + 2 * 4)
    bound = max(tokens * (1.5 * one + 3 * hidden) + samples, device().layerwise_tokens * one * g.n_layers)
    together = ours.passage_tokens + ours.side_by_side * (PROMPT + config.answer_tokens)
    assert together * one * g.n_layers <= bound
    if tokens > 50_000:
        assert (ours.passage_tokens, ours.side_by_side) == (PASSAGE, device().passage_conversations)
    assert ours.side_by_side >= 4 and ours.passage_tokens >= 384


@pytest.mark.slow
def test_no_phase_takes_more_memory_than_fitting_a_layer():
    """The demo model and 6,000 tokens: 1.5 of a layer's keys and values, 3 of the hidden states, a layer's samples."""
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
    run = FitRun(model=model, tokenizer=tokenizer, geometry=geometry, config=config, progress=measured)
    ours = LayerwiseFit(run, prefix, ChunkTarget(0.02 * geometry.cache_bytes(len(prefix)), 0.02))
    with measured("sampling about a passage", 0):
        passage, count = ours.passage(0), ours.side_by_side
        batch = self_study.training_conversations(tokenizer, passage, first=0, count=count, seed=0)
        self_study.answer(run, prefill.read_text(model, passage, geometry), batch, seed=0, temperature=0.9)
    ours.plan()
    conversations = [
        Conversation(prefix[i : i + 60], prefix[i + 3000 : i + 3096], split="held_out" if i % 500 == 0 else "train")
        for i in range(0, 2500, 50)
    ]
    mx.reset_peak_memory()
    for kind in ours.layers(conversations, empty_chunk()):
        peaks["a layer"] = (mx.get_peak_memory() - before) / 1e6
        with measured("training", 0):
            heads = train.train_heads(kind, [(120,)] * geometry.n_kv_heads)
            one = replace(run.layout, n_layers=1)
            train.merged_errors(kind, store.unpack(one, store.pack(one, heads)))
        break
    assert len(peaks) == 9 and max(peaks.values()) < 1.05 * ours.memory / 1e6, peaks


def test_only_one_layer_of_keys_and_values_exists(tokenizer):
    """What is held, above the model, while a layer is fitted."""
    model, prefix = shallow("llama", num_hidden_layers=12), toys.random_tokens(3000)
    ours = layerwise_fit(model, tokenizer, prefix)
    conversations = [
        Conversation(toys.random_tokens(6), toys.random_tokens(6), split="held_out" if i == 1 else "train")
        for i in range(4)
    ]
    geometry = ours.run.geometry
    layer = 2 * 4 * geometry.n_kv_heads * geometry.head_dim * len(prefix)
    hidden = 4 * model.args.hidden_size * (len(prefix) + 4 * 12)
    mx.clear_cache()
    before = mx.get_active_memory()
    held = [mx.get_active_memory() - before for _ in ours.layers(conversations, empty_chunk())]
    assert len(held) == 12
    assert max(held) < 1.05 * (layer + hidden)


def test_an_interrupted_fit_goes_on(tokenizer, toy_fit, tmp_path, monkeypatch):
    model = shallow()
    config = FitConfig(**SMALL, layerwise=True)
    whole = toy_fit(budget=0.5, context_tokens=300, layerwise=True)
    train_heads, layers = layerwise.train_heads, []

    def interrupted(kind, sizes, **options):
        layers.append(1)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return train_heads(kind, sizes, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layerwise, "train_heads", interrupted)
        toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    monkeypatch.setattr(self_study, "sample_answers", lambda *a, **k: pytest.fail("answers were sampled again"))
    trained, initialize = [], QuadratureFit.initialize

    def noted(self, heads, *others):
        trained.extend(heads)
        return initialize(self, heads, *others)

    monkeypatch.setattr(QuadratureFit, "initialize", noted)
    resumed = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    assert resumed.digest == whole.digest
    assert len(trained) == (model.args.num_hidden_layers - 1) * model.args.num_key_value_heads


def test_it_is_chosen_where_the_cache_would_not_fit(tokenizer, monkeypatch):
    model = shallow()

    def needs(tokens=1000, **options):
        return pipeline.needs_layers(fit_run(model, tokenizer, **options), tokens)

    bytes_of = 2 * attention_patch.route(model).cache_bytes(1000)  # float32
    assert needs(memory=bytes_of - 1)
    assert not needs(memory=bytes_of)
    assert not needs(memory=1, layerwise=False)
    assert not needs(memory=1, kind="exact")
    with pytest.raises(NectarError, match="kind exact keeps"):
        needs(layerwise=True, kind="exact")
    monkeypatch.setattr("nectar_mlx.fitting.run.free_memory", lambda: bytes_of)
    assert needs() and not needs(400)


def test_the_command(tokenizer, tmp_path, capsys):
    toys.save_model(shallow(), tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text(TEXT)
    arguments = ["--model", str(tmp_path / "model"), "--context", str(tmp_path / "book.txt"), "--budget", "0.5"]
    small = ["--queries", "300", "--steps", "5", "--context-tokens", "200", "--layerwise", "--keep-study", "--json"]
    assert fit.main([*arguments, *small, "--output", str(tmp_path / "out.nectar")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["layerwise"] and "s, layer by layer\n" in err
    assert "this fit has no conversations to keep" in err
    assert fit.main([*arguments, "--prefill", "some", "--output", str(tmp_path / "no.nectar")]) == 2
    assert "dense or fixed" in capsys.readouterr().err


def test_patched_layers_leave_the_model_as_it_was():
    model = toys.toy("qwen2")
    before = type(model.layers[0]).__call__
    runner = LayerRunner(model, attention_patch.route(model))
    with pytest.raises(RuntimeError), runner.patched_layers(lambda *a, **k: None):
        raise RuntimeError
    assert type(model.layers[0]).__call__ is before
