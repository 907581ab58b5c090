"""Sampling and replaying in half precision, as on a GPU, against float32."""

import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.core.gather import take
from nectar_mlx.fitting import prefill
from nectar_mlx.fitting.samples import capture, sampling
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.fitting.samples.sample_store import DeviceSampleStore, SampleStore
from nectar_mlx.fitting.samples.study_cache import allow_half
from nectar_mlx.mlxlm import attention_patch
from tests import toys


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "gemma3_text"])
def test_half_precision_sees_what_float32_sees(set_device, architecture):
    """With sinks and sliding windows, too; and steps that are queued sample the same greedy answers."""
    model = toys.toy(architecture)
    geometry = attention_patch.route(model)
    context = prefill.read_text(model, toys.random_tokens(51), geometry)
    K, D = geometry.n_kv_heads, geometry.head_dim
    batch = [Conversation(toys.random_tokens(5 + i % 3, seed=i)) for i in range(4)]
    batch.sort(key=lambda c: len(c.prompt))
    set_device(half=True, linux_cpu=False, steps_ahead=8)
    allow_half(model, context)
    assert all(bank.half for bank in context.banks)
    sampling.sample_answers(
        model,
        context,
        batch,
        stop=set(),
        max_tokens=20,
        temperature=[1e-4] * 4,
        chances=sampling.chances(0, range(4), 20),
    )
    greedy = []
    for conversation in batch:
        tokens = context.prefix + conversation.prompt
        for token in conversation.answer:
            greedy.append(token == model(mx.array([tokens]))[0, -1].argmax().item())
            tokens = [*tokens, token]
    assert len(greedy) == 80 and np.mean(greedy) > 0.95  # ties may fall otherwise
    half = DeviceSampleStore(4000)
    capture.replay(model, context, batch, {"train": half}, n_heads=geometry.n_heads)
    set_device(half=False, linux_cpu=True)
    for bank in context.banks:
        bank.forget_half()
    plain = SampleStore(len(context.banks) * K, 4000, D, folder=None)
    capture.replay(model, context, batch, {"train": plain}, n_heads=geometry.n_heads)
    assert half.count == plain.count > 0 and half.not_finite == set()
    for layer in range(len(context.banks)):
        heads = range(layer * K, layer * K + K)
        for ours, theirs in zip(half.heads(heads), plain.heads(heads), strict=True):
            np.testing.assert_allclose(ours.astype(mx.float32), theirs, atol=0.04)


def test_scores_too_large_for_half_precision_keep_float32(set_device):
    model = toys.toy("llama")
    context = prefill.read_text(model, toys.random_tokens(40), attention_patch.route(model))
    set_device(half=True)
    allow_half(model, context)
    assert all(bank.half for bank in context.banks)
    context.banks[1].parameters["keys"] = 1e4 * context.banks[1].parameters["keys"]
    allow_half(model, context)
    assert [bank.half is not None for bank in context.banks] == [True, False, True]


def test_numbers_of_bfloat16_are_not_kept_twice(set_device):
    model = toys.toy("llama")
    bank = prefill.read_text(model, toys.random_tokens(43), attention_patch.route(model)).banks[0]
    before = {name: x.astype(mx.bfloat16) for name, x in bank.parameters.items()}
    bank.parameters = before
    bank.halve()
    for name, x in bank.parameters.items():
        assert x.dtype == mx.float16 and mx.array_equal(x.astype(mx.bfloat16), before[name])
    assert [x.shape[1] for x in bank.half[:2]] == [48, 48] and bank.half.known.item() == 43
    bank.forget_half()
    assert bank.half is None and bank.parameters["keys"].shape[1] == 43


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.int32, mx.bool_])
def test_rows_by_their_numbers(dtype):
    x, rows = (10 * mx.random.normal((3, 7, 4))).astype(dtype), mx.array([5, 1, 1])
    assert mx.array_equal(take(x[1], rows), mx.take(x[1], rows, axis=0))
    assert mx.array_equal(take(x, rows, axis=1), mx.take(x, rows, axis=1))
    assert mx.array_equal(take(x[:, :, 1], rows, axis=1), mx.take(x[:, :, 1], rows, axis=1))
