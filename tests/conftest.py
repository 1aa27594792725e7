"""Small models and traces that every test can have."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a hub; its client reads this when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and on a busy machine threads spin

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from profiler.profile import Profile
from profiler.spec import MoESpec
from profiler.trace import TokenTrace, ids_dtype

STARTING_RANKS = {
    "test_bench",
    "test_constrained_runtime",
    "test_engine",
    "test_membership",
    "test_network",
    "test_runtime",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests run in two processes, each file in one of them, and those that start ranks one after another in the same."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("ranks" if name in STARTING_RANKS else name))


__all__ = ["FAMILIES", "make_spec", "make_trace", "profile", "random_ids", "tiny_model", "traces"]

settings.register_profile("ci", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


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
