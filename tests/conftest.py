"""Small models and traces that every test can have."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a hub; its client reads this when it is imported

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from profiler.profile import Profile, TokenTrace, ids_dtype
from profiler.spec import MoESpec

settings.register_profile("ci", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

TINY = {
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
DEEPSEEK = {
    **TINY,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES = {"olmoe": TINY, "qwen3_moe": TINY, "mixtral": TINY, "gpt_oss": TINY, "deepseek_v3": DEEPSEEK}


def tiny_model(family: str, **overrides: object) -> torch.nn.Module:
    """A random model of one family, the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**FAMILIES[family], **overrides}))
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter)  # some families start routers at zero, where every choice is a tie
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer)
    return model.eval()


def make_trace(ids_LTK: np.ndarray, num_sequences: int = 4, num_domains: int = 2) -> TokenTrace:
    """A trace with sequences and domains in turn."""
    num_tokens = ids_LTK.shape[1]
    return TokenTrace(
        topk_ids=ids_LTK,
        sequence_ids=(np.arange(num_tokens) * num_sequences // num_tokens).astype(np.int32),
        domain_ids=(np.arange(num_tokens) % num_domains).astype(np.uint8),
        phase=np.zeros(num_tokens, dtype=np.uint8),
    )


def make_spec(num_layers: int, num_experts: int, top_k: int) -> MoESpec:
    """The model of a made-up trace."""
    return MoESpec("made-up", "olmoe", tuple(range(num_layers)), num_experts, top_k, 1, 32, 16, "float32")


def random_ids(seed: int, layers: int, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Routing with structure: each token favours one of four blocks of experts, some experts are hot."""
    rng = np.random.default_rng(seed)
    block = np.arange(experts) * 4 // experts
    scores = rng.gumbel(size=(layers, tokens, experts)) + rng.normal(size=(layers, 1, experts))
    scores += 2.0 * (rng.integers(0, 4, (layers, tokens, 1)) == rng.permutation(block))
    return np.argsort(-scores, axis=-1)[..., :top_k].astype(ids_dtype(experts))


@st.composite
def traces(draw: st.DrawFn) -> tuple[MoESpec, TokenTrace]:
    """Any small routing of any small model, experts divisible by 4."""
    experts = draw(st.sampled_from([4, 8, 12, 16, 32]))
    top_k = draw(st.integers(1, min(4, experts)))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(4, 60))
    ids = random_ids(draw(st.integers(0, 2**32 - 1)), layers, tokens, experts, top_k)
    return make_spec(layers, experts, top_k), make_trace(ids)


@pytest.fixture
def profile() -> Profile:
    """Structured routing: 2 layers, 16 experts, top-4, 600 tokens in 12 sequences."""
    trace = make_trace(random_ids(0, 2, 600, 16, 4), num_sequences=12)
    return Profile.from_tokens(make_spec(2, 16, 4), ["prose", "code"], trace, {"made": "up"})
