"""Behind a context every way into mlx-lm gives the tokens of the single-sequence path; the cache keeps its protocol."""

import copy
import importlib

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import (
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from nectar_mlx import NectarError, kernels
from nectar_mlx.core import attention
from nectar_mlx.mlxlm.cache import NectarCache
from nectar_mlx.store import load
from tests import toys

CONTEXT = toys.random_tokens(70)
PROMPTS = [toys.random_tokens(n, seed=n) for n in (9, 1, 23, 4, 14, 2, 30, 11)]
TOKENS = 12
KINDS = ["exact", "picked"]


def setup(architecture, kind="exact", **arguments):
    model = toys.toy(architecture, **arguments)
    nectar = toys.exact(model, CONTEXT) if kind == "exact" else toys.picked(model, CONTEXT, 14)
    return model, nectar


def greedy(model, cache, prompt, tokens=TOKENS):
    """The oracle: one token at a time through the model, nothing of mlx-lm's loops."""
    logits = model(mx.array([prompt]), cache=cache)[0, -1]
    out = [int(logits.argmax())]
    while len(out) < tokens:
        out.append(int(model(mx.array([[out[-1]]]), cache=cache)[0, -1].argmax()))
    return out


def steps(model, prompt, tokens=TOKENS, **options):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens, **options)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", sorted(toys.ARCHITECTURES))
def test_generate_and_batches_on_every_architecture(architecture, kind):
    model, nectar = setup(architecture, kind)
    expected = [greedy(model, nectar.make_cache(), p) for p in PROMPTS[:4]]
    if kind == "exact":
        stock = [greedy(model, make_prompt_cache(model), CONTEXT + p) for p in PROMPTS[:4]]
        assert expected == stock
    assert steps(model, PROMPTS[0], prompt_cache=nectar.make_cache()) == expected[0]
    with nectar.attach(model):
        assert steps(model, PROMPTS[0]) == expected[0]
        assert batch(model, PROMPTS[:4]) == expected
    assert type(make_prompt_cache(model)[-1]) is KVCache


def batch(model, prompts, **options):
    generator = BatchGenerator(model, max_tokens=TOKENS, **options)
    found = {uid: [] for uid in generator.insert([list(p) for p in prompts])}
    while responses := generator.next_generated():
        for r in responses:
            found[r.uid].append(r.token)
    generator.close()
    return list(found.values())


