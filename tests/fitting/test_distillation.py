"""Heads are trained through the whole model: the gradient, the grids, what is kept."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx import store
from nectar_mlx.fitting import backward, checkpoint, distillation, fidelity
from nectar_mlx.fitting.checkpoint import Checkpoint
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.kinds import kind_fit
from nectar_mlx.fitting.layers import layer_runner
from nectar_mlx.fitting.samples.recording import collect
from nectar_mlx.fitting.train import train_heads
from nectar_mlx.mlxlm import prompts
from nectar_mlx.store import load
from tests import toys
from tests.fitting.test_numbers import large_keys, large_scores, large_values
from tests.fitting.toy_fit import FAST, TEXT, fit_run, read

NODES = 6
_LARGE = [(large_values, 1e5), (large_keys, 1e6)]


def fitted(tokenizer, model, **options):
    """Heads of a few nodes before they are distilled: kind, sizes, heads."""
    run = fit_run(model, tokenizer, **{"conversations": 24, "queries": 2000} | options)
    kind = kind_fit(run, collect(run, read(run, prompts.prefix(tokenizer, TEXT))))
    sizes = [(NODES,)] * kind.n_heads
    return kind, sizes, train_heads(kind, sizes)


def distilled(kind, sizes, heads, *, steps, **changes):
    config = replace(kind.run.config, distillation_steps=steps, budget=0.005)
    run = replace(kind.run, config=config, **changes)
    before, kind.run = kind.run, run
    try:
        return distillation.distilled(kind, sizes, heads)
    finally:
        kind.run = before


def work_of(kind, sizes, heads):
    runner = layer_runner(kind.run.model, kind.run.geometry)
    return distillation._Distillation(kind, sizes, heads, runner, distillation._units(kind))


def divergence(kind, heads, split):
    """From the full cache, over the answers of a split, as the file will have the heads."""
    run, context = kind.run, kind.data.context
    caches = store.contents(run.layout, heads, prefix=context.prefix, windows=context.windows, offsets=context.offsets)
    banks = load.banks(run.layout, caches)
    asked = [c for c in kind.data.conversations if c.split == split and c.answer]
    found = fidelity.compare(run.model, context.make_cache, {"ours": lambda: make(context, banks)}, asked)
    return float(found["ours"].kl.mean())


def make(context, banks):
    return replace(context, banks=banks).make_cache()


@pytest.fixture(scope="module")
def fit(tokenizer):
    return fitted(tokenizer, toys.toy("llama"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_gradient_is_that_of_the_whole_model(tokenizer, architecture):
    kind, sizes, heads = fitted(tokenizer, toys.toy(architecture))
    run = kind.run
    work = work_of(kind, sizes, heads)
    conversations = [replace(c, answer=c.answer[: 3 + i], ahead=40 * i) for i, c in enumerate(work.training[:3])]
    assert len({c.fed_tokens for c in conversations}) > 1
    batch = distillation._Batch(conversations)
    rows = [(i, j) for i, c in enumerate(conversations) for j in range(len(c.prompt) - 1, c.fed_tokens)]
    at = mx.array([i * batch.tokens.shape[1] + j for i, j in rows])

    def drawn(caches):
        logits = run.model(batch.tokens, cache=caches)
        return fidelity.log_probabilities(logits.reshape(-1, logits.shape[-1])[at])

    truth = drawn(work.full(batch))

    def loss(vector):
        ours = drawn(work.caches(work.banks_of(vector), batch))
        return (mx.exp(truth) * (truth - ours)).sum() / len(rows)

    with backward.differentiable(run.model):
        expected = np.array(mx.grad(loss)(work.rounded(work.vector)))
    ours = np.array(work.gradient(batch, conversations))
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(ours, expected, atol=2e-3 * np.abs(expected).max())


def test_it_brings_answers_closer_and_stays_on_the_grids(fit, monkeypatch):
    kind, sizes, heads = fit
    monkeypatch.setattr(distillation, "_RATE", 1.4e-2)  # there are few steps
    ours = distilled(kind, sizes, heads, steps=80)
    moved = [mx.abs(x[n] - y[n]).max().item() for x, y in zip(heads, ours, strict=True) for n in ("keys", "values")]
    assert max(moved) > 0
    for before, after in zip(heads, ours, strict=True):
        for name in ("keys", "values"):
            steps = np.array(distillation._grids(before)[name])
            integers = np.array(after[name]) / steps
            assert np.abs(integers - np.rint(integers)).max() < 1e-3
    # Answers to other questions, by other instructions.
    assert divergence(kind, ours, "check") < 0.96 * divergence(kind, heads, "check")


@pytest.mark.parametrize(
    "make, size",
    [(large_scores, 2e4), *(pytest.param(make, size, marks=pytest.mark.slow) for make, size in _LARGE)],
)
def test_numbers_of_any_size_are_trained_in_their_units(tokenizer, make, size):
    kind, sizes, heads = fitted(tokenizer, make(size))
    ours = distilled(kind, sizes, heads, steps=60)
    assert divergence(kind, ours, "check") < 0.98 * divergence(kind, heads, "check")


def test_a_result_that_is_no_better_is_not_kept(fit, monkeypatch):
    kind, sizes, heads = fit
    monkeypatch.setattr(distillation, "_RATE", 30.0)
    assert distilled(kind, sizes, heads, steps=3) is heads or all(
        np.array_equal(np.array(x[name]), np.array(y[name]))
        for x, y in zip(heads, distilled(kind, sizes, heads, steps=3), strict=True)
        for name in x
    )


def test_a_step_has_as_many_conversations_as_the_memory_holds_the_scores_of(fit, set_device):
    kind, sizes, heads = fit
    work = work_of(kind, sizes, heads)
    longest = max(c.fed_tokens for c in (*work.training, *work.held_out))
    scores = kind.run.geometry.n_heads * longest * (longest + NODES)
    for held, expected in ((3.5, 3), (0.5, 1), (1000, 8)):
        set_device(distillation_scores=int(held * scores), distillation_batch=8)
        assert work_of(kind, sizes, heads).side_by_side == expected


def test_heads_that_are_not_trained_stay_as_they_are(fit, monkeypatch):
    kind, sizes, heads = fit
    monkeypatch.setattr(kind, "trained", lambda sizes: [i != 1 for i in range(len(sizes))])
    ours = distilled(kind, sizes, heads, steps=5)
    same = [all(np.array_equal(np.array(x[n]), np.array(y[n])) for n in x) for x, y in zip(heads, ours, strict=True)]
    assert same[1] and not all(same)


def test_an_interrupted_one_goes_on_to_the_same_bits(fit, tmp_path, monkeypatch):
    kind, sizes, heads = fit
    whole = distilled(kind, sizes, heads, steps=6)
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    kept = Checkpoint(tmp_path)
    gradient, calls = distillation._Distillation.gradient, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gradient(self, *arguments)

    monkeypatch.setattr(distillation._Distillation, "gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        distilled(kind, sizes, heads, steps=6, checkpoint=kept)
    again = distilled(kind, sizes, heads, steps=6, checkpoint=kept)
    assert len(calls) == 4 + 3
    for x, y in zip(whole, again, strict=True):
        assert all(np.array_equal(np.array(x[name]), np.array(y[name])) for name in x)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, True),
        ({"budget": 0.01}, False),
        ({"size": 100}, True),
        ({"budget": "auto"}, False),
        ({"kind": "mlp"}, False),
        ({"bits": 8}, False),
        ({"distillation_steps": 0}, False),
    ],
)
def test_small_files_of_nodes_are_distilled(tokenizer, options, expected):
    run = fit_run(toys.toy("llama"), tokenizer, **{"budget": 0.009, "distillation_steps": 5} | options)
    context = read(run, toys.random_tokens(60))
    assert run.distills(context) == expected
    assert not run.distills(replace(context, chunks=(30,)))
    assert not run.distills(replace(context, preamble=5))


def test_a_whole_fit_is_distilled(tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr(distillation._Distillation, "run", lambda self: told.append(1) or self.heads)
    for budget in (0.009, 0.05):
        run_config = FitConfig(**FAST | {"budget": budget, "distillation_steps": 2})
        toys.fit(toys.toy("llama"), tokenizer, TEXT, config=run_config)
    assert told == [1]
