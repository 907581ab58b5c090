"""Models whose numbers are large: the file is right, or the fit says where it went wrong and writes nothing."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar, NectarError, store
from nectar_mlx.core import attention
from nectar_mlx.fitting import finite, prefill, stages
from nectar_mlx.fitting.check import check
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.kinds import kind_fit
from nectar_mlx.fitting.samples import recording
from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import attention_matching
from nectar_mlx.heads import Exact
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.mlxlm.cache import NectarCache
from tests import toys
from tests.fitting.toy_fit import fit_run, shallow

TEXT = " ".join(f"The brig number {i} left with {i * 37 % 91} casks, and the sly fox saw it." for i in range(24))
FAST = {
    "queries": 500,
    "conversations": 8,
    "steps": 40,
    "trial_steps": 5,
    "answer_tokens": 12,
    "checks": 4,
    "batch": 128,
    "matching_samples": 300,
    "context_tokens": 160,
    "budget": 0.5,
}
B, K, G, T, D, CONTEXT, LIVE = 2, 2, 3, 4, 32, 40, 9
SCALE = D**-0.5


def layer(dtype, *, common, size=1.0, values=1.0, seed=0):
    """Queries, context and live keys and values whose scores have `common` in common, beside a few units of their
    own."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(K, 1, D))
    direction *= np.sqrt(common / SCALE) / np.linalg.norm(direction, axis=-1, keepdims=True)
    queries = rng.normal(size=(B, K, G, T, D)) / size + np.sign(direction)[None, :, None] * 0 + direction[None, :, None]
    keys = direction + size * rng.normal(size=(K, CONTEXT, D)) / (1 + np.abs(direction).max())
    live = direction + size * rng.normal(size=(B, K, LIVE, D)) / (1 + np.abs(direction).max())
    v, live_v = values * rng.normal(size=keys.shape), values * rng.normal(size=live.shape)
    arrays = (queries.reshape(B, K * G, T, D), keys, v, live, live_v)
    return [mx.array(x.astype(np.float32)).astype(dtype) for x in arrays]


def oracle(queries, keys, values, live, live_values):
    """Attention over context and live tokens, the queries the last of these, in float64 [B, H, T, D]."""
    q, k, v, lk, lv = (np.array(x.astype(mx.float32), np.float64) for x in (queries, keys, values, live, live_values))
    k, v = (np.broadcast_to(x, (B, *x.shape)) for x in (k, v))
    k, v = np.concatenate([k, lk], axis=2), np.concatenate([v, lv], axis=2)
    scores = np.einsum("bkgtd,bksd->bkgts", q.reshape(B, K, G, T, D), k) * SCALE
    hidden = np.arange(CONTEXT + LIVE) > CONTEXT + LIVE - T + np.arange(T)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bksd->bkgtd", weights, v).reshape(B, K * G, T, D), scores


def behind_context(arrays):
    """What a cache with the exact context answers, its keys relative to their mean."""
    queries, keys, values, live, live_values = arrays
    offset = keys.astype(mx.float32).mean(1).astype(mx.bfloat16)
    relative = (keys.astype(mx.float32) - offset.astype(mx.float32)[:, None]).astype(keys.dtype)
    bank = Exact(parameters={"keys": relative, "values": values}, sizes=((CONTEXT,),) * K, scale=SCALE, offset=offset)
    return NectarCache(bank, CONTEXT).attend(queries, live, live_values, scale=SCALE, mask="causal")


@pytest.mark.parametrize("dtype, tolerance", [(mx.float32, 1e-2), (mx.float16, 4e-2), (mx.bfloat16, 0.15)])
@pytest.mark.parametrize("common", [0.0, 300.0, 20_000.0])
def test_scores_of_any_size_in_common(dtype, tolerance, common):
    arrays = layer(dtype, common=common)
    wanted, scores = oracle(*arrays)
    if common:
        assert 0.5 * common < np.abs(scores[np.isfinite(scores)]).max()
    assert np.abs(np.array(behind_context(arrays).astype(mx.float32)) - wanted).max() < tolerance


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("size, values", [(1e6, 1.0), (1.0, 1e5), (1e6, 1e5)])
def test_keys_and_values_of_any_size(dtype, size, values):
    arrays = layer(dtype, common=0.0, size=size, values=values)
    wanted, _ = oracle(*arrays)
    error = np.abs(np.array(behind_context(arrays).astype(mx.float32)) - wanted).max()
    assert error < values * (2e-3 if dtype == mx.float32 else 4e-2)


