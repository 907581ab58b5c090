"""More model types, and hostile shapes of common ones; arguments as in `families`."""

from tests.families import _DELTA, _GEMMA3N, _KIMI, _LATENT, _ROUTED, _YARN, FULL, HYBRID, SLIDING, Arguments

_LAYERS = [SLIDING, FULL, SLIDING]
_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128, "layer_norm_epsilon": 1e-5}
_PARTS = {kind: {"rope_theta": 10_000.0, "rope_type": "default"} for kind in (FULL, SLIDING)}
_WINDOWS = {"head_dim": 16, "sliding_window": 9, "layer_types": _LAYERS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_BAILING = (
    _EXPERTS
    | _LATENT
    | {"num_shared_experts": 1, "first_k_dense_replace": 1, "layer_group_size": 3, "group_norm_size": 2}
    | {"head_dim": 16, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
)

MORE: dict[str, Arguments] = {
    "afmoe": _WINDOWS | _EXPERTS | {"num_dense_layers": 1},
    "bailing_hybrid": _BAILING,
    "bailing_moe_linear": _BAILING,
    "bailing_moe_v3": _BAILING | {"moe_shared_expert_intermediate_size": 32},
    "dbrx": {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
    },
    "deepseek": _ROUTED,
    "exaone": {"num_layers": 3, "layer_norm_epsilon": 1e-5},
    "exaone_moe": _WINDOWS | _EXPERTS | {"num_shared_experts": 1, "is_moe_layer": [False, True, True]},
    "gpt2": _GPT | {"n_ctx": 128},
    "gpt_bigcode": _GPT | {"n_inner": 96},
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10_000, "rotary_pct": 0.25},
    "gptj": _GPT | {"rotary_dim": 8},
    "kimi_k25": {"text_config": _ROUTED | _LATENT | {"model_type": "deepseek_v3", "rope_scaling": _YARN}},
    "kimi_k3": {
        "text_config": _KIMI
        | _LATENT
        | {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4}
        | {"vocab_size": 320, "mla_use_output_gate": True}
    },
    "kimi_vl": {"text_config": _ROUTED | _LATENT | {"model_type": "deepseek_v3"}},
    "laguna": _WINDOWS
    | _EXPERTS
    | {"shared_expert_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    | {"rope_parameters": _PARTS},
    "lfm2-vl": {"text_config": HYBRID["lfm2"] | {"model_type": "lfm2"}},
    "lille-130m": {"n_embd": 64, "n_head": 4, "n_kv_heads": 2, "n_layer": 3, "block_size": 128, "layer_norm_eps": 1e-5},
    "mellum": _WINDOWS | _EXPERTS | {"norm_topk_prob": True, "rope_parameters": _PARTS},
    "muse_glimmer": _WINDOWS,
    "nanbeige": {"num_loops": 2},
    "nanochat": {"num_key_value_heads": 2},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
        ]
    },
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phixtral": {"num_vocab": 320, "model_dim": 64, "num_heads": 4, "num_layers": 3, "rotary_dim": 8},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo3": _WINDOWS | {"window_size": 9, "sliding_window_pattern": 2},
    "qwen": {"kv_channels": 16, "layer_norm_epsilon": 1e-6},
    "qwen3_vl_moe": {
        "text_config": _EXPERTS
        | {"model_type": "qwen3_moe", "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"norm_topk_prob": True}
    },
    "spark2_5": _WINDOWS | {"rope_parameters": _PARTS},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "qk_layernorm": True},
    "step3p5": {
        "head_dim": 16,
        "num_attention_groups": 2,
        "sliding_window": 9,
        "layer_types": [FULL, SLIDING, FULL],
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2",
        "attention_other_setting": {"attention_type": SLIDING, "num_attention_heads": 6, "num_attention_groups": 2},
    },
    "youtu_llm": _LATENT,
}


def _rope(kind: str, **settings: object) -> Arguments:
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 512, **settings}}


SHAPES: dict[str, tuple[str, Arguments]] = {
    "head of 40": ("llama", {"head_dim": 40}),
    "head of 72": ("qwen3", {"head_dim": 72, "num_key_value_heads": 1}),
    "head of 80": ("phi3", {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "head of 96": ("gemma3_text", {"head_dim": 96, "num_key_value_heads": 1, "sliding_window_pattern": 2}),
    "groups of 3": ("llama", {"num_attention_heads": 6, "head_dim": 16, "attention_bias": True}),
    "groups of 5": ("qwen3", {"num_attention_heads": 10, "head_dim": 24, "tie_word_embeddings": False}),
    "groups of 7": ("qwen2", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "a KV head for each": ("llama", {"num_key_value_heads": 4, "rope_traditional": True}),
    "one layer": ("llama", {"num_hidden_layers": 1}),
    "linear positions": ("llama", _rope("linear")),
    "Llama 3's positions": ("llama", _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "YaRN": ("qwen3", {"head_dim": 16} | _rope("yarn")),
    "YaRN that scales": ("qwen2", _rope("yarn", mscale=1.0, mscale_all_dim=0.7)),
    "dynamic positions": ("llama", {"max_position_embeddings": 32} | _rope("dynamic")),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}}
        | {"original_max_position_embeddings": 32},
    ),
    "a window of 1": ("mistral", {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 1}),
    "a window of 4,000": ("mistral", {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 4000}),
    "every second a window": ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 9}),
    "no window": ("gemma3_text", {"sliding_window_pattern": 1}),
    "sinks": ("gpt_oss", {"head_dim": 40, "num_key_value_heads": 1, "layer_types": [FULL, SLIDING, SLIDING, FULL]}),
    "sinks of full attention": ("mimo_v2_flash", {"add_full_attention_sink_bias": True}),
    "one expert": ("qwen3_moe", {"num_experts_per_tok": 1, "mlp_only_layers": [0], "norm_topk_prob": False}),
    "multipliers": ("granite", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 72}),
    "normalized queries": ("cohere", {"use_qk_norm": True}),
    "a state, groups of 4": ("qwen3_next", {"head_dim": 40, "num_key_value_heads": 1, "num_hidden_layers": 4}),
    "a state, untied": ("jamba", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "states in text_config": (
        "qwen3_5",
        {"text_config": _DELTA | {"model_type": "qwen3_5_text", "tie_word_embeddings": False, "head_dim": 40}},
    ),
    "a window of 5 and shared keys": (
        "gemma3n",
        {
            "text_config": _GEMMA3N
            | {"model_type": "gemma3n_text", "sliding_window": 5, "num_key_value_heads": 1, "head_dim": 40}
        },
    ),
}
