"""Arguments of toys beside those that all share: model types that nothing but the proof at load tells apart."""

from typing import Any

Arguments = dict[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"
_LAYERS = [SLIDING, FULL, FULL]
_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
}
_GRANITE = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "head_dim": 16,
}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "mscale": 1.0, "mscale_all_dim": 1.0}
_NEMOTRON = {
    "attention_bias": False,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "num_hidden_layers": 5,
    "hybrid_override_pattern": ["M", "-", "*", "M", "*"],
}
_LFM2 = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", FULL, "conv"],
}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 1,
    "sliding_window": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
}
_GEMMA3N = {
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING],
    "vocab_size_per_layer_input": 320,
    "sliding_window": 24,
    "rope_local_base_freq": 10_000.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 4,
}
_KIMI = {
    "linear_attn_config": {"num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4, "kda_layers": [1, 3]},
    "model_max_length": 4096,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "num_shared_experts": 1,
}

PLAIN: dict[str, Arguments] = {
    "Klear": _MOE | {"attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1, "n_shared_experts": 1},
    "apertus": {"mlp_bias": False, "attention_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_moe": _MOE | {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "cohere": {},
    "dots1": _ROUTED,
    "ernie4_5": {"head_dim": 16, "use_bias": False},
    "ernie4_5_moe": {"use_bias": False, "moe_num_experts": 4, "moe_intermediate_size": 32},
    "gemma": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4": {"attention_bias": False, "head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4_moe": _ROUTED
    | {"head_dim": 16, "rope_scaling": None, "use_qk_norm": True, "attention_bias": False}
    | {"partial_rotary_factor": 0.5},
    "granitemoe": _GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"attention_bias": False, "head_dim": 16, "mlp_bias": False},
    "hunyuan": {
        "attention_bias": False,
        "moe_topk": 2,
        "num_experts": 4,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {"head_dim": 16, "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": {"bias": False},
    "internlm3": {"bias": False, "qkv_bias": False, "head_dim": 16},
    "mimo": {},
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 2},
    "minimax": {
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "head_dim": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 32},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2, "head_dim": 16},
    "solar_open": _ROUTED | {"head_dim": 16, "partial_rotary_factor": 1.0},
    "starcoder2": {},
    "telechat3": {"head_dim": 16},
}
WINDOWED: dict[str, Arguments] = {
    "cohere2": {"sliding_window": 24, "sliding_window_pattern": 3, "head_dim": 16},
    "exaone4": {"head_dim": 16, "rope_scaling": None, "sliding_window": 24, "sliding_window_pattern": "LLG"},
    "ministral3": {
        "layer_types": _LAYERS,
        "sliding_window": 24,
        "head_dim": 16,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "mimo_v2_flash": _ROUTED
    | {
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 24,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10_000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.334,
    },
    "olmo3": {"sliding_window": 24, "layer_types": _LAYERS},
}
HYBRID: dict[str, Arguments] = {
    "falcon_h1": _MAMBA | {"head_dim": 16, "mamba_d_ssm": 64, "lm_head_multiplier": 1.0, "key_multiplier": 3.0},
    "granitemoehybrid": _GRANITE
    | _MAMBA
    | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"shared_intermediate_size": 32},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": _LFM2
    | {"block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0}
    | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _LFM2 | _MOE | {"use_expert_bias": True, "num_dense_layers": 1},
    "nemotron_h": _NEMOTRON,
    "olmo_hybrid": _DELTA
    | {"linear_allow_neg_eigval": False, "attention_bias": False}
    | {"layer_types": ["linear_attention", FULL, "linear_attention"]},
    "plamo2": {
        "hidden_size_per_head": 16,
        "mamba_d_state": 16,
        "mamba_num_heads": 4,
        "mamba_step": 2,
        "num_hidden_layers": 4,
    },
    "qwen3_5": {"text_config": _DELTA | {"model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {
        "text_config": _DELTA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "model_type": "qwen3_5_moe_text"}
    },
    "qwen3_next": _DELTA
    | _MOE
    | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 32, "mlp_only_layers": []}
    | {"partial_rotary_factor": 0.5},
}
SHARED: dict[str, Arguments] = {
    "gemma3n": {"text_config": _GEMMA3N | {"model_type": "gemma3n_text"}},
    "gemma4": {"text_config": _GEMMA4 | {"model_type": "gemma4_text"}},
    "gemma4_text": _GEMMA4
    | {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    | {"num_key_value_heads": 2, "hidden_size_per_layer_input": 0},
}
LATENT: dict[str, Arguments] = {
    "deepseek_v2": _ROUTED | _LATENT | {"rope_scaling": _YARN, "topk_method": "greedy"},
    "deepseek_v3": _ROUTED | _LATENT | {"rope_scaling": _YARN},
    "glm4_moe_lite": _ROUTED | _LATENT,
    "kimi_linear": _LATENT | _KIMI,
    "minicpm3": {
        "dim_model_base": 64,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "kv_lora_rank": 32,
        "scale_depth": 1.4,
        "scale_emb": 2,
        "num_key_value_heads": 4,
        "rope_scaling": {"original_max_position_embeddings": 4096, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    "mistral4": _ROUTED
    | _LATENT
    | {
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
}
WRAPPED: dict[str, Arguments] = {
    "mistral3": {"text_config": WINDOWED["ministral3"] | {"model_type": "ministral3", "layer_types": [FULL] * 3}},
    "qwen2_vl": {"text_config": {"model_type": "qwen2"}},
    "qwen3_vl": {"text_config": {"model_type": "qwen3", "head_dim": 16}},
}
FAMILIES = PLAIN | WINDOWED | HYBRID | SHARED | LATENT | WRAPPED