@pytest.mark.parametrize(
    "options", [{}, {"prefill_step_size": 4}, {"completion_batch_size": 3, "prefill_batch_size": 2}]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_ragged_batches(architecture, options):
    """Sequences enter and leave the batch: merge, prepare, finalize, extend, filter, extract."""
    model, nectar = setup(architecture, "picked")
    expected = [greedy(model, nectar.make_cache(), p) for p in PROMPTS]
    with nectar.attach(model):
        assert batch(model, PROMPTS, **options) == expected


def test_batch_generate_with_caches_that_continue():
    model, nectar = setup("qwen3", "picked")
    tokenizer = toys.tokenizer()
    tokenizer.eos_token_ids = []
    caches = [nectar.make_cache() for _ in PROMPTS]
    first = batch_generate(
        model, tokenizer, PROMPTS, prompt_caches=caches, max_tokens=5, return_prompt_caches=True, return_token_ids=True
    )
    alone = [nectar.make_cache() for _ in PROMPTS]
    assert first.token_ids == [greedy(model, c, p, 5) for c, p in zip(alone, PROMPTS, strict=True)]
    kept = [first.caches[i] for i in range(len(PROMPTS))]
    assert all(type(layer) is NectarCache for cache in kept for layer in cache)
    follow = [[ids[-1], 17, 18] for ids in first.token_ids]
    for cache, prompt, other in zip(kept, follow, alone, strict=True):
        held = cache[0].size()
        trim_prompt_cache(cache, held - min(held, other[0].size()))
        assert cache[0].size() == other[0].size()
        assert greedy(model, cache, prompt, 4) == greedy(model, other, prompt, 4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("step", [1, 3, 7, 2048])
def test_chunked_prefill_of_a_long_question(architecture, step):
    model, nectar = setup(architecture)
    prompt = toys.random_tokens(61, seed=9)
    stock = steps(model, CONTEXT + prompt, prompt_cache=make_prompt_cache(model))
    assert steps(model, prompt, prompt_cache=nectar.make_cache(), prefill_step_size=step) == stock


@pytest.mark.parametrize("draft_tokens", [1, 2, 5])
def test_speculative_decoding(draft_tokens):
    """The draft's context is its own file, and what it proposes in vain is trimmed from both."""
    model, nectar = setup("llama", "picked")
    draft = toys.toy("llama", num_hidden_layers=1)
    draft.update({"model": {"layers": [model.model.layers[0].parameters()]}})
    for draft_cache in (toys.exact(draft, CONTEXT).make_cache(), make_prompt_cache(draft)):
        cache = nectar.make_cache() + draft_cache
        found = speculative_generate_step(
            mx.array(PROMPTS[0]), model, draft, num_draft_tokens=draft_tokens, max_tokens=TOKENS, prompt_cache=cache
        )
        tokens = [token for token, *_ in found]
        assert [int(t) for t in tokens] == greedy(model, nectar.make_cache(), PROMPTS[0])


def test_turns_with_trimming_equal_a_fresh_start():
    model, nectar = setup("qwen2", "picked")
    cache = nectar.make_cache()
    greedy(model, cache, PROMPTS[2])
    for keep in (20, 5, 0):
        trim_prompt_cache(cache, cache[0].size() - keep)
        assert cache[0].offset == len(CONTEXT) + keep
        rest = PROMPTS[2][keep:] + PROMPTS[3]
        assert greedy(model, cache, rest) == greedy(model, nectar.make_cache(), PROMPTS[2] + PROMPTS[3])


def test_trimming_never_reaches_the_context():
    model, nectar = setup("llama")
    cache = nectar.make_cache()
    model(mx.array([PROMPTS[0]]), cache=cache)
    assert [c.trim(10_000) for c in cache] == [len(PROMPTS[0])] * toys.LAYERS
    assert [c.offset for c in cache] == [len(CONTEXT)] * toys.LAYERS
    assert greedy(model, cache, PROMPTS[1]) == greedy(model, nectar.make_cache(), PROMPTS[1])


@pytest.mark.parametrize("architecture, trimmable", [("llama", True), ("gemma3_text", False)])
def test_protocol(architecture, trimmable):
    model, nectar = setup(architecture, "picked")
    caches = nectar.make_cache()
    assert all(bool(c) for c in caches), "mlx-lm takes a falsy cache for an absent one"
    assert not any(hasattr(c, name) for c in caches for name in ("bits", "to_quantized"))
    assert [c.offset for c in caches] == [len(CONTEXT)] * toys.LAYERS
    fitted = [c for c in caches if isinstance(c, NectarCache)]
    assert all(c.nbytes == 0 and c.empty() and c.size() == 0 for c in fitted)
    mx.eval([c.state for c in caches])
    model(mx.array([PROMPTS[0]]), cache=caches)
    assert [c.offset for c in caches] == [len(CONTEXT) + len(PROMPTS[0])] * toys.LAYERS
    assert all(c.size() == len(PROMPTS[0]) and not c.empty() for c in fitted)
    one = 2 * 256 * 2 * 16 * 4  # mlx-lm allocates 256 tokens: keys and values, 2 heads, 16 numbers, float32
    assert [c.nbytes for c in fitted] == [one] * len(fitted)
    assert can_trim_prompt_cache(caches) is trimmable


def test_masks_are_those_of_the_live_tokens():
    _, nectar = setup("llama")
    cache = nectar.make_cache()[0]
    h = mx.zeros((1, 5, 8))
    assert create_attention_mask(h, cache) == "causal"
    assert create_attention_mask(h, cache, None, True).shape == (5, 5)
    assert create_attention_mask(h[:, :1], cache) is None


def test_state_can_be_put_back():
    model, nectar = setup("llama")
    cache, other = nectar.make_cache(), nectar.make_cache()
    model(mx.array([PROMPTS[0]]), cache=cache)
    for a, b in zip(cache, other, strict=True):
        b.state = a.state
    assert greedy(model, other, [5]) == greedy(model, cache, [5])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_copies_share_the_context_and_nothing_else(architecture):
    model, nectar = setup(architecture, "picked")
    cache = nectar.make_cache()
    model(mx.array([PROMPTS[0]]), cache=cache)
    copied = copy.deepcopy(cache)
    for a, b in zip(cache, copied, strict=True):
        if isinstance(a, NectarCache):
            assert a.bank is b.bank and a.live is not b.live
    expected = greedy(model, copy.deepcopy(cache), PROMPTS[1])
    greedy(model, copied, PROMPTS[3])
    assert greedy(model, cache, PROMPTS[1]) == expected


def test_making_caches_costs_no_memory():
    _, nectar = setup("gemma3_text", "picked")
    mx.eval(nectar.tensors)
    before = mx.get_active_memory()
    caches = [nectar.make_cache() for _ in range(100)]
    mx.eval([c.state for cache in caches for c in cache])
    assert mx.get_active_memory() - before < 10_000


def test_sequences_that_advance_in_step_need_no_batch_cache():
    """Evaluation runs several sequences of one length through the single-sequence class."""
    for architecture in ("llama", "gemma3_text"):
        model, nectar = setup(architecture)
        tokens = mx.array([toys.random_tokens(20, seed=s) for s in range(3)])
        together = model(tokens, cache=nectar.make_cache())
        alone = mx.concatenate([model(t[None], cache=nectar.make_cache()) for t in tokens])
        np.testing.assert_allclose(np.array(together), np.array(alone), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("bits, tolerance", [(8, 0.05), (4, 0.6)])
def test_quantized_live_cache(architecture, bits, tolerance):
    model, nectar = setup(architecture, head_dim=32, query_pre_attn_scalar=32)
    tokens = mx.array([toys.random_tokens(50, seed=3)])
    exact = model(tokens, cache=nectar.make_cache())
    cache = nectar.make_cache(kv_bits=bits)
    found = model(tokens, cache=cache)
    size = float(mx.abs(exact).mean())
    assert 0 < float(mx.abs(found - exact).mean()) < tolerance * size
    assert cache[-1].nbytes < {8: 0.35, 4: 0.2}[bits] * 2 * 256 * 2 * 32 * 4
    trimmed = cache[-1].trim(10)
    assert trimmed == 10 and cache[-1].size() == 40
    if architecture == "llama":
        with pytest.raises(NectarError, match="quantized"):
            NectarCache.merge([cache[-1]])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_kv_bits_of_mlx_lm_does_not_drop_the_context(architecture):
    model, nectar = setup(architecture)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    with nectar.attach(model):
        assert steps(model, PROMPTS[0], **options) == greedy(model, nectar.make_cache(), PROMPTS[0])


def test_the_commands_of_mlx_lm_run_behind_a_context(monkeypatch, capsys):
    """Nothing is changed but the model that they load."""
    model, nectar = setup("llama")
    tokenizer = toys.tokenizer()
    expected = mlx_lm.generate(model, tokenizer, "the fox", max_tokens=8, prompt_cache=nectar.make_cache())
    module = importlib.import_module("mlx_lm.generate")
    monkeypatch.setattr(module, "load", lambda *a, **k: (model, tokenizer, {}))
    argv = ["mlx_lm.generate", "--model", "toy", "--prompt", "the fox", "--max-tokens", "8", "--ignore-chat-template"]
    monkeypatch.setattr("sys.argv", argv)
    with nectar.attach(model):
        module.main()
    assert expected in capsys.readouterr().out


def test_attach_nests_and_restores():
    model, nectar = setup("llama")
    other = toys.exact(model, CONTEXT[:20])
    with nectar.attach(model):
        with other.attach(model):
            assert make_prompt_cache(model)[0].offset == 20
        assert make_prompt_cache(model)[0].offset == len(CONTEXT)
        with pytest.raises(RuntimeError), other.attach(model):
            raise RuntimeError
        assert make_prompt_cache(model)[0].offset == len(CONTEXT)
    assert make_prompt_cache(model)[0].offset == 0


def test_attend_against_the_algebra_in_float64():
    """One layer, no model: context and live tokens are one softmax."""
    rng = np.random.default_rng(0)
    n, live, heads, kv, dim = 11, 6, 6, 2, 8
    q = rng.normal(size=(2, heads, 3, dim))
    context_k, context_v = (rng.normal(size=(kv, n, dim)) for _ in range(2))
    live_k, live_v = (rng.normal(size=(2, kv, live, dim)) for _ in range(2))
    from nectar_mlx.heads import Exact

    def f32(x):
        return mx.array(x.astype(np.float32))

    pairs = [{"keys": f32(k), "values": f32(v)} for k, v in zip(context_k, context_v, strict=True)]
    cache = NectarCache(Exact.stack(pairs, scale=0.3), n)
    found = cache.attend(f32(q), f32(live_k), f32(live_v), scale=0.3, mask="causal")
    for b, h, t in np.ndindex(2, heads, 3):
        g = h // (heads // kv)
        keys = np.concatenate([context_k[g], live_k[b, g, : live - 2 + t]])
        values = np.concatenate([context_v[g], live_v[b, g, : live - 2 + t]])
        weights = np.exp(0.3 * keys @ q[b, h, t])
        np.testing.assert_allclose(np.array(found[b, h, t]), weights @ values / weights.sum(), atol=1e-5)
    assert isinstance(cache.over_context(f32(q)), attention.Partial)


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for the decode kernel with its contract; returns the shapes [B, H, T, D] it was called with."""
    called = []

    class Kernel:
        def __init__(self, bank):
            self.bank = bank

        def attend(self, queries, keys, values, *, live, left_padding=None):
            bank = self.bank
            if queries.shape[2] > kernels.MAX_LENGTH:
                return None
            called.append(queries.shape)
            keys, values = keys[..., :live, :], values[..., :live, :]
            T, S = queries.shape[2], keys.shape[2]
            mask = (mx.arange(S - T, S)[:, None] >= mx.arange(S))[None, None]
            if left_padding is not None:
                mask = mask & (mx.arange(S) >= left_padding[:, None, None, None])
            live = attention.causal(queries, keys, values, scale=bank.scale, mask=mask, offset=bank.offset)
            return attention.merge(NectarCache(bank, 0).over_context(queries), live).output

    monkeypatch.setattr(load, "decode_kernels", lambda banks, *_: [Kernel(bank) for bank in banks])
    return called


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_decode_kernel_takes_the_short_steps_of_every_path(architecture, kernel, monkeypatch):
    model, nectar = setup(architecture, "picked")
    with nectar.attach(model):
        found = batch(model, PROMPTS, prefill_step_size=4)
        alone = steps(model, PROMPTS[0])
    assert {shape[0] for shape in kernel} > {1, len(PROMPTS)}
    assert {shape[2] for shape in kernel} >= {1, 4}
    assert copy.deepcopy(nectar.make_cache()[-1]).kernel.bank is nectar.banks[-1]
    monkeypatch.setattr(load, "decode_kernels", lambda *_: None)
    _, nectar = setup(architecture, "picked")
    expected = [greedy(model, nectar.make_cache(), p) for p in PROMPTS]
    assert found == expected and alone == expected[0]


def test_heads_that_the_kernel_cannot_take_are_answered_without_it(monkeypatch):
    """Kernels that compute something else are refused when they are first used: tests/kernels/test_checking.py."""

    def pack(*args, **options):
        raise NectarError("no kernel for this")

    model, nectar = setup("llama", "picked")
    expected = greedy(model, nectar.make_cache(), PROMPTS[0])
    _, nectar = setup("llama", "picked")
    monkeypatch.setenv("NECTAR_KERNEL", "metal")
    monkeypatch.setattr(kernels, "pack", pack)
    with pytest.warns(UserWarning, match="no kernel for this"):
        caches = nectar.make_cache()
    assert all(cache.kernel is None for cache in caches if isinstance(cache, NectarCache))
    assert greedy(model, caches, PROMPTS[0]) == expected


def test_sinks_are_no_work_for_the_kernel(kernel):
    model, nectar = setup("gpt_oss", "picked")
    greedy(model, nectar.make_cache(), PROMPTS[0])
    assert not kernel