def test_merging_is_the_same_relative_to_an_offset():
    queries, _, _, keys, values = layer(mx.float32, common=50.0)
    offset = mx.random.normal((K, D))
    plain = attention.causal(queries, keys, values, scale=SCALE)
    relative = attention.causal(queries, keys, values, scale=SCALE, offset=offset)
    common = attention.common_score(queries, offset, scale=SCALE)
    np.testing.assert_allclose(relative.output, plain.output, atol=1e-4)
    np.testing.assert_allclose(relative.log_normalizer + common, plain.log_normalizer, atol=1e-3)


def test_weights_never_exceed_one_where_the_normalizer_came_out_lower():
    samples = Samples(mx.full((1, 3, D), 30.0), *[mx.zeros((1, 3, D))] * 2, mx.full((1, 3), 4_000.0), mx.zeros((1, 3)))
    weights = attention_matching.attention_weights(samples, mx.full((1, 2, D), 30.0), scale=SCALE)
    assert weights.max() == 1.0


def changed(model, name, change):
    """One kind of weight of every layer, in the order of the layers."""
    for index, block in enumerate(model.layers):
        module = block.self_attn
        *path, leaf = name.split(".")
        for part in path:
            module = getattr(module, part)
        setattr(module, leaf, change(index, getattr(module, leaf)))
    mx.eval(model.parameters())
    return model


def slow_dimensions(size):
    """A bias [K · 16] on the rotation's slowest pair, which positions hardly turn."""
    bias = np.zeros((2, 16), np.float32)
    bias[:, [7, 15]] = size
    return mx.array(bias.reshape(-1))


def large_scores(score):
    """A qwen2 whose first layer's scores are this large, for all keys alike."""
    model, side = shallow("qwen2"), float(np.sqrt(score * 16**0.5 / 2))
    changed(model, "k_proj.bias", lambda i, b: b + (slow_dimensions(side) if i == 0 else 0))
    queries = mx.concatenate([slow_dimensions(side)] * 2)
    return changed(model, "q_proj.bias", lambda i, b: b + (queries if i == 0 else 0))


def large_values(size):
    model = changed(shallow(), "v_proj.weight", lambda i, w: w * size)
    return changed(model, "o_proj.weight", lambda i, w: w / size)


def large_keys(size):
    model = changed(shallow(), "k_proj.weight", lambda i, w: w * size)
    return changed(model, "q_proj.weight", lambda i, w: w / size)


HOSTILE = {
    "scores of 20,000 in float32": (large_scores, 2e4, mx.float32),
    "scores of 20,000 in bfloat16": (large_scores, 2e4, mx.bfloat16),
    "scores of 20,000 in float16": (large_scores, 2e4, mx.float16),
    "values of 1e5 in float32": (large_values, 1e5, mx.float32),
    "values of 1e5 in bfloat16": (large_values, 1e5, mx.bfloat16),
    "values of 1e5 in float16": (large_values, 1e5, mx.float16),
    "keys of 1e6 in float32": (large_keys, 1e6, mx.float32),
    "keys of 1e6 in bfloat16": (large_keys, 1e6, mx.bfloat16),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_right_or_refused(tokenizer, name):
    make, size, dtype = HOSTILE[name]
    model = make(size)
    model.set_dtype(dtype)
    try:
        nectar = toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST))
    except NectarError as error:
        assert dtype == mx.float16 and "layer" in str(error) and "not finite" in str(error)
        return
    for bank in nectar.banks:
        assert all(mx.isfinite(x).all().item() for x in bank.parameters.values())
    assert np.isfinite(nectar.report["kl"]) and nectar.report["gap_closed"] > 0.8, nectar.report["verdict"]


