"""Fitting beside exact keys: what heads are trained on, the kinds, and the whole way through the commands."""

import json

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, ask, evaluate, fit
from nectar_mlx.core.attention import Partial, merge
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.kinds import feature_map, hybrid, kind_fit, retrieval
from nectar_mlx.fitting.samples import recording, thresholds
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import regression
from nectar_mlx.fitting.train import regress
from nectar_mlx.heads import Completion, Retrieval, ThresholdedNodes
from nectar_mlx.heads.completion import key_features
from nectar_mlx.heads.hybrid import ANCHORS, EVERYTHING, SINKS, TAIL, anchor_positions, middle
from nectar_mlx.mlxlm import prompts
from nectar_mlx.retrieval import sketch
from tests import oracle, toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read, shallow

M, N, n, D, SCALE = 2, 40, 90, 16, 0.4
OPTIONS = {"steps": 40, "budget": 0.3}
KINDS = {"retrieval": Retrieval, "completion": Completion, "hybrid": ThresholdedNodes}


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.fixture(scope="module")
def problem():
    """Samples over random keys and values, exact attention computed in float64."""
    queries, keys, values = random(M, N, D, seed=1), random(M, n, D, seed=2), random(M, n, D, seed=3)
    scores = SCALE * np.array(queries, dtype=np.float64) @ np.array(keys, dtype=np.float64).swapaxes(1, 2)
    weights = np.exp(scores)
    output = weights @ np.array(values, dtype=np.float64) / weights.sum(-1, keepdims=True)
    whole = (output, np.log(weights.sum(-1)))
    output, log = (mx.array(x.astype(np.float32)) for x in whole)
    live = random(M, N, D, seed=4), random(M, N, seed=5)
    return Samples(queries, output, live[0], log, live[1]), keys, values, weights


