"""Texts beyond the model's window: each chunk at its own positions, all of them in one softmax."""

import io
import json
import re
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from nectar_mlx import Nectar, NectarError, ask, chat, cli, documents, fit, store
from nectar_mlx.baselines import EvalContext
from nectar_mlx.core.clock import Clock
from nectar_mlx.evaluation.run import Options, QuestionOptions, evaluate
from nectar_mlx.fitting import chunks, stages
from nectar_mlx.fitting.checkpoint import Checkpoint, Plan
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.layerwise import LayerwiseFit
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import attention_matching
from nectar_mlx.mlxlm import attention_patch, prompts
from nectar_mlx.store import chunking
from tests import toys
from tests.fitting import toy_fit
from tests.fitting.toy_fit import SHORT_ANSWERS, fit_run, shallow

TEXT = toy_fit.TEXT[: toy_fit.TEXT.index(" The old dog")]  # three chunks in the window of the toys
SMALL = SHORT_ANSWERS | {"budget": 0.5, "queries": 300}
WINDOW = 1024 + 200
SLOW_LLAMA = pytest.param("llama", True, marks=pytest.mark.slow)


def small_window(architecture="llama"):
    model = shallow(architecture)
    model.args.max_position_embeddings = WINDOW
    return model


class Weighed(KVCache):
    """The oracle's cache: the preamble's keys, those of all chunks, the live ones, in one stock attention call. Its
    mask takes log C from the scores of the chunks' keys, for C chunks."""

    def __init__(self, keys, values, *, preamble, chunks, start):
        super().__init__()
        self.before, self.start = (keys, values), start
        own = mx.arange(keys.shape[2]) >= preamble
        self.less = mx.where(own, -np.log(chunks), 0.0)

    @property
    def offset(self):
        return self.start + self.length

    @offset.setter
    def offset(self, value):
        self.length = value - getattr(self, "start", 0)

    def update_and_fetch(self, keys, values):
        self.before = tuple(mx.concatenate(pair, axis=2) for pair in zip(self.before, (keys, values), strict=True))
        self.length += keys.shape[2]
        return self.before

    def make_mask(self, n, **others):
        live = mx.arange(self.length + n)[None] <= mx.arange(self.length, self.length + n)[:, None]
        context = mx.broadcast_to(self.less[None], (n, self.less.size))
        return mx.concatenate([context, mx.where(live, 0.0, -np.inf)], axis=1)


def stock_caches(model, prefix, lengths, preamble):
    """Keys and values of each chunk behind the preamble, by the stock model alone; the preamble's own once."""
    kept = []
    for number, end in enumerate(np.cumsum(lengths)):
        text = prefix[:preamble] + prefix[preamble + end - lengths[number] : preamble + end]
        whole = make_prompt_cache(model)
        mx.eval(model(mx.array([text]), cache=whole))
        first = preamble if number else 0
        kept.append([[x[:, :, first : len(text)] for x in (cache.keys, cache.values)] for cache in whole])
    start = preamble + max(lengths)
    return [
        Weighed(
            *(mx.concatenate(x, axis=2) for x in zip(*layer, strict=True)),
            preamble=preamble,
            chunks=len(lengths),
            start=start,
        )
        for layer in zip(*kept, strict=True)
    ]


def agree(model, ours, oracle, *, tolerance=1e-3):
    for tokens in (toys.random_tokens(7), toys.random_tokens(1), toys.random_tokens(3, seed=1)):
        expected = model(mx.array([tokens]), cache=oracle)
        np.testing.assert_allclose(model(mx.array([tokens]), cache=ours), expected, atol=tolerance)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("room", [60, 1000])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "granite"])