@pytest.mark.parametrize("kind", ["mlp", "corrected", "completion", "retrieval", "hybrid", "exact"])
@pytest.mark.parametrize("make, size", [(large_scores, 2e4), (large_values, 1e5), (large_keys, 1e6)])
def test_every_kind_of_head_takes_large_numbers(tokenizer, kind, make, size):
    model, config = make(size), FitConfig(**FAST | {"kind": kind, "budget": 0.8})
    if make is large_keys and kind == "hybrid":  # its router's half-precision index cannot hold them
        with pytest.raises(NectarError, match="not finite, so nothing is written"):
            toys.fit(model, tokenizer, TEXT, config=config)
        return
    nectar = toys.fit(model, tokenizer, TEXT, config=config)
    tokens = nectar.prompt(tokenizer, "Who left?")
    full = model(mx.array([nectar.prefix + tokens]))[:, len(nectar.prefix) :]
    ours = model(mx.array([tokens]), cache=nectar.make_cache())
    assert mx.isfinite(ours).all().item()
    if kind == "exact":
        np.testing.assert_allclose(ours, full, atol=5e-3)


def test_large_scores_are_fitted_layer_by_layer(tokenizer):
    """All layers at once: one of the hostile models."""
    nectar = toys.fit(large_scores(2e4), tokenizer, TEXT, config=FitConfig(**FAST, layerwise=True))
    assert nectar.report["layerwise"] and nectar.report["gap_closed"] > 0.8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tokenizer, value):
    model = changed(shallow(), "v_proj.weight", lambda i, w: w * (value if i == 1 else 1))
    with pytest.raises(NectarError, match=r"layers\.1\.self_attn\.v_proj\.weight"):
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST))


def test_a_captured_number_that_is_not_finite_is_named():
    geometry = attention_patch.route(toys.toy("gemma3_text"))  # its third layer alone has full attention
    with pytest.raises(NectarError, match=r"capturing attention: layer 2, KV head 1 is not finite"):
        finite.check_heads("capturing attention", {1}, geometry)
    assert finite.not_finite([mx.zeros((3, 2)), mx.array([[0.0], [np.nan], [0.0]])]) == [1]


def test_a_number_that_rounding_broke_is_named(tokenizer, monkeypatch):
    """A bias of 1e6 is more than a file's float16 holds."""
    monkeypatch.setattr(stages, "train_heads", lambda kind, sizes, *, bits: [
        {"keys": mx.zeros((4, 16)), "values": mx.zeros((4, 16)), "bias": mx.full(4, 1e6 if index == 3 else 0.0)}
        for index in range(kind.n_heads)
    ])  # fmt: skip
    with pytest.raises(NectarError, match="rounding: layer 1, KV head 1 is not finite, so nothing is written"):
        toys.fit(shallow(), tokenizer, TEXT, config=FitConfig(**FAST))


def test_a_head_that_training_made_worse_keeps_its_start(tokenizer):
    model = shallow()
    budgets = FAST | {"budget": 0.15}
    trained = toys.fit(model, tokenizer, TEXT, config=FitConfig(**budgets))
    ruined = toys.fit(model, tokenizer, TEXT, config=FitConfig(**budgets, rate=50.0))
    kept = toys.fit(model, tokenizer, TEXT, config=FitConfig(**budgets, rate=1e-9))
    assert trained.report["kl"] < 1.2 * kept.report["kl"]
    assert ruined.report["kl"] < 1.5 * kept.report["kl"]


def test_bfloat16_windows_and_offsets_are_read_back(tmp_path):
    model = toys.toy("gemma3_text")
    model.set_dtype(mx.bfloat16)
    nectar = toys.exact(model, toys.random_tokens(60))
    nectar.save(tmp_path / "x.nectar")
    tensors, _ = store.read(tmp_path / "x.nectar")
    assert tensors["offsets"].dtype == mx.bfloat16 and store.digest(tensors) == nectar.digest


