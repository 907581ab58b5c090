"""How each kind of head is fitted; and that a kind of its own needs a bank, a way of fitting and an entry for each."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import Nectar
from nectar_mlx.fitting import sizes
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.kinds import KIND_FITS, HybridFit, KindFit, kind_fit
from nectar_mlx.fitting.kinds.quadrature import QuadratureFit
from nectar_mlx.fitting.samples import recording
from nectar_mlx.fitting.train import merged_errors, train_heads
from nectar_mlx.heads import KINDS, Quadrature
from nectar_mlx.mlxlm import prompts
from nectar_mlx.store import load, pack
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read, shallow

TOKENS = 60
FITTED = [kind for kind in KINDS if kind != "exact"]


def test_every_kind_but_exact_can_be_fitted():
    assert list(KIND_FITS) == FITTED
    assert all(issubclass(kind, KindFit) for kind in KIND_FITS.values())


@pytest.mark.parametrize("kind", FITTED)
def test_the_kinds_that_keep_keys_have_a_file_of_them(kind):
    assert issubclass(KIND_FITS[kind], HybridFit) == KINDS[kind].keeps_keys


@pytest.fixture(scope="module")
def data(tokenizer):
    """What the heads of 60 tokens are fitted to."""
    run = fit_run(shallow(), tokenizer)
    return recording.collect(run, read(run, prompts.prefix(tokenizer, TEXT)[:TOKENS]))


def prepared(kind, tokenizer, data):
    return kind_fit(fit_run(shallow(), tokenizer, kind=kind), data)


@pytest.mark.parametrize("kind", FITTED)
def test_every_kind_is_initialized_in_its_own_shapes(tokenizer, data, kind):
    fit, bank = prepared(kind, tokenizer, data), KINDS[kind]
    size = bank.size_for(8)
    samples = fit.training_samples([1, 2], 64) if bank.trainable else data.held_out.heads([1, 2])
    init = fit.initialize([1, 2], [size] * 2, samples)
    assert init.bank.sizes == (size, size)
    parameters = init.to_bank(init.parameters)
    for name, shape in bank.shapes(size, fit.run.geometry.head_dim).items():
        if name not in ("cut", "sharpness"):
            assert parameters[name].shape == (2, *shape), name
    assert init.muon <= init.parameters.keys()
    part = init.bank.apply(parameters, samples.queries)
    assert part.output.shape == samples.output.shape and mx.isfinite(part.log_normalizer).all()


@pytest.mark.parametrize("kind", FITTED)
def test_every_kind_is_planned_trained_and_stored(tokenizer, data, kind):
    """Within the bytes that it was given; what is trained errs by less than half of the output's variance."""
    fit = prepared(kind, tokenizer, data)
    layout, nbytes = fit.run.layout, 0.8 * fit.run.geometry.cache_bytes(TOKENS)
    plan = sizes.plan_sizes(fit, lambda share: nbytes, 0.8)
    assert plan.share == 0.8 and len(plan.sizes) == fit.n_heads
    heads = train_heads(fit, plan.sizes, bits=plan.bits)
    assert [layout.bank.size_of(head) for head in heads] == plan.sizes
    tensors = pack(layout, heads, offsets=data.context.offsets)
    assert sum(x.nbytes for x in tensors.values()) < 1.1 * nbytes
    errors = merged_errors(fit, load.banks(layout, tensors))
    assert len(errors) == fit.n_heads and np.isfinite(errors).all()
    assert np.mean(errors) < 0.5 or not layout.bank.trainable


class Sharpened(Quadrature):
    """A kind of its own: nodes whose scores are doubled."""

    kind = "sharpened"
    learning_rate = 1e-2

    def apply(self, parameters, queries):
        return super().apply(parameters | {"keys": 2 * parameters["keys"]}, queries)


class SharpenedFit(QuadratureFit):
    def initialize(self, heads, sizes, samples):
        init = super().initialize(heads, sizes, samples)
        halved = {n: x / 2 if n == "keys" else x for n, x in init.bank.parameters.items()}
        bank = Sharpened(parameters=halved, sizes=init.bank.sizes, scale=init.bank.scale)
        return type(init).of(bank)

    def keeps_every_key(self, size):
        return False


@pytest.fixture
def sharpened(monkeypatch):
    monkeypatch.setitem(KINDS, Sharpened.kind, Sharpened)
    monkeypatch.setitem(KIND_FITS, Sharpened.kind, SharpenedFit)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_kind_of_its_own_is_fitted_stored_and_loaded(tokenizer, sharpened, tmp_path, bits, layerwise):
    model = shallow()
    config = FitConfig(**FAST, kind="sharpened", budget=0.5, bits=bits, context_tokens=TOKENS, layerwise=layerwise)
    nectar = toys.fit(model, tokenizer, TEXT, config=config)
    assert all(isinstance(bank, Sharpened) for bank in nectar.banks)
    assert nectar.report["kl"] < 0.5 * nectar.report["kl_no_context"]
    path = tmp_path / "x.nectar"
    nectar.save(path)
    assert not list(path.parent.glob("*.kv"))
    loaded = Nectar.load(path, model, tokenizer)
    assert loaded.layout.kind == "sharpened" and loaded.layout.bits == bits
    tokens = mx.array([nectar.prompt(tokenizer, "Who runs?")])
    ours, again = (model(tokens, cache=it.make_cache()) for it in (nectar, loaded))
    assert mx.array_equal(ours, again)
    full = model(mx.array([nectar.prefix + tokens[0].tolist()]))[:, len(nectar.prefix) :]
    assert mx.abs(ours - full).mean() < 0.5 * mx.abs(model(tokens) - full).mean()