def test_chunks_weigh_as_much_as_one(tokenizer, monkeypatch, architecture, room, layerwise):
    """Heads with room for every key of their chunk, and the exact reference, against one stock attention call."""
    model = shallow(architecture)
    geometry = attention_patch.route(model)
    preamble = prompts.preamble(tokenizer)
    prefix = prompts.prefix(tokenizer, TEXT, max_tokens=150)
    lengths = chunking.split(len(prefix) - preamble, room)
    assert len(lengths) == (3 if room == 60 else 1)
    every_key = Plan([(1000,)] * len(geometry.fitted) * geometry.n_kv_heads, 1.0)
    monkeypatch.setattr(stages, "plan_sizes", lambda *_: every_key)
    monkeypatch.setattr(LayerwiseFit, "plan", lambda self: every_key)
    run = fit_run(model, tokenizer, **SMALL | {"bits": 16, "budget": 1.0, "queries": 100})
    tensors, report = chunks.fit(run, prefix, chunks=lengths, layerwise=layerwise, clock=Clock())
    provenance = toys.provenance(model, tokenizer)
    metadata = store.description(tensors, run.layout, geometry, provenance=provenance, report=report, chunks=lengths)
    built = Nectar(tensors, metadata)
    context = chunks.read_chunks(model, prefix, geometry, chunks=lengths)
    assert context.start == built.start == preamble + max(lengths)
    # Heads of 16 bits are rounded; without the weights of the chunks the difference is far larger.
    agree(model, built.make_cache(), stock_caches(model, prefix, lengths, preamble), tolerance=1e-2)
    agree(model, context.make_cache(), stock_caches(model, prefix, lengths, preamble))


@pytest.mark.parametrize("layerwise", [None, True])
def test_every_chunk_is_answered_about(tokenizer, tmp_path, layerwise):
    model = small_window()
    config = FitConfig(**SMALL | {"steps": 60, "queries": 800, "budget": 0.8}, layerwise=layerwise)
    fitted = toys.fit(model, tokenizer, TEXT, config=config)
    assert len(fitted.chunks) >= 3 and fitted.start <= 200
    assert fitted.nbytes <= 0.8 * fitted.cache_nbytes
    assert min(size for (size,) in fitted.banks[0].sizes) > prompts.preamble(tokenizer)
    assert len(fitted.report["chunks"]) == len(fitted.chunks) and fitted.report["layerwise"] == bool(layerwise)
    assert 0 < fitted.report["ahead"] < 100, "as far as the window has room"
    assert all(chunk["kl"] < chunk["kl_no_context"] for chunk in fitted.report["chunks"])
    fitted.save(tmp_path / "book.nectar")
    again = Nectar.load(tmp_path / "book.nectar", model, tokenizer)
    assert again.chunks == fitted.chunks and again.start == fitted.start
    check_evaluation(model, tokenizer, fitted)
    tokens = mx.array([toys.random_tokens(6)])
    assert mx.array_equal(model(tokens, cache=again.make_cache()), model(tokens, cache=fitted.make_cache()))


