"""Fitting beside exact keys: what heads are trained on, the kinds, and the whole way through the commands."""

import json

import mlx.core as mx
import numpy as np
import pytest
from nectar_mlx.fitting.hybrid import distillation, training
from nectar_mlx.fitting.hybrid import fitter as retrieval_fitter
from nectar_mlx.fitting.hybrid.fitter import RetrievalFitter

from nectar_mlx import Nectar, NectarError, ask, evaluate, fit
from nectar_mlx.core.attention import Partial, merge
from nectar_mlx.fitting import prefill
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import regression
from nectar_mlx.heads import Completion, Retrieval, ThresholdedNodes
from nectar_mlx.heads.completion import key_features
from nectar_mlx.heads.hybrid import ANCHORS, EVERYTHING, SINKS, TAIL, anchor_positions, middle
from nectar_mlx.mlxlm import attention_patch, prompts
from nectar_mlx.retrieval import kv_path, sketch
from tests import oracle, toys

M, N, n, D, SCALE = 2, 40, 90, 16, 0.4
TEXT = " ".join(f"The {a} dog sees fox number {i}, and the {b} fox runs." for i, (a, b) in enumerate(
    (a, b) for a in ("quick", "lazy", "brown", "old") for b in ("red", "sly", "young", "tired")
))  # fmt: skip
FAST = {"queries": 500, "conversations": 8, "steps": 40, "trial_steps": 5, "answer_tokens": 16, "batch": 128,
        "checks": 2, "samples": 300, "budget": 0.3}  # fmt: skip


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.fixture(scope="module")
def rows():
    """Samples rows over random keys and values, exact attention computed in float64."""
    queries, keys, values = random(M, N, D, seed=1), random(M, n, D, seed=2), random(M, n, D, seed=3)
    scores = SCALE * np.array(queries, dtype=np.float64) @ np.array(keys, dtype=np.float64).swapaxes(1, 2)
    weights = np.exp(scores)
    output = weights @ np.array(values, dtype=np.float64) / weights.sum(-1, keepdims=True)
    whole = (output, np.log(weights.sum(-1)))
    output, log = (mx.array(x.astype(np.float32)) for x in whole)
    live = random(M, N, D, seed=4), random(M, N, seed=5)
    return Samples(queries, output, live[0], log, live[1]), keys, values, weights


@pytest.mark.parametrize("unread", [0.0, 0.25, 1.0])
def test_a_split_adds_up_and_holds_only_what_was_not_read(rows, unread):
    captured, keys, values, weights = rows
    inside = middle(n)
    split = training.split(
        captured, keys, values, oracle.Selector(keys[:, inside], scale=SCALE), scale=SCALE, seed=0, unread=unread
    )
    assert split.queries.shape == (M, N, D + 1)
    live = merge(
        Partial(captured.output, captured.log_normalizer), Partial(captured.live_output, captured.live_log_normalizer)
    )
    again = merge(Partial(split.output, split.log_normalizer), Partial(split.live_output, split.live_log_normalizer))
    np.testing.assert_allclose(np.array(again.output), np.array(live.output), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(again.log_normalizer), np.array(live.log_normalizer), rtol=1e-5, atol=1e-5)
    threshold = np.array(split.queries[..., -1:])
    scores = np.log(weights[..., inside])
    below = np.where(scores < threshold, weights[..., inside], 0)
    np.testing.assert_allclose(np.array(split.log_normalizer), np.log(below.sum(-1)), rtol=1e-4, atol=1e-4)
    expected = below @ np.array(values[:, inside], dtype=np.float64) / below.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.array(split.output), expected, rtol=1e-3, atol=1e-4)
    untouched = (threshold == EVERYTHING).mean()
    assert untouched == unread if unread in (0, 1) else 0.05 < untouched < 0.5
    read = (scores >= threshold).mean()
    assert read < 0.3, "at most a fifth of the keys, as a sample of ten tells"


