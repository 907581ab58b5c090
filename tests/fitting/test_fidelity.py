"""Divergences against plain numpy."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting import fidelity, prefill
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch
from tests import toys

PREFIX = toys.random_tokens(60)


def conversations(count=5):
    rng = np.random.default_rng(5)
    lengths = [(int(rng.integers(1, 20)), int(rng.integers(1, 15))) for _ in range(count)]
    return [
        Conversation(toys.random_tokens(p, seed=i), toys.random_tokens(a, seed=100 + i))
        for i, (p, a) in enumerate(lengths)
    ]


def plain(model, prefix, conversation):
    """log softmax of the answer tokens in float64, one conversation alone, without any cache."""
    tokens = [*prefix, *conversation.prompt, *conversation.answer]
    logits = np.array(model(mx.array([tokens]))[0], dtype=np.float64)
    first = len(prefix) + len(conversation.prompt) - 1
    rows = logits[first : first + len(conversation.answer)]
    rows = rows - rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("max_entries", [400, 1 << 24])
def test_divergence_equals_the_one_written_out(architecture, batch, max_entries, monkeypatch, set_device):
    monkeypatch.setattr(fidelity, "MAX_ENTRIES", max_entries)
    set_device(check_batch=batch)
    model = toys.toy(architecture)
    full, part = (prefill.read_text(model, p, attention_patch.route(model)) for p in (PREFIX, PREFIX[:5]))
    answered = conversations()
    divergence = fidelity.compare(model, full.make_cache, {"part": part.make_cache}, answered)["part"]
    for i, c in enumerate(answered):
        p, q = plain(model, PREFIX, c), plain(model, PREFIX[:5], c)
        mine = divergence.of([i])
        np.testing.assert_allclose(mine.kl, (np.exp(p) * (p - q)).sum(-1), atol=2e-4, rtol=2e-3)
        np.testing.assert_array_equal(mine.agree, p.argmax(-1) == q.argmax(-1))
        np.testing.assert_array_equal(mine.correct, q.argmax(-1) == np.array(c.answer))
        np.testing.assert_array_equal(mine.reference_correct, p.argmax(-1) == np.array(c.answer))
    assert divergence.kl.mean() > 0.01, "the two contexts must differ, or this test proves nothing"


def test_a_view_does_not_diverge_from_itself():
    model = toys.toy("llama")
    context = prefill.read_text(model, PREFIX, attention_patch.route(model))
    divergence = fidelity.compare(model, context.make_cache, {"same": context.make_cache}, conversations())["same"]
    assert np.abs(divergence.kl).max() < 1e-5 and divergence.agree.all()


def test_a_view_may_read_another_prompt():
    model = toys.toy("llama")
    geometry = attention_patch.route(model)
    full, head = (prefill.read_text(model, p, geometry) for p in (PREFIX, PREFIX[:7]))
    prompts = {"whole": lambda c: PREFIX[7:] + c.prompt, "head": None}
    views = {"whole": head.make_cache, "head": head.make_cache}
    divergence = fidelity.compare(model, full.make_cache, views, conversations(), prompts=prompts)
    assert divergence["whole"].kl.max() < 1e-3 < divergence["head"].kl.mean()


def test_log_probabilities_of_extreme_logits():
    logits = mx.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        np.array(fidelity.log_probabilities(logits)), [[0, -1e4, -2e4], [-np.log(3)] * 3], rtol=1e-5, atol=1e-6
    )