@pytest.fixture(scope="module")
def parted(tokenizer):
    """Three chunks, each with a word of its own."""
    model = small_window()
    room = WINDOW - prompts.preamble(tokenizer) - 1024
    filler = tokenizer.encode(TEXT)
    texts = [f" The {word} is in the garden. " for word in ("copper", "velvet", "marble")]
    pieces = [tokenizer.decode(filler[: room // 2]) + t + tokenizer.decode(filler[: room // 3]) for t in texts]
    return model, toys.fit(model, tokenizer, "".join(pieces), config=FitConfig(**SMALL))


def test_a_chunk_alone_is_its_own_nodes_and_the_preambles(parted, tokenizer):
    model, fitted = parted
    preamble, count = len(fitted.prefix) - sum(fitted.chunks), len(fitted.chunks)
    assert count >= 3
    after = np.cumsum(fitted.chunks) + preamble
    for number in range(count):
        alone = fitted.chunk(number)
        body = fitted.prefix[after[number] - fitted.chunks[number] : after[number]]
        assert alone.prefix == fitted.prefix[:preamble] + body and not alone.chunks
        assert alone.start == preamble + len(body)
        assert alone.nbytes < fitted.nbytes / count + 4 * preamble * alone.nbytes / len(alone.prefix)
        for bank, joined in zip(alone.banks, fitted.banks, strict=True):
            for head, whole in zip(bank.unstack(), joined.unstack(), strict=True):
                each = head["bias"].size - preamble
                own = slice(preamble + number * each, preamble + (number + 1) * each)
                for name in ("keys", "values"):
                    expected = mx.concatenate([whole[name][:preamble], whole[name][own]])
                    assert mx.array_equal(head[name], expected)
                difference = np.array(head["bias"]) - np.concatenate([whole["bias"][:preamble], whole["bias"][own]])
                np.testing.assert_allclose(difference[:preamble], 0, atol=1e-6)
                np.testing.assert_allclose(difference[preamble:], np.log(count), atol=1e-2)
    tokens = mx.array([toys.random_tokens(5)])
    assert mx.isfinite(model(tokens, cache=fitted.chunk(0).make_cache())).all()


@pytest.mark.parametrize("number", [-1, 99])
def test_a_chunk_that_is_not_there(parted, number):
    with pytest.raises(NectarError, match="there is no chunk"):
        parted[1].chunk(number)


def test_heads_that_are_not_those_of_the_chunks(parted):
    lengths = parted[1].chunks
    fitted = Nectar(parted[1].tensors, parted[1].metadata | {"chunks": [*lengths[:-2], sum(lengths[-2:])]})
    with pytest.raises(NectarError, match="not those of its chunks"):
        [fitted.chunk(n) for n in range(len(fitted.chunks))]


def test_the_nearest_chunk_says_what_the_question_says(parted, tokenizer):
    fitted = parted[1]
    texts = [tokenizer.decode(fitted.chunk(n).prefix) for n in range(len(fitted.chunks))]
    for word in ("copper", "velvet", "marble"):
        assert f" {word} " in texts[fitted.nearest(tokenizer, f"Where is the {word}?")]
    assert fitted.nearest(tokenizer, "zebra zebra zebra") is None
    assert fitted.nearest(tokenizer, "the") is None, "every chunk says it"


def test_a_text_without_chunks_has_no_nearest(tokenizer):
    exact = toys.exact(toys.toy("llama"), toys.random_tokens(40), tokenizer)
    assert exact.nearest(tokenizer, "copper") is None


def test_ask_and_chat_answer_from_the_nearest_chunk(parted, tokenizer, tmp_path, monkeypatch, capsys):
    model, fitted = parted
    fitted.save(tmp_path / "it.nectar")
    monkeypatch.setattr(cli, "load", lambda *others, **named: (model, tokenizer, fitted))
    argv = [str(tmp_path / "it.nectar"), "Where is the velvet?", "--max-tokens", "3", "--json"]
    assert ask.main(argv) == 0
    out, err = capsys.readouterr()
    chunk = json.loads(out)["chunk"]
    assert chunk == fitted.nearest(tokenizer, "Where is the velvet?")
    assert f"from chunk {chunk + 1} of {len(fitted.chunks)}" in err
    assert json.loads(out)["context_tokens"] == len(fitted.chunk(chunk).prefix)
    assert ask.main([*argv, "--whole"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["chunk"] is None and "from chunk" not in err
    turns = "Where is the copper?\nzebra\nWhere is the marble?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert chat.main([str(tmp_path / "it.nectar"), "--max-tokens", "3"]) == 0
    expected = [fitted.nearest(tokenizer, f"Where is the {w}?") + 1 for w in ("copper", "marble")]
    assert re.findall(r"from chunk (\d+)", capsys.readouterr().err) == [str(n) for n in expected]


def check_evaluation(model, tokenizer, fitted):
    """Against the exact keys of all chunks, weighed as one; what must read the text again is left out."""
    names = "snapkv,sinks-window,keep-most-attended,expected-attention,attention-matching,sparse-prefill"
    options = Options(questions=QuestionOptions(count=4), answer_tokens=6, samples=200, baselines=names, answers=False)
    methods = {m["method"]: m for m in evaluate(model, tokenizer, {"it": fitted}, options=options)["methods"]}
    assert "SnapKV" not in methods and len(methods) == 7
    assert (
        methods["sparse prefill"]["kl"] < 0.02 * methods["no context"]["kl"]
    )  # all keys, read and weighed the same way
    for name in ("sinks + window", "keep most attended", "expected attention", "Attention Matching"):
        assert methods[name]["bytes"] <= methods["nectar"]["bytes"], name
    assert methods["nectar"]["kl"] < 0.5 * methods["no context"]["kl"]
    assert methods["nectar"]["error"] is not None


@pytest.fixture(scope="module")
def chunked(tokenizer):
    """The fit of a small window's model to TEXT, made once for each architecture and way."""

    @cache
    def fit(architecture, layerwise=None):
        config = FitConfig(**SMALL, layerwise=layerwise)
        return toys.fit(small_window(architecture), tokenizer, TEXT, config=config)

    return fit


@pytest.mark.parametrize("architecture, layerwise", [("llama", None), SLOW_LLAMA, ("gemma3_text", None)])
def test_a_chunk_that_is_done_is_not_read_again(tokenizer, chunked, tmp_path, monkeypatch, architecture, layerwise):
    model, whole = small_window(architecture), chunked(architecture, layerwise)
    config = FitConfig(**SMALL, layerwise=layerwise)
    owner, name = (LayerwiseFit, "layers") if layerwise else (stages, "kind_fit")
    real, called = getattr(owner, name), []

    def interrupted(*arguments):
        called.append(1)
        if len(called) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    done = tmp_path / "part" / "chunk-0"
    assert {path.name for path in done.iterdir()} == {"fit.json", "done.safetensors"}, "what led to its heads is gone"
    resumed = toys.fit(model, tokenizer, TEXT, config=config, checkpoint=Checkpoint(tmp_path / "part"))
    assert len(called) == len(whole.chunks) + 1
    assert resumed.digest == whole.digest
    report, expected = (dict(f.report, seconds=None, peak_memory=None) for f in (resumed, whole))
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("memory, layerwise", [(0.9, True), (1.1, False)])
def test_a_chunk_that_fits_the_memory_is_fitted_at_once(tokenizer, memory, layerwise):
    """Whatever the whole text takes. memory: of what the longest chunk's keys and values take."""
    model = small_window()
    preamble = prompts.preamble(tokenizer)
    longest = preamble + chunking.split(len(prompts.prefix(tokenizer, TEXT)) - preamble, 200 - preamble)[-1]
    bytes_of = 2 * attention_patch.route(model).cache_bytes(longest)  # float32
    config = FitConfig(**SMALL | {"steps": 1}, memory=int(memory * bytes_of))
    fitted = toys.fit(model, tokenizer, TEXT, config=config)
    assert len(fitted.chunks) == 3 and fitted.report["layerwise"] is layerwise


def test_sliding_windows_keep_the_end_of_the_last_chunk(tokenizer, chunked):
    model, fitted = small_window("gemma3_text"), chunked("gemma3_text")
    assert len(fitted.chunks) > 1
    assert {w.keys.shape[1] for w in fitted.windows.values()} == {model.args.sliding_window}
    assert mx.isfinite(model(mx.array([toys.random_tokens(9)]), cache=fitted.make_cache())).all()
    assert fitted.nearest(tokenizer, "Where is fox number 3?") is None
    with pytest.raises(NectarError, match="sliding window"):
        fitted.chunk(0)


def test_baselines_keep_what_a_key_weighs(tokenizer):
    model = toys.toy("llama")
    preamble, prefix = prompts.preamble(tokenizer), prompts.prefix(tokenizer, TEXT, max_tokens=100)
    lengths, geometry = chunking.split(len(prefix) - preamble, 40), attention_patch.route(model)
    context = chunks.read_chunks(model, prefix, geometry, chunks=lengths)
    given = EvalContext(model=model, tokenizer=tokenizer, geometry=geometry, context=context)
    positions = mx.array([[0, preamble - 1, preamble, len(prefix) - 1]] * geometry.n_kv_heads)
    for bank in given.keep(lambda layer: positions).banks:
        less = -np.log(len(lengths))
        np.testing.assert_allclose(bank.parameters["bias"], [[0, 0, less, less]] * geometry.n_kv_heads, atol=1e-6)
    queries = mx.random.normal((geometry.n_kv_heads, 5, geometry.head_dim))
    samples = Samples(queries, None, None, context.banks[1](queries).log_normalizer, None)
    weights = attention_matching.attention_weights(samples, given.layer(1)[0], bias=given.bias(1), scale=geometry.scale)
    np.testing.assert_allclose(weights.sum(-1), np.ones((geometry.n_kv_heads, 5)), atol=1e-4)


def test_a_budget_that_does_not_hold_every_chunk_is_refused_with_one_that_does(tokenizer):
    model = small_window()
    with pytest.raises(NectarError, match="too small") as error:
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**SMALL | {"budget": 0.02}))
    least = float(re.search(r"at least (\S+)%", str(error.value))[1]) / 100
    assert 0.02 < least < 1
    toys.fit(model, tokenizer, TEXT, config=FitConfig(**SMALL | {"steps": 1, "budget": 1.02 * least}))


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_memory_does_not_grow_with_the_text(tokenizer, layerwise):
    def peak(repeats):
        model = small_window()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        config = FitConfig(
            **SMALL | {"steps": 2, "trial_steps": 1, "matching_samples": 100, "budget": 0.1}, layerwise=layerwise
        )
        fitted = toys.fit(model, tokenizer, TEXT * repeats, config=config)
        return mx.get_peak_memory() - before, len(fitted.chunks)

    (short, few), (long, many) = peak(1), peak(4)
    assert many >= 3 * few
    assert long < 1.2 * short


@pytest.mark.parametrize("lengths", ["[0, 5]", "[100000]", '"many"', "[[1]]", "3"])
def test_chunks_that_cannot_be(tokenizer, tmp_path, lengths):
    model = toys.toy("llama")
    exact = toys.exact(model, toys.random_tokens(40), tokenizer)
    exact.metadata["chunks"] = json.loads(lengths)
    store.write(tmp_path / "bad.nectar", exact.tensors, exact.metadata)
    with pytest.raises(NectarError, match="damaged"):
        Nectar.read(tmp_path / "bad.nectar")


def test_what_cannot_be_joined_is_refused_with_what_fits(tokenizer, tmp_path, capsys):
    toys.save_model(small_window(), tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text(TEXT)
    arguments = ["--model", tmp_path / "model", "--context", tmp_path / "book.txt", "--output", tmp_path / "o.nectar"]
    assert fit.main([*map(str, arguments), "--kind", "mlp", "--budget", "0.5"]) == 2
    error = capsys.readouterr().err
    room = WINDOW - 1024 - prompts.preamble(tokenizer)
    assert f"--context-tokens {room}" in error and f"{WINDOW:,}" in error and "quadrature" in error


def test_a_model_whose_layers_share_more_is_refused_at_once(tokenizer, monkeypatch):
    monkeypatch.setattr(chunks, "_fit_all", None)
    model = toys.toy("deepseek_v3", max_position_embeddings=1400)
    with pytest.raises(NectarError, match="deepseek_v3 models cannot be fitted layer by layer or in chunks"):
        toys.fit(model, tokenizer, toy_fit.TEXT, config=FitConfig(**SHORT_ANSWERS, budget=0.5))


def test_the_sources_of_a_chunk_are_in_the_whole_text(tokenizer, chunked, tmp_path):
    fitted = chunked("llama")
    whole = Nectar(fitted.tensors, fitted.metadata | {"report": dict(fitted.report)})
    reading = documents.Reading(TEXT, [documents.FileReport("a.txt", "text", len(TEXT), 0, len(TEXT))])
    whole.keep(reading, tokenizer)
    last = len(whole.chunks) - 1
    question, answer = "Who runs?", " ".join(TEXT.split()[-9:])
    found = whole.sources(tokenizer, question, answer, chunk=last)
    part = whole.chunk(last)
    assert found and part.sources(tokenizer, question, answer) == found
    assert all(source.document == "a.txt" and source.text in TEXT for source in found)
    assert part.cite(tokenizer, question, answer, found) == whole.cite(tokenizer, question, answer, found)
    part.save(tmp_path / "part.nectar")  # a file of its own stands for this part alone
    alone = Nectar.read(tmp_path / "part.nectar").text(tokenizer)
    assert "files" not in part.report and alone.text in TEXT and len(alone.text) < len(TEXT)