def test_offsets_are_means_and_keys_relative_to_them(tokenizer):
    """Of what is read, of what heads are fitted to, and of what is stored."""
    model = large_scores(2e4)
    run = fit_run(model, tokenizer, **FAST)
    context = prefill.read_text(model, toys.random_tokens(80), run.geometry)
    bank = context.banks[0]
    assert mx.abs(bank.offset).max() > 50 and mx.abs(bank.parameters["keys"].mean(1)).max() < 1
    fitted = kind_fit(run, recording.collect(run, context)).banks[0]
    assert mx.array_equal(fitted.offset, bank.offset)
    assert mx.array_equal(fitted.parameters["keys"], bank.parameters["keys"])


@pytest.mark.parametrize("kind", ["quadrature", "corrected", "mlp"])
def test_heads_of_16_bits_keep_to_their_budget(tokenizer, tmp_path, kind):
    model = shallow()
    config = FitConfig(
        **FAST | {"kind": kind, "budget": 0.4, "bits": 16, "steps": 10, "queries": 300, "context_tokens": 300}
    )
    nectar = toys.fit(model, tokenizer, TEXT, config=config)
    assert len({size for bank in nectar.banks for size in bank.sizes}) > 1 or kind == "mlp"
    assert nectar.nbytes <= 0.4 * nectar.cache_nbytes
    nectar.save(tmp_path / "x.nectar")
    tokens = mx.array([nectar.prompt(tokenizer, "Who left?")])
    ours, again = (model(tokens, cache=n.make_cache()) for n in (nectar, Nectar.load(tmp_path / "x.nectar", model)))
    np.testing.assert_allclose(again, ours, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_named(tokenizer):
    with pytest.raises(NectarError, match="measuring sensitivity: layer 0, KV head 0 is not finite"):
        toys.fit(large_values(1e-30), tokenizer, TEXT, config=FitConfig(**FAST))


def overflowing_window():
    """A sliding-window layer behind all others, whose values float16 cannot hold."""
    model = toys.toy("mistral", layer_types=["full_attention", "full_attention", "sliding_attention"])
    model.layers[2].self_attn.v_proj.weight *= 6e4
    return model


def overflowing_feed_forward():
    model = toys.toy("llama")
    model.layers[2].mlp.down_proj.weight *= 1e5
    model.layers[2].mlp.up_proj.weight *= 1e4
    return model


@pytest.mark.parametrize("make", [overflowing_window, overflowing_feed_forward])
@pytest.mark.parametrize("options", [{"kind": "exact"}, {"kind": "quadrature"}, {"layerwise": True}])
def test_what_overflows_behind_the_last_keys_is_refused(tokenizer, make, options):
    model = make()
    model.set_dtype(mx.float16)
    with pytest.raises(NectarError, match="own logits are not finite"):
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | options))


@pytest.mark.parametrize("kind", ["quadrature", "mlp"])
def test_a_window_that_leaves_no_room_is_too_small(tokenizer, kind):
    model = shallow()
    model.args.max_position_embeddings = 64
    with pytest.raises(NectarError, match=r"the model's window of 64 tokens is too small: .* 1,024"):
        toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | {"kind": kind}))


@pytest.mark.parametrize("layer", [0, 2])
def test_the_first_layer_that_answers_are_not_finite_behind_is_named(tokenizer, layer):
    run = fit_run(toys.toy("llama"), tokenizer, **FAST)
    data = recording.collect(run, prefill.read_text(run.model, toys.random_tokens(80), run.geometry))
    banks = data.context.banks
    assert np.isfinite(check(run, data, banks)["kl"])
    values = banks[layer].parameters["values"]
    broken = replace(banks[layer], parameters=banks[layer].parameters | {"values": values * float("inf")})
    with pytest.raises(NectarError, match=f"checking: the output of layer {layer} is not finite"):
        check(run, data, [*banks[:layer], broken, *banks[layer + 1 :]])