def test_the_heads_of_a_group_read_the_same_keys(rows):
    """What lies above the thresholds of a token's rows is, for one of them, above the same share of its attention."""
    captured, keys, values, weights = rows
    inside = middle(n)
    selector = oracle.Selector(keys[:, inside], scale=SCALE)
    split = training.split(captured, keys, values, selector, scale=SCALE, seed=0, unread=0.3, group=4)
    threshold = np.array(split.queries[..., -1]).reshape(M, N // 4, 4)
    unread = threshold == EVERYTHING
    assert np.array_equal(unread.any(-1), unread.all(-1)) and 0 < unread.mean() < 1
    shares = (threshold - np.log(weights.sum(-1)).reshape(threshold.shape))[~unread.any(-1)]
    np.testing.assert_allclose(shares, shares[:, :1].repeat(4, 1), atol=1e-4)
    assert shares.max() - shares.min() > 0.5, "budgets differ from token to token"


def test_fewer_keys_may_stand_for_all(rows):
    """Doubled keys weigh as much as every key twice."""
    captured, keys, values, _ = rows
    inside = middle(n)
    part = Samples(*(x[:1] for x in captured))
    once = training.split(
        part,
        keys[:1],
        values[:1],
        oracle.Selector(keys[:1, inside], scale=SCALE),
        scale=SCALE,
        seed=0,
        unread=1.0,
        repeat=2.0,
    )
    pairs = [
        mx.concatenate([x[:1, :SINKS], x[:1, inside], x[:1, inside], x[:1, -TAIL:]], axis=1) for x in (keys, values)
    ]
    selector = oracle.Selector(pairs[0][:, SINKS:-TAIL], scale=SCALE)
    twice = training.split(part, *pairs, selector, scale=SCALE, seed=0, unread=1.0)
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


def test_clusters_are_a_feature_map_that_knows_its_keys():
    """KeyFile in tight clusters: the start already stands for the kernel."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(5, D))
    keys = (centres[rng.integers(0, 5, 200)] + 0.02 * rng.normal(size=(200, D))).astype(np.float32)
    values, queries = rng.normal(size=(200, D)).astype(np.float32), rng.normal(size=(300, D)).astype(np.float32)
    head = distillation.clusters(keys, queries, 12, scale=SCALE, seed=0)
    anchors = {f"anchor_{name}": mx.zeros((ANCHORS, D)) for name in ("keys", "values")}
    head = distillation.summarise(head | anchors, mx.array(keys), mx.array(values), bits=16)
    bank = Completion.stack([head], scale=SCALE)
    shares = key_features(bank.parameters, mx.array(keys)[None])
    np.testing.assert_allclose(np.array(shares.sum(-1)), 1, rtol=1e-5)
    exact = np.log(np.exp(SCALE * queries @ keys.T).sum(-1))
    nodes = bank.nodes(bank.parameters)
    found = np.log(np.exp(SCALE * queries @ np.array(nodes["keys"])[0].T + np.array(nodes["bias"])[0]).sum(-1))
    np.testing.assert_allclose(found, exact, atol=0.05)


@pytest.fixture(scope="module")
def fitted():
    """Every kind on one toy."""
    tokenizer, model = toys.tokenizer(), toys.toy("llama")
    kinds = ("retrieval", "completion", "hybrid")
    return tokenizer, model, {k: toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST, kind=k)) for k in kinds}


def test_kinds(fitted):
    tokenizer, model, nectars = fitted
    errors = {}
    for kind, nectar in nectars.items():
        assert nectar.nbytes <= 0.3 * nectar.cache_nbytes and nectar.report["kl"] >= 0
        assert isinstance(
            nectar.banks[0], {"retrieval": Retrieval, "completion": Completion}.get(kind, ThresholdedNodes)
        )
        tokens = nectar.prompt(tokenizer, "Who runs?")
        full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
        for share in (0, 0.05, 0.3, 1):
            found = model(mx.array([tokens]), cache=nectar.make_cache(exact=share))
            errors[kind, share] = float(mx.abs(found - full).mean())
    for kind in nectars:
        assert errors[kind, 1] < 0.05 and errors[kind, 0.3] < 1.1 * errors["retrieval", 0.3]
        if kind != "retrieval":
            for share, less in ((0, 0.7), (0.05, 0.95)):
                assert errors[kind, share] < less * errors["retrieval", share]
    assert errors["retrieval", 0] > errors["retrieval", 0.3] > errors["retrieval", 1]


def test_anchors_are_the_first_and_last_keys(fitted):
    _, _, nectars = fitted
    nectar = nectars["retrieval"]
    keys, _ = nectar.keys.layer(1)
    at = mx.array(anchor_positions(len(nectar.prefix)))
    assert mx.abs(nectar.banks[1].parameters["anchor_keys"] - keys[:, at]).max() < 0.05 * mx.abs(keys).max()


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "qwen3"])
def test_architectures(architecture):
    """Sliding windows, sinks in the denominator, normalised queries."""
    tokenizer, model = toys.tokenizer(), toys.toy(architecture)
    nectar = toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST, kind="retrieval", context_tokens=150))
    tokens = nectar.prompt(tokenizer, "Who?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    found = model(mx.array([tokens]), cache=nectar.make_cache(exact=1))
    assert mx.abs(found - full).mean() < 0.05 * mx.abs(full).mean()


def test_a_text_that_is_too_short():
    with pytest.raises(NectarError, match="at least 48 tokens"):
        toys.fit(toys.toy("llama"), toys.tokenizer(), "the fox", config=FitConfig(kind="hybrid"))


def test_from_text_to_sources_and_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = toys.save_model(toys.toy("llama"), tmp_path / "model", toys.tokenizer())
    (tmp_path / "book.txt").write_text(TEXT)
    options = ["--queries", "300", "--steps", "5", "--budget", "0.3", "--kind", "hybrid", "--json"]
    assert fit.main(["--model", str(folder), "--context", "book.txt", *options]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] >= 0
    assert kv_path("book.nectar").is_file()
    assert ask.main(["book.nectar", "Who?", "--json", "--exact", "0.2", "--max-tokens", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(TEXT[s["start"] : s["end"]] == s["text"] for s in told["sources"]) and told["sources"]
    options = [
        "--baselines",
        "none",
        "--count",
        "2",
        "--answer-tokens",
        "8",
        "--no-answers",
        "--exact",
        "0,0.2",
        "--json",
    ]
    assert evaluate.main(["book.nectar", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    methods = {m["method"]: m for m in result["methods"]}
    assert {"nectar", "nectar, 0.0% read", "nectar, 20.0% read", "no context"} <= methods.keys()
    assert "bytes read a token" in methods["nectar, 20.0% read"]["detail"]
    assert methods["nectar, 20.0% read"]["bytes"] > methods["nectar, 0.0% read"]["bytes"]
    entropy = [part["entropy"] for part in result["entropy"]]
    assert entropy == sorted(entropy) and len(entropy) == 4
    assert "nectar, 20.0% read @ book.nectar" in result["entropy"][0]["errors"]
    assert Nectar.read("book.nectar").layout.kind == "hybrid"


@pytest.fixture
def heard():
    """A fitter of the toy that has heard its conversations."""
    tokenizer, model = toys.tokenizer(), toys.toy("llama")
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, prompts.prefix(tokenizer, TEXT), geometry)
    fitter = RetrievalFitter(model, tokenizer, context, geometry, FitConfig(**FAST, kind="hybrid"))
    fitter.converse()
    fitter.hear()
    return fitter


def test_the_router_is_made_for_the_queries_of_all_heads(heard, monkeypatch):
    """However many rows there are: a token's query heads lie side by side, so rows at a distance may be one head's."""
    group, seen = heard.geometry.n_heads // heard.geometry.n_kv_heads, []
    assert group > 1
    monkeypatch.setattr(sketch, "build", lambda keys, queries, *, scale: seen.append(queries))
    monkeypatch.setattr(retrieval_fitter, "_SKETCHED", heard.study.rows // (4 * group))
    heard._sketched()
    captured = np.array(heard.study.heads([0]).queries[0].astype(mx.float32))
    drawn = [int((captured == row).all(-1).argmax()) for row in seen[0][0][0]]
    counts = np.bincount(np.array(drawn) % group, minlength=group)
    assert len(drawn) == heard.study.rows // (4 * group) and counts.min() > 0.5 * counts.max()


def test_bytes_go_by_the_errors_where_keys_are_read(heard):
    """Errors with nothing read count, but little."""
    heard.prepare()
    rows = heard.training_rows([0, 1])
    unread = np.array(rows.queries[0, :, -1] == EVERYTHING)
    assert 0 < unread.mean() < 1
    bank = heard.train(heard.start([0, 1], [(6,), (6,)], rows), rows, 1)
    metric = mx.stack([mx.eye(heard.geometry.head_dim)] * 2)
    beside, alone = (
        regression.errors(bank, Samples(*(x[:, mx.array(np.flatnonzero(which))] for x in rows)), metric=metric)
        for which in (~unread, unread)
    )
    found = heard.judged(bank, rows, metric)
    np.testing.assert_allclose(found, np.array(beside) + 0.02 * np.array(alone), rtol=1e-4)
    read = Samples(*(x[:, mx.array(np.flatnonzero(~unread))] for x in rows))
    np.testing.assert_allclose(heard.judged(bank, read, metric), np.array(beside), rtol=1e-4)
