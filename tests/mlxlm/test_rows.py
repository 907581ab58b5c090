"""Sequences behind several contexts in one batch answer as each alone, whatever joins and leaves."""

import copy
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import GenerationBatch, StopSequences, generate_step
from mlx_lm.sample_utils import greedy_sampler

from nectar_mlx.core import attention
from nectar_mlx.mlxlm.cache import NectarCache
from nectar_mlx.mlxlm.rows import RunBanks
from tests import toys

PREFIXES = [toys.random_tokens(n, seed=n) for n in (40, 23, 61)]
PROMPTS = [toys.random_tokens(n, seed=90 + n) for n in (5, 12, 3, 7, 9)]
FAMILIES = ("llama", "gemma3_text", "gpt_oss", "qwen3_next", "falcon_h1", "gemma3n", "gemma4", "deepseek_v3")


class Step(NamedTuple):
    token: int
    logprobs: mx.array


def alone(model, caches, prompt, count=8):
    steps = generate_step(mx.array(prompt), model, prompt_cache=caches, max_tokens=count)
    return [Step(int(token), logprobs) for token, logprobs in steps]


def check(found, expected):
    assert [step.token for step in found] == [step.token for step in expected]
    for step, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(step.logprobs), np.array(other.logprobs), atol=2e-3)


def batch_of(model, *sequences):
    """Caches and prompts, which are read but for their last tokens, as one batch."""
    for caches, prompt in sequences:
        model(mx.array([prompt[:-1]]), cache=caches)
    prompts = [prompt for _, prompt in sequences]
    return GenerationBatch(
        model=model,
        uids=list(range(len(prompts))),
        inputs=mx.array([prompt[-1] for prompt in prompts]),
        prompt_cache=[layer[0].merge(layer) for layer in zip(*(caches for caches, _ in sequences), strict=True)],
        tokens=[prompt[:-1] for prompt in prompts],
        samplers=[greedy_sampler for _ in prompts],
        fallback_sampler=greedy_sampler,
        logits_processors=[[] for _ in prompts],
        stop_sequences=[StopSequences() for _ in prompts],
        max_tokens=[1000 for _ in prompts],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_several_contexts_in_one_batch(family):
    model = toys.toy(family)
    nectars = [toys.picked(model, prefix, 12) for prefix in PREFIXES]
    places = [0, 1, 0, 2, 1]  # whose context each prompt is about
    expected = [alone(model, nectars[at].make_cache(), prompt) for at, prompt in zip(places, PROMPTS, strict=True)]
    other = alone(model, nectars[2].make_cache(), PROMPTS[0], 1)
    assert mx.abs(other[0].logprobs - expected[0][0].logprobs).max() > 0.05, "the context must matter"
    found: list[list[Step]] = [[] for _ in PROMPTS]

    def of(*numbers):
        return batch_of(model, *((nectars[places[i]].make_cache(), PROMPTS[i]) for i in numbers))

    def step(batch, order):
        for i, response in zip(order, batch.next(), strict=True):
            found[i].append(Step(response.token, response.logprobs))

    batch = of(0)
    step(batch, [0])
    batch.extend(of(1, 2))
    batch.extend(of(3))
    step(batch, [0, 1, 2, 3])
    step(batch, [0, 1, 2, 3])
    batch.filter([3, 2, 0])  # one leaves, and the others change places
    step(batch, [3, 2, 0])
    batch.extend(of(4))
    step(batch, [3, 2, 0, 4])
    for steps, whole in zip(found, expected, strict=True):
        check(steps, whole[: len(steps)])
    # What comes out of the batch is each conversation's own, and goes on.
    for at, i in enumerate([3, 2, 0, 4]):
        count = len(found[i])
        rest = alone(model, batch.extract_cache(at), [expected[i][count].token], 2)
        check(rest, expected[i][count + 1 : count + 3])


def test_neighbours_of_one_context_are_evaluated_together(monkeypatch):
    model = toys.toy("llama")
    caches = [toys.picked(model, prefix, 12).make_cache()[0] for prefix in PREFIXES[:2]]
    banks = [cache.bank for cache in caches]
    batch = NectarCache.merge([copy.deepcopy(caches[i]) for i in (0, 0, 1, 1, 0)])
    assert isinstance(batch.bank, RunBanks)
    queries = mx.random.normal((5, 4, 1, banks[0].head_dim))
    found = batch.over_context(queries)
    expected = attention.join([banks[i].over(queries[n : n + 1]) for n, i in enumerate((0, 0, 1, 1, 0))], axis=0)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), atol=1e-5, rtol=1e-5)
    called = []
    real = type(banks[0]).over
    monkeypatch.setattr(type(banks[0]), "over", lambda bank, q: called.append(q.shape[0]) or real(bank, q))
    batch.over_context(queries)
    assert called == [2, 2, 1]
    batch.filter([4, 1])
    assert batch.bank is banks[0] and batch.context == len(PREFIXES[0]), "one context is left"


class Kernel:
    """A stand-in for the decode kernel with its contract."""

    def __init__(self, bank, right=True):
        self.bank, self.right, self.called = bank, right, []

    def attend(self, queries, keys, values, *, live, left_padding):
        if not self.right:
            return None
        self.called.append(queries.shape)
        mask = mx.arange(live) >= left_padding[:, None, None, None]
        cut = keys[..., :live, :], values[..., :live, :]
        part = attention.causal(queries, *cut, scale=self.bank.scale, mask=mask, offset=self.bank.offset)
        return attention.merge(self.bank.over(queries), part).output


@pytest.mark.parametrize("right", [True, False])
def test_each_context_has_its_kernel(right):
    """Where one of them has none for a step, plain operations take all of it."""
    model = toys.toy("llama")
    banks = [toys.picked(model, prefix, 12).make_cache()[0].bank for prefix in PREFIXES[:2]]
    kernels = [Kernel(banks[0]), Kernel(banks[1], right)]

    def filled(at, kernel):
        cache, key = NectarCache(banks[at], len(PREFIXES[at]), kernel=kernel), mx.random.key(at)
        cache.update_and_fetch(*(mx.random.normal((1, 2, 3 + at, banks[0].head_dim), key=key) for _ in range(2)))
        return cache

    queries, new = (mx.random.normal((3, heads, 1, banks[0].head_dim)) for heads in (4, 2))
    outputs = []
    for of_banks in (kernels, [None, None]):
        batch = NectarCache.merge([filled(at, of_banks[at]) for at in (0, 0, 1)])
        mask = batch.make_mask(1)
        keys, values = batch.update_and_fetch(new, new)
        outputs.append(batch.attend(queries, keys, values, scale=banks[0].scale, mask=mask))
    np.testing.assert_allclose(*map(np.array, outputs), atol=1e-5, rtol=1e-5)
    assert [kernel.called for kernel in kernels] == [[(2, 4, 1, 16)], [(1, 4, 1, 16)] if right else []]
