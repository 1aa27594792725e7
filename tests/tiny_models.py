"""A tiny random model of every MoE family of transformers that coterie is proved on."""

import re
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE_FIRST = {
    **TINY,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
}
INDEXER = {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}
DEEPSEEK = {**DENSE_FIRST, **ROUTED, **GROUPS, **LATENT_ATTENTION}
del DEEPSEEK["mlp_layer_types"]

CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {**TINY, "num_dense_layers": 1, "num_hidden_layers": 3, "num_shared_experts": 1},
    "aria_text": {**TINY, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": DEEPSEEK,
    "axk2": DEEPSEEK,
    "bailing_hybrid": {
        **DENSE_FIRST,
        **LATENT_ATTENTION,
        **GROUPS,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "beam": {**DENSE_FIRST, **GROUPS},
    "cohere2_moe": {**TINY, "num_shared_experts": 1},
    "dbrx": {
        "vocab_size": 64,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {**DENSE_FIRST, **ROUTED, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": {**DEEPSEEK, **INDEXER},
    "deepseek_v4": {
        **TINY,
        **INDEXER,
        "n_shared_experts": 1,
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "doge": {**TINY, "is_moe": True, "num_experts": 16},
    "dots1": {**DENSE_FIRST, **ROUTED, **GROUPS},
    "dots3_note_text": {**DENSE_FIRST, **ROUTED, **GROUPS, **LATENT_ATTENTION, **INDEXER, "use_sliding_window": False},
    "ernie4_5_moe": {**TINY, "num_hidden_layers": 3, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "ernie4_5_vl_moe_text": {
        **TINY,
        "num_hidden_layers": 3,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "exaone_moe": {**DENSE_FIRST, **GROUPS, "num_shared_experts": 1},
    "flex_olmo": TINY,
    "flint": {**TINY, "num_hidden_layers": 3},
    "gemma4_text": {
        **TINY,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "glm4_moe": {**DENSE_FIRST, **ROUTED, **GROUPS},
    "glm4_moe_lite": {**DENSE_FIRST, **ROUTED, **GROUPS, **LATENT_ATTENTION},
    "glm4v_moe_text": {
        **DENSE_FIRST,
        **ROUTED,
        **GROUPS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm5_next_text": {
        **DENSE_FIRST,
        **ROUTED,
        **GROUPS,
        **LATENT_ATTENTION,
        **INDEXER,
        "index_kpool": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    },
    "glm_moe_dsa": {**DEEPSEEK, **INDEXER},
    "gpt_oss": TINY,
    "granitemoe": TINY,
    "granitemoe_swa": TINY,
    "granitemoehybrid": {
        **TINY,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "shared_intermediate_size": 16,
    },
    "granitemoeshared": {**TINY, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {**TINY, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "hy_v3": {**DENSE_FIRST, "num_shared_experts": 1},
    "inkling2_text": {
        **TINY,
        "n_routed_experts": 8,
        "rel_extent": 16,
        "d_rel": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "unpadded_vocab_size": 64,
    },
    "inkling_text": {
        **TINY,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "rel_extent": 16,
        "d_rel": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
    },
    "jamba": {
        **TINY,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "jetmoe": {**TINY, "kv_channels": 8},
    "kimi_linear": {
        **DENSE_FIRST,
        **LATENT_ATTENTION,
        **GROUPS,
        "q_lora_rank": None,
        "n_shared_experts": 1,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {**TINY, "shared_expert_intermediate_size": 16},
    "laguna": {**DENSE_FIRST, "shared_expert_intermediate_size": 16},
    "lfm2_moe": {
        **TINY,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4_text": {**TINY, "intermediate_size_mlp": 16, "interleave_moe_layer_step": 2, "num_hidden_layers": 4},
    "longcat_flash": {
        **{key: value for key, value in TINY.items() if key not in ("num_experts", "num_local_experts")},
        **LATENT_ATTENTION,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 16,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 2,
    },
    "mellum": TINY,
    "mimo_v2_flash": {**DENSE_FIRST, **GROUPS, "n_routed_experts": 8, "v_head_dim": 8},
    "minimax": TINY,
    "minimax_m2": TINY,
    "minimax_m3_vl_text": {**TINY, **INDEXER, "shared_intermediate_size": 16, "dense_intermediate_size": 16},
    "mistral4": DEEPSEEK,
    "mistral_large4_text": DEEPSEEK,
    "mixtral": TINY,
    "muse_spark_text": {**TINY, "moe_hidden_size": 24},
    "nemotron_h": {
        **TINY,
        **ROUTED,
        **GROUPS,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 24,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "olmoe": TINY,
    "openai_privacy_filter": TINY,
    "phimoe": TINY,
    "qwen2_moe": {**TINY, "shared_expert_intermediate_size": 16},
    "qwen3_5_moe_text": {**TINY, **LINEAR_ATTENTION},
    "qwen3_moe": TINY,
    "qwen3_next": {**TINY, **LINEAR_ATTENTION},
    "qwen3_omni_moe_text": {**TINY},
    "qwen3_vl_moe_text": TINY,
    "qwen4_exp_text": {
        **TINY,
        **LINEAR_ATTENTION,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "solar_open": {**TINY, **ROUTED, **GROUPS},
    "step3p5": {**DENSE_FIRST, **ROUTED, "share_expert_dim": 16, "sliding_window": 8, "num_sliding_attention_heads": 4},
    "switch_transformers": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 8,
        "expert_capacity": 2,
    },
    "unlimited_ocr_text": {**DENSE_FIRST, **ROUTED, **GROUPS, "topk_method": "group_limited_greedy"},
    "zaya": {**TINY, "num_experts_per_tok": 1, "router_hidden_size": 16},
}


NOT_AUTO = {
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "step3p5": "Step3p7TextModel",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
}
"""Text models that transformers' auto classes do not know."""


def tiny_model(family: str, **overrides: object) -> torch.nn.Module:
    """A random model of one family, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **overrides})
    if family in NOT_AUTO:
        model = getattr(transformers, NOT_AUTO[family])._from_config(config)
    else:
        auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if re.search(r"\.(gate|router|router_gate)\.(.+\.)?weight$", name) and parameter.ndim == 2:
            torch.nn.init.normal_(
                parameter, std=0.3
            )  # some families start routers at zero, where every choice is a tie
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
            torch.nn.init.normal_(tensor, std=0.2)
        if name.endswith("tid2eid"):  # deepseek_v4's table of experts by token id
            tensor.copy_(torch.rand(len(tensor), config.num_local_experts).argsort(dim=1)[:, : tensor.shape[1]])
    return model.eval()
