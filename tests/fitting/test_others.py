"""Fits with other files in view: where these lie, what the loss sees of them, what that gains, and what is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, fit, inspect
from nectar_mlx.composition import compose
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.others import Others
from nectar_mlx.fitting.samples.ahead import furthest
from nectar_mlx.fitting.samples.capture import CaptureCache
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import attention_matching, regression
from nectar_mlx.fitting.solve.initial import Init
from nectar_mlx.heads import Quadrature
from nectar_mlx.mlxlm.kept import attention_caches
from tests import oracle, toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read, shallow

HEAD = toys.random_tokens(5, seed=99)
TAIL = toys.random_tokens(9, seed=98)
OTHER = "The old heron stood by the river and saw the young badger number 7. " * 4


def prefix(seed, length=70):
    return [*HEAD, *toys.random_tokens(length - 5 + seed, seed=seed)]


def in_view(model, tokenizer, files, own):
    run = fit_run(model, tokenizer)
    context = read(run, own)
    return replace(context, others=Others.before(own, files, model, run.geometry))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_the_others_lie_where_compose_puts_them(architecture, tokenizer):
    """The same logits behind the exact text, whichever of the two puts it together."""
    model = toys.toy(architecture)
    files, own = [toys.picked(model, prefix(seed), 12) for seed in (1, 2)], prefix(3)
    together = compose([*files, toys.exact(model, own)], model)
    ours = in_view(model, tokenizer, files, own)
    expected = model(mx.array([TAIL]), cache=together.make_cache())
    np.testing.assert_allclose(model(mx.array([TAIL]), cache=ours.make_cache()), expected, atol=3e-4)
    alone = model(mx.array([TAIL]), cache=replace(ours, others=None).make_cache())
    assert np.abs(np.array(alone - expected)).max() > 0.05


def test_conversations_stand_so_far_on_that_all_texts_are_within_the_window(tokenizer):
    model = toys.toy("llama")
    files, own = [toys.picked(model, prefix(seed), 12) for seed in (1, 2)], prefix(3)
    ours = in_view(model, tokenizer, files, own)
    model.args.max_position_embeddings = compose([*files, toys.exact(model, own)], model).start + 1024 + 9
    assert furthest(fit_run(model, tokenizer), ours, start=ours.start) == 9
    assert furthest(fit_run(model, tokenizer), replace(ours, others=None), start=ours.start) > 100


def test_a_sample_counts_the_others_to_the_live_tokens(tokenizer):
    """Against float64: the text's own (o, L), and beside it the others' nodes and live tokens, which weigh twice."""
    model = shallow()
    file, own = toys.picked(model, prefix(1), 12), prefix(3)
    context = in_view(model, tokenizer, [file], own)
    caches = context.make_cache(CaptureCache)
    mx.eval(model(mx.array([TAIL]), cache=caches))
    for layer, cache in attention_caches(caches):
        (samples,), (K, T) = cache.captured, (2, len(TAIL))
        bank, others = context.banks[layer], context.others.layers[layer]
        offset = np.array(bank.offset.astype(mx.float32), np.float64)[:, None]
        queries = np.array(samples.queries, np.float64).reshape(K, -1, 16)
        output, log_normalizer = oracle.attention(queries, *bank.parameters.values(), scale=bank.scale)
        np.testing.assert_allclose(np.array(samples.output).reshape(output.shape), output, atol=2e-3)
        np.testing.assert_allclose(np.array(samples.log_normalizer).reshape(K, -1), log_normalizer, atol=1e-3)
        keys = [np.array(others["keys"], np.float64) - offset, np.array(cache.live.keys[0, :, :T], np.float64)]
        values = [np.array(others["values"]), np.array(cache.live.values[0, :, :T])]
        bias = np.concatenate([np.array(others["bias"]), np.full((K, T), np.log(2))], 1)
        sees = np.concatenate([np.ones((T, others["bias"].shape[1]), bool), np.tri(T, dtype=bool)], 1)
        output, log_normalizer = oracle.attention(
            queries,
            np.concatenate(keys, 1),
            np.concatenate(values, 1),
            scale=bank.scale,
            bias=bias,
            mask=np.tile(sees, (queries.shape[1] // T, 1)),
        )
        np.testing.assert_allclose(np.array(samples.live_output).reshape(output.shape), output, atol=2e-3)
        np.testing.assert_allclose(np.array(samples.live_log_normalizer).reshape(K, -1), log_normalizer, atol=1e-3)


def test_the_whole_attention_errs_less_where_the_loss_sees_the_others():
    """A text that gives one output to half of the queries and another one to the others, where another text answers:
    a head of one node has to choose, and chooses between the two if it does not see that. The truth is in float64."""
    rng, D, scale = np.random.default_rng(0), 8, 0.5
    side = np.eye(D)[0]
    keys = rng.normal(size=(1, 8, D)) + np.repeat([2.0, -2.0], 4)[:, None] * side
    other_keys, live_keys = rng.normal(size=(1, 64, D)) + 6 * side, rng.normal(size=(1, 8, D))
    values, other_values, live_values = (rng.normal(size=x.shape) for x in (keys, other_keys, live_keys))

    def truth(queries):
        """(o, L) of the text, of the live tokens, and of these with the other text, which weigh twice as a text."""
        beside = np.concatenate([other_keys, live_keys], 1), np.concatenate([other_values, live_values], 1)
        bias = np.array([[0.0] * 64 + [np.log(2)] * 8])
        return (
            oracle.attention(queries, keys, values, scale=scale),
            oracle.attention(queries, live_keys, live_values, scale=scale),
            oracle.attention(queries, *beside, scale=scale, bias=bias),
        )

    def drawn(count):
        return rng.normal(size=(1, count, D)) + np.where(np.arange(count) % 2, 3.0, -3.0)[:, None] * side

    def fitted(queries, own, live):
        samples = Samples(*(mx.array(x.astype(np.float32)) for x in (queries, own[0], live[0], own[1], live[1])))
        own_keys, own_values = (mx.array(x[0].astype(np.float32)) for x in (keys, values))
        weights = attention_matching.importance(samples, own_keys[None], scale=scale)[0]
        chosen = attention_matching.most_important(weights, 1)
        (head,) = attention_matching.match(samples, [own_keys[chosen]], [own_values[chosen]], scale=scale)
        init = Init.of(Quadrature.stack([head], scale=scale))
        return regression.train(init, samples, steps=300, batch=256, rate=3e-2)

    queries = drawn(2048)
    own, live, beside = truth(queries)
    banks = [fitted(queries, own, part) for part in (live, beside)]
    fresh = drawn(1000)
    own, _, beside = truth(fresh)

    def merged(output, log_normalizer):
        gate = 1 / (1 + np.exp(beside[1] - log_normalizer))[..., None]
        return beside[0] + gate * (output - beside[0])

    def error(bank):
        p = {name: np.array(x, np.float64) for name, x in bank.parameters.items()}
        part = oracle.attention(fresh, p["keys"], p["values"], scale=scale, bias=p["bias"])
        return np.square(merged(*part) - merged(*own)).sum(-1).mean()

    alone, together = map(error, banks)
    assert together < 0.5 * alone, (together, alone)


@pytest.fixture(scope="module")
def other(tokenizer):
    return toys.fit(shallow(), tokenizer, OTHER, config=FitConfig(**FAST, budget=0.3), source="heron.txt")


def test_the_report_tells_of_the_others_and_the_claim_holds_them(tmp_path, tokenizer, other):
    model = shallow()
    fitted = Nectar.fit(model, tokenizer, TEXT, others=[other], **FAST | {"budget": 0.3})
    assert fitted.report["with"] == ["heron.txt"] and fitted.metadata["with"] == [other.digest]
    assert 0 <= fitted.report["kl_with"] < fitted.report["kl_no_context"]

    def interrupted(description, total):
        if description == "fitting heads":
            raise KeyboardInterrupt
        return silent(description, total)

    from nectar_mlx.core.progress import silent

    config = FitConfig(**FAST, budget=0.3)
    with pytest.raises(KeyboardInterrupt):
        toys.fit(model, tokenizer, TEXT, config=config, others=[other], progress=interrupted,
                 checkpoint=Checkpoint(tmp_path / "fit"))  # fmt: skip
    for others in ([], [other, other]):
        with pytest.raises(NectarError, match="with"):
            toys.fit(model, tokenizer, TEXT, config=config, others=others,
                     checkpoint=Checkpoint(tmp_path / "fit", must_match=True))  # fmt: skip
    again = toys.fit(model, tokenizer, TEXT, config=config, others=[other],
                     checkpoint=Checkpoint(tmp_path / "fit", must_match=True))  # fmt: skip
    assert again.digest == fitted.digest


def test_what_cannot_be_fitted_together_is_refused(tokenizer, other):
    model = shallow()

    def refused(match, *, model=model, others=(other,), **options):
        with pytest.raises(NectarError, match=match) as error:
            Nectar.fit(model, tokenizer, TEXT, others=others, **FAST | {"budget": 0.3} | options)
        assert "\n" not in str(error.value)

    refused("heron.txt was fitted on another model", model=shallow("llama", seed=1))
    refused("kind mlp is fitted to its text alone", kind="mlp")
    refused("layer by layer is fitted alone", layerwise=True)
    small = shallow("llama", max_position_embeddings=1024 + len(toys.tokenizer().encode(TEXT)) + 60)
    refused("window of .* leaves room for", model=small, others=[fit_on(small, other)])
    networks = toys.fit(model, tokenizer, OTHER, config=FitConfig(**FAST, budget=0.3, kind="mlp"))
    refused("networks", others=[networks])


def fit_on(model, other):
    """The same file, as if it had been fitted on this model."""
    from nectar_mlx import models

    return Nectar(other.tensors, other.metadata | {"model_sha256": models.fingerprint(model)})


def test_a_text_is_fitted_with_another_by_a_command(tmp_path, tokenizer, capsys):
    folder = toys.save_model(shallow(), tmp_path / "model", tokenizer)
    for name, text in (("first", OTHER), ("second", TEXT)):
        (tmp_path / f"{name}.txt").write_text(text)

    def command(name, *more):
        options = ["--budget", "0.3", "--queries", "600", "--steps", "20", "--context-tokens", "100"]
        paths = ["--context", tmp_path / f"{name}.txt", "--output", tmp_path / f"{name}.nectar"]
        return fit.main([str(x) for x in ["--model", folder, *paths, *options, "--json", *more]])

    assert command("first") == 0
    capsys.readouterr()
    assert command("second", "--with", tmp_path / "first.nectar") == 0
    said = capsys.readouterr()
    assert "with first.txt in view: KL" in said.err and json.loads(said.out)["with"] == ["first.txt"]
    assert command("second") == 2 and "another fit" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "second.nectar")]) == 0 and "first.txt" in capsys.readouterr().out
    model = shallow()
    both = compose([Nectar.load(tmp_path / f"{name}.nectar", model) for name in ("first", "second")], model)
    assert mx.isfinite(model(mx.array([TAIL]), cache=both.make_cache())).all().item()
    assert command("second", "--with", tmp_path / "second.txt") == 2
    assert command("second", "--with", tmp_path / "first.nectar", "--shard") == 2
    assert "leave out --with or --shard" in capsys.readouterr().err
