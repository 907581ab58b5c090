"""Model families beside those of `toys.ARCHITECTURES`: exact heads in our caches equal mlx-lm's own caches, and what
cannot be proven is refused with the reason."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache

from nectar_mlx import Nectar, NectarError
from nectar_mlx.mlxlm import attention_patch
from nectar_mlx.mlxlm.geometry import Geometry
from nectar_mlx.mlxlm.kept import State, widened
from tests import families, toys
from tests.more_families import MORE, SHAPES

PREFIX, TURN = toys.random_tokens(40), toys.random_tokens(12, seed=1)
MIXED = ("qwen3_next", "falcon_h1", "nemotron_h", "plamo2", "gemma3n", "gemma4", "deepseek_v3", "mistral4", "olmo3")


def greedy(model, caches, prompt, count=4):
    steps = generate_step(mx.array(prompt), model, prompt_cache=caches, max_tokens=count)
    return [int(token) for token, _ in steps]


def continued(model, caches, pieces):
    return np.array(mx.concatenate([model(mx.array([piece]), cache=caches)[0] for piece in pieces]))


@pytest.mark.parametrize(
    "family", [*sorted(families.FAMILIES), *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]
)
def test_exact_heads_answer_as_the_stock_model(family):
    assert_exact(toys.toy(family))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_published_models_seldom_have(shape):
    family, arguments = SHAPES[shape]
    assert_exact(toys.toy(family, **arguments))


def assert_exact(model):
    caches = make_prompt_cache(model)
    model(mx.array([PREFIX]), cache=caches)
    pieces = [TURN[:1], TURN[1:8], TURN[8:9], TURN[9:]]
    expected = continued(model, copy.deepcopy(caches), pieces)
    nectar = toys.exact(model, PREFIX)
    np.testing.assert_allclose(continued(model, nectar.make_cache(), pieces), expected, atol=2e-4, rtol=2e-4)
    without = continued(model, make_prompt_cache(model), pieces)
    assert np.abs(without - expected).max() > 0.02, "the context must matter, or this test proves nothing"
    assert greedy(model, nectar.make_cache(), TURN) == greedy(model, caches, TURN)
    assert Geometry.from_dict(nectar.geometry.to_dict()) == nectar.geometry


@pytest.mark.parametrize("family", MIXED)
def test_a_file_gives_back_what_layers_keep(family, tmp_path):
    model = toys.toy(family)
    nectar = toys.picked(model, PREFIX, 12)
    nectar.save(tmp_path / "toy.nectar")
    loaded = Nectar.load(tmp_path / "toy.nectar", model)
    assert loaded.nbytes == nectar.nbytes and loaded.geometry == nectar.geometry
    logits = [model(mx.array([TURN]), cache=n.make_cache()) for n in (nectar, loaded)]
    assert mx.array_equal(*logits)


@pytest.mark.parametrize("family", MIXED)
def test_a_batch_of_ragged_prompts_answers_as_each_alone(family):
    model, tokenizer = toys.toy(family), toys.tokenizer()
    nectar = toys.exact(model, PREFIX)
    prompts = [TURN[:3], TURN, TURN[:7]]
    with nectar.attach(model):
        found = batch_generate(model, tokenizer, prompts, max_tokens=5, return_prompt_caches=True)
    expected = [greedy(model, nectar.make_cache(), prompt, 5) for prompt in prompts]
    assert found.texts == [tokenizer.decode(tokens) for tokens in expected]
    # What comes out of the batch is each conversation's own.
    alone = nectar.make_cache()
    greedy(model, alone, prompts[1], 5)
    assert greedy(model, found.caches[1], [9]) == greedy(model, alone, [9])


@pytest.mark.parametrize("family", MIXED)
def test_sequences_that_advance_in_step(family):
    model = toys.toy(family)
    nectar = toys.exact(model, PREFIX)
    tokens = mx.array([TURN, TURN[::-1]])
    together = model(tokens, cache=widened(nectar.make_cache(), 2))
    alone = mx.concatenate([model(row[None], cache=nectar.make_cache()) for row in tokens])
    np.testing.assert_allclose(np.array(together), np.array(alone), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", MIXED)
def test_conversations_start_from_states_of_their_own(family):
    model = toys.toy(family)
    nectar = toys.exact(model, PREFIX)
    first = nectar.make_cache()
    copied = copy.deepcopy(first)
    expected = greedy(model, first, TURN)
    greedy(model, copied, TURN[::-1])
    assert greedy(model, nectar.make_cache(), TURN) == expected
    assert greedy(model, copy.deepcopy(first), [7]) == greedy(model, first, [7])


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "lfm2"])
def test_what_cannot_be_trimmed_is_refused_or_read_again(family):
    model = toys.toy(family)
    nectar = toys.exact(model, PREFIX)
    caches = nectar.make_cache()
    assert not can_trim_prompt_cache(caches)
    with pytest.raises(ValueError, match="trimmable"):
        list(speculative_generate_step(mx.array(TURN), model, model, prompt_cache=caches * 2, max_tokens=3))
    kept = LRUPromptCache()
    model(mx.array([TURN]), cache=caches)
    kept.insert_cache("toy", TURN, caches)
    # A prompt that goes on from there is taken up; one that turns off earlier is not.
    taken, rest = kept.fetch_nearest_cache("toy", [*TURN, 5])
    assert rest == [5]
    assert greedy(model, taken, rest) == greedy(model, nectar.make_cache(), [*TURN, 5])
    assert kept.fetch_nearest_cache("toy", [*TURN[:6], 5]) == (None, [*TURN[:6], 5])


@pytest.mark.parametrize("family", ["deepseek_v3", "mistral4"])
def test_latent_layers_can_be_trimmed(family):
    model = toys.toy(family)
    nectar = toys.exact(model, PREFIX)
    caches = nectar.make_cache()
    expected = greedy(model, nectar.make_cache(), TURN)
    model(mx.array([[*TURN[:-1], 3, 4, 5]]), cache=caches)
    assert can_trim_prompt_cache(caches)
    assert [cache.trim(3) for cache in caches] == [3] * len(caches)
    assert greedy(model, caches, TURN[-1:]) == expected


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_shared_keys_with_quantized_live_tokens(family):
    model = toys.toy(family, text_config=families.SHARED[family]["text_config"] | {"head_dim": 32})
    nectar = toys.exact(model, PREFIX)
    plain, quantized = (model(mx.array([TURN]), cache=nectar.make_cache(kv_bits=bits)) for bits in (None, 8))
    assert 0 < float(mx.abs(plain - quantized).mean()) < 0.05 * float(mx.abs(plain).mean())


def test_states_of_a_file_of_another_shape_are_damage(tmp_path):
    model = toys.toy("qwen3_next")
    nectar = toys.picked(model, PREFIX, 12)
    nectar.tensors["windows.0.state.1"] = nectar.tensors["windows.0.state.1"][:, :-1]
    nectar.save(tmp_path / "toy.nectar")
    with pytest.raises(NectarError, match="damaged"):
        Nectar.load(tmp_path / "toy.nectar", model)


def test_what_a_hybrid_keeps():
    nectar = toys.exact(toys.toy("qwen3_next"), PREFIX)
    assert nectar.geometry.fitted == (1,)
    assert [type(kept) for _, kept in sorted(nectar.windows.items())] == [State, State]
    assert nectar.geometry.cache_bytes(1000) == 1000 * 2 * 2 * 2 * 16, "one layer's keys and values"


REFUSED = {
    "deepseek_v32": (
        families.LATENT["glm4_moe_lite"] | {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16},
        "CacheList of KVCache, KVCache",
    ),
    "llama4": (
        {
            "text_config": {"model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 64}
            | {"head_dim": 16, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64, "num_experts_per_tok": 1}
            | {"num_local_experts": 2, "rope_scaling": None, "use_qk_norm": True}
        },
        "ChunkedKVCache",
    ),
    "openelm": (
        {"head_dim": 16, "num_transformer_layers": 3, "model_dim": 64, "ffn_dim_divisor": 16}
        | {"num_query_heads": [4, 4, 6], "num_kv_heads": [2, 2, 3], "ffn_multipliers": [1.0, 1.0, 1.0]},
        "full attention differ",
    ),
    "afm7": (
        {"hidden_dim": 64, "num_layers": 3, "num_kv_reuse_layers": 1, "num_heads": 4, "num_kv_heads": 2},
        "does not work with our caches",
    ),
    "iquestloopcoder": ({"head_dim": 16, "loop_window_size": 9}, "output is not its own"),
    "plamo": ({"n_shared_head": 2}, "keeps 2 heads of keys, but attends to 4"),
    "gemma2": ({"head_dim": 16}, "caps its attention scores"),
    "mamba2": (
        {"num_heads": 4, "head_dim": 16, "state_size": 16, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1}
        | {"use_bias": False, "use_conv_bias": True, "time_step_limit": (0.0, 9.0), "time_step_rank": 4},
        "nothing to fit",
    ),
    "mistral3": (
        {"text_config": families.WINDOWED["ministral3"] | {"model_type": "ministral3"}},
        "all keys of the text",
    ),
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_cannot_be_proven_is_refused_with_the_reason(family, monkeypatch):
    arguments, reason = REFUSED[family]
    monkeypatch.setitem(toys.FAMILIES, family, arguments)
    with pytest.raises(NectarError, match=f"{family} models are not supported: .*{reason}"):
        attention_patch.route(toys.toy(family))


def test_a_model_that_looks_at_its_cache_is_refused(monkeypatch):
    """The attention call is reached and its result is right, but something else depends on the context's keys."""
    from mlx_lm.models import llama

    stock = llama.Attention.__call__

    def call(self, x, mask=None, cache=None):
        output = stock(self, x, mask, cache)
        return output + 0.3 * cache.keys_and_values()[0].mean() if cache is not None else output

    model = toys.toy("llama")
    monkeypatch.setattr(llama.Attention, "__call__", call)
    with pytest.raises(NectarError, match=r"llama models are not supported: .*output is not its own"):
        attention_patch.route(model)