@pytest.mark.parametrize("unread", [0.0, 0.25, 1.0])
def test_a_split_adds_up_and_holds_only_what_was_not_read(problem, unread):
    captured, keys, values, weights = problem
    inside = middle(n)
    split = thresholds.split(
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


def test_the_heads_of_a_group_read_the_same_keys(problem):
    """What lies above the thresholds of a token's samples is above the same share of its attention in one of them."""
    captured, keys, values, weights = problem
    inside = middle(n)
    selector = oracle.Selector(keys[:, inside], scale=SCALE)
    split = thresholds.split(captured, keys, values, selector, scale=SCALE, seed=0, unread=0.3, group=4)
    threshold = np.array(split.queries[..., -1]).reshape(M, N // 4, 4)
    unread = threshold == EVERYTHING
    assert np.array_equal(unread.any(-1), unread.all(-1)) and 0 < unread.mean() < 1
    shares = (threshold - np.log(weights.sum(-1)).reshape(threshold.shape))[~unread.any(-1)]
    np.testing.assert_allclose(shares, shares[:, :1].repeat(4, 1), atol=1e-4)
    assert shares.max() - shares.min() > 0.5, "budgets differ from token to token"


def test_fewer_keys_may_stand_for_all(problem):
    """Doubled keys weigh as much as every key twice."""
    captured, keys, values, _ = problem
    inside = middle(n)
    part = Samples(*(x[:1] for x in captured))
    once = thresholds.split(
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
    twice = thresholds.split(part, *pairs, selector, scale=SCALE, seed=0, unread=1.0)
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


def test_clusters_are_a_feature_map_that_knows_its_keys():
    """Keys in tight clusters: the initial map already stands for the kernel."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(5, D))
    keys = (centres[rng.integers(0, 5, 200)] + 0.02 * rng.normal(size=(200, D))).astype(np.float32)
    values, queries = rng.normal(size=(200, D)).astype(np.float32), rng.normal(size=(300, D)).astype(np.float32)
    head = feature_map.clusters(keys, queries, 12, scale=SCALE, seed=0)
    anchors = {f"anchor_{name}": mx.zeros((ANCHORS, D)) for name in ("keys", "values")}
    head = feature_map.summarise(head | anchors, mx.array(keys), mx.array(values), bits=16)
    bank = Completion.stack([head], scale=SCALE)
    shares = key_features(bank.parameters, mx.array(keys)[None])
    np.testing.assert_allclose(np.array(shares.sum(-1)), 1, rtol=1e-5)
    exact = np.log(np.exp(SCALE * queries @ keys.T).sum(-1))
    nodes = bank.nodes(bank.parameters)
    log_normalizer = np.log(np.exp(SCALE * queries @ np.array(nodes["keys"])[0].T + np.array(nodes["bias"])[0]).sum(-1))
    np.testing.assert_allclose(log_normalizer, exact, atol=0.05)


@pytest.fixture(scope="module")
def fitted(toy_fit):
    """Every kind on one toy."""
    return {kind: toy_fit(**OPTIONS, kind=kind) for kind in KINDS}


def test_kinds(tokenizer, fitted):
    model, errors = shallow(), {}
    for kind, nectar in fitted.items():
        assert nectar.nbytes <= 0.3 * nectar.cache_nbytes
        assert nectar.report["kl"] < (1.0 if kind == "retrieval" else 0.5) * nectar.report["kl_no_context"]
        assert isinstance(nectar.banks[0], KINDS[kind])
        tokens = nectar.prompt(tokenizer, "Who runs?")
        full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
        for fraction in (0, 0.05, 0.3, 1):
            logits = model(mx.array([tokens]), cache=nectar.make_cache(exact_fraction=fraction))
            errors[kind, fraction] = float(mx.abs(logits - full).mean())
    for kind in KINDS:
        assert errors[kind, 1] < 0.05 and errors[kind, 0.3] < 1.1 * errors["retrieval", 0.3]
        if kind != "retrieval":
            for fraction, less in ((0, 0.7), (0.05, 0.95)):
                assert errors[kind, fraction] < less * errors["retrieval", fraction]
    assert errors["retrieval", 0] > errors["retrieval", 0.3] > errors["retrieval", 1]


def test_anchors_are_the_first_and_last_keys(fitted):
    nectar = fitted["retrieval"]
    keys, _ = nectar.keys.layer(1)
    at = mx.array(anchor_positions(len(nectar.prefix)))
    assert mx.abs(nectar.banks[1].parameters["anchor_keys"] - keys[:, at]).max() < 0.05 * mx.abs(keys).max()


def test_a_file_that_keeps_its_study_has_its_keys(tokenizer, tmp_path):
    model, config = toys.toy("llama"), FitConfig(**FAST, kind="retrieval", keep_study=True)
    toys.fit(model, tokenizer, TEXT, config=config).save(tmp_path / "book.nectar")
    assert Nectar.load(tmp_path / "book.nectar", model).keys is not None


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "qwen3"])
def test_architectures(tokenizer, toy_fit, architecture):
    """Sliding windows, sinks in the denominator, normalized queries."""
    model = shallow(architecture)
    nectar = toy_fit(architecture, **OPTIONS, kind="retrieval", context_tokens=150)
    tokens = nectar.prompt(tokenizer, "Who?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    logits = model(mx.array([tokens]), cache=nectar.make_cache(exact_fraction=1))
    assert mx.abs(logits - full).mean() < 0.05 * mx.abs(full).mean()


def test_a_text_that_is_too_short(tokenizer):
    with pytest.raises(NectarError, match="at least 48 tokens"):
        toys.fit(shallow(), tokenizer, "the fox", config=FitConfig(kind="hybrid"))


def test_from_text_to_sources_and_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = toys.save_model(shallow(), tmp_path / "model", toys.tokenizer())
    (tmp_path / "book.txt").write_text(TEXT)
    options = ["--queries", "300", "--steps", "5", "--budget", "0.3", "--kind", "hybrid", "--json"]
    assert fit.main(["--model", str(folder), "--context", "book.txt", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"] < report["kl_no_context"] and report["budget"] == 0.3
    assert toys.key_file("book.nectar").is_file()
    assert ask.main(["book.nectar", "Who?", "--json", "--exact", "0.2", "--max-tokens", "4"]) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert sources and all(TEXT[s["start"] : s["end"]] == s["text"] for s in sources)
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


@pytest.fixture(scope="module")
def collected(tokenizer):
    """How the heads of the toy are fitted, kind hybrid."""
    run = fit_run(shallow(), tokenizer, **OPTIONS, kind="hybrid")
    return kind_fit(run, recording.collect(run, read(run, prompts.prefix(tokenizer, TEXT))))


def test_the_router_is_made_for_the_queries_of_all_heads(collected, monkeypatch):
    """However many samples there are: a token's query heads lie side by side, so samples at a fixed distance may be one
    head's."""
    run, train, built = collected.run, collected.data.train, []
    count = train.count // (4 * run.group)
    assert run.group > 1
    monkeypatch.setattr(sketch, "build", lambda keys, queries, *, scale: built.append(queries))
    monkeypatch.setattr(hybrid, "ROUTER_SAMPLES", count)
    _ = retrieval.RetrievalFit(run, collected.data).sketch
    captured = np.array(train.heads([0]).queries[0].astype(mx.float32))
    drawn = [int((captured == query).all(-1).argmax()) for query in built[0][0][0]]
    counts = np.bincount(np.array(drawn) % run.group, minlength=run.group)
    assert len(drawn) == count and counts.min() > 0.5 * counts.max()


def test_bytes_go_by_the_errors_where_keys_are_read(collected):
    """Errors with nothing read count, but little."""
    training = collected.training([0, 1])
    samples = training.samples
    unread = np.array(samples.queries[0, :, -1] == EVERYTHING)
    assert 0 < unread.mean() < 1
    bank = regress(collected, collected.initialize([0, 1], [(6,), (6,)], samples), training, steps=1)
    metric = mx.stack([mx.eye(collected.run.geometry.head_dim)] * 2)
    read_samples, unread_samples = (samples.take(mx.array(np.flatnonzero(which))) for which in (~unread, unread))
    with_retrieval, without = (
        np.array(regression.errors(bank, part, metric=metric)) for part in (read_samples, unread_samples)
    )
    np.testing.assert_allclose(collected.judge(bank, samples, metric), with_retrieval + 0.02 * without, rtol=1e-4)
    np.testing.assert_allclose(collected.judge(bank, read_samples, metric), with_retrieval, rtol=1e-4)
