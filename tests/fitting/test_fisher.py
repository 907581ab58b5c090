"""The Fisher information predicts what small errors of a head cost, in nats."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting import fidelity, fisher, prefill
from nectar_mlx.fitting.samples import sampling
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch, prompts
from tests import toys


@pytest.fixture(scope="module")
def answered():
    model, tokenizer = toys.toy("llama"), toys.tokenizer()
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, prompts.prefix(tokenizer, "one two three four five six seven " * 4), geometry)
    conversations = [Conversation(prompts.prompt(tokenizer, f"tell me {i} " + "more " * (i % 3))) for i in range(96)]
    conversations.sort(key=lambda c: len(c.prompt))
    sampling.sample_answers(
        model,
        context,
        conversations,
        stop=set(),
        max_tokens=12,
        temperature=1.0,
        chances=sampling.chances(0, range(96), 12),
    )
    return model, geometry, context, conversations


@pytest.mark.parametrize("layer", [0, 2])
def test_a_small_error_costs_what_the_information_says(answered, layer):
    model, geometry, context, conversations = answered
    metric = fisher.metric(model, context, conversations, geometry=geometry)
    K, D, G = geometry.n_kv_heads, geometry.head_dim, geometry.n_heads // geometry.n_kv_heads
    assert metric.shape == (len(context.banks) * K, D, D)
    head = 1
    rng = np.random.default_rng(0)
    size, measured, tokens = 0.02, 0.0, 0
    truth = fidelity.answer_logits(model, context.make_cache(), conversations)
    for _ in range(4):
        longest = max(len(c.prompt) + len(c.answer) for c in conversations)
        noise = np.zeros((len(conversations), geometry.n_heads, longest, D), np.float32)
        noise[:, head * G : head * G + G] = size * rng.standard_normal((len(conversations), G, longest, D))
        caches = [fisher.ProbedCache(c.bank, c.context) for c in context.make_cache()]
        for i, cache in enumerate(caches):
            cache.probe = mx.array(noise * (i == layer))
            cache.attend = _in_pieces(cache)
        ours = fidelity.answer_logits(model, caches, conversations)
        for p, q in zip(truth, ours, strict=True):
            p, q = fidelity.log_probabilities(p), fidelity.log_probabilities(q)
            measured += float((mx.exp(p) * (p - q)).sum())
    tokens = sum(len(c.prompt) + len(c.answer) - 1 for c in conversations) * G * 4
    predicted = size**2 * float(mx.diagonal(metric[layer * K + head]).sum()) * tokens
    assert measured == pytest.approx(predicted, rel=0.25)


def _in_pieces(cache):
    """`attend` with the part of the probe that belongs to the tokens it is given."""
    whole, attend, at = cache.probe, cache.attend, 0

    def piecewise(queries, *rest, **options):
        nonlocal at
        cache.probe = whole[:, :, at : at + queries.shape[2]]
        at += queries.shape[2]
        return attend(queries, *rest, **options)

    return piecewise
