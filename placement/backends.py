"""How often an engine's exchange sends a token, so what a plan can buy there. Knows no map and no exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profiler.errors import CoterieError

Sends = Literal["per-rank", "per-expert", "to-all"]


@dataclass(frozen=True)
class Backend:
    """One engine with one way to exchange tokens.

    Attributes:
        option: that chooses it.
        sends: a token once to each rank that serves it, once for each expert, or to all ranks whatever the plan.
    """

    option: str
    sends: Sends

    @property
    def decides(self) -> str:
        """What a plan changes there, in words."""
        if self.sends == "per-rank":
            return (
                "sends a token once to each rank that serves it: fan_out, busiest_ingress and imbalance_ratio all count"
            )
        if self.sends == "per-expert":
            return "sends a token once for each expert: co-location buys nothing, only imbalance_ratio counts"
        return "sends every token to all ranks: traffic does not depend on the plan, only imbalance_ratio counts"


BACKENDS = {
    "coterie": Backend("coterie bench", "per-rank"),
    "sglang": Backend("--moe-a2a-backend none", "to-all"),
    "sglang-deepep-normal": Backend("--moe-a2a-backend deepep --deepep-mode normal", "per-rank"),
    "sglang-deepep-low-latency": Backend("--moe-a2a-backend deepep --deepep-mode low_latency", "per-expert"),
    "sglang-flashinfer": Backend("--moe-a2a-backend flashinfer", "per-rank"),
    "sglang-mooncake": Backend("--moe-a2a-backend mooncake", "per-expert"),
    "sglang-mori": Backend("--moe-a2a-backend mori", "per-rank"),
    "sglang-nixl": Backend("--moe-a2a-backend nixl", "per-expert"),
    "tensorrt-llm-allgather": Backend("TRTLLM_FORCE_COMM_METHOD=ALLGATHER", "to-all"),
    "tensorrt-llm-deepep": Backend("TRTLLM_FORCE_COMM_METHOD=DEEPEP", "per-rank"),
    "tensorrt-llm-deepep-low-latency": Backend("TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY", "per-expert"),
    "tensorrt-llm-one-sided": Backend("TRTLLM_FORCE_COMM_METHOD=NVLINK_ONE_SIDED", "per-rank"),
    "tensorrt-llm-two-sided": Backend("TRTLLM_FORCE_COMM_METHOD=NVLINK_TWO_SIDED", "per-rank"),
    "vllm": Backend("--all2all-backend allgather_reducescatter", "to-all"),
    "vllm-deepep-high-throughput": Backend("--all2all-backend deepep_high_throughput", "per-rank"),
    "vllm-deepep-low-latency": Backend("--all2all-backend deepep_low_latency", "per-expert"),
    "vllm-flashinfer-one-sided": Backend("--all2all-backend flashinfer_nvlink_one_sided", "per-rank"),
    "vllm-flashinfer-two-sided": Backend("--all2all-backend flashinfer_nvlink_two_sided", "per-rank"),
    "vllm-mori": Backend("--all2all-backend mori_high_throughput", "per-rank"),
    "vllm-nixl": Backend("--all2all-backend nixl_ep", "per-expert"),
    "vllm-ascend-allgather": Backend("MoECommType.ALLGATHER, chosen by vllm-ascend", "to-all"),
    "vllm-ascend-alltoall": Backend("MoECommType.ALLTOALL, chosen by vllm-ascend", "per-expert"),
    "transformers-all-to-all": Backend('ep_implementation="all_to_all"', "per-expert"),
    "transformers-all-reduce": Backend('ep_implementation="all_reduce"', "to-all"),
    "megatron-alltoall": Backend("--moe-token-dispatcher-type alltoall", "per-expert"),
    "megatron-allgather": Backend("--moe-token-dispatcher-type allgather", "to-all"),
    "megatron-flex-deepep": Backend(
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep", "per-rank"
    ),
}
"""By name; `docs/engines.md` says what each row was read from."""


def find_backend(name: str) -> Backend:
    """One of `BACKENDS`.

    Raises:
        CoterieError: there is none of this name; the message lists those of the engine that the name begins with.
    """
    if name not in BACKENDS:
        near = [known for known in BACKENDS if known.startswith(name.partition("-")[0][:4])] or list(BACKENDS)
        raise CoterieError(f"--engine {name}: not known; give one of {', '.join(near)}")
    return BACKENDS[name]
