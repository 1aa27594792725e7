"""TensorRT-LLM's load balancer configuration: YAML by global layer number. Knows no other engine."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from placement.exporters.contract import Engine, Export, ServedModel, full_rows
from placement.placement_map import PlacementMap


def export(placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """`num_slots`, `initial_global_assignments` and `layer_updates_per_iter: 0`, which keeps them.

    `MoeLoadBalancerConfig` (`tensorrt_llm/llmapi/llm_args.py`) takes no other key, wants a row of num_slots for every
    MoE layer that it builds, layers for multi-token prediction included, and all experts in each.  Those layers follow
    the hidden ones in number; they get the assignment that TensorRT-LLM makes by itself.

    Raises:
        CoterieError: a slot is empty, or there are MTP layers and the number of hidden layers is not known.
    """
    topology, num_experts = placement.topology, placement.model.num_experts
    assignments = dict(zip(placement.model.layer_ids, full_rows(placement, "TensorRT-LLM"), strict=True))
    if served.num_mtp:
        total = served.require_total(placement, "TensorRT-LLM with MTP layers")
        own = [
            (rank * num_experts // topology.num_ranks + slot) % num_experts
            for rank in range(topology.num_ranks)
            for slot in range(topology.slots_per_rank)
        ]
        assignments |= {total + index: list(own) for index in range(served.num_mtp)}
    value = {
        "num_slots": topology.num_slots,
        "initial_global_assignments": assignments,
        "layer_updates_per_iter": 0,
    }
    options = {
        "enable_attention_dp": True,
        "moe_config": {"backend": "WIDEEP", "load_balancer": str(path)},
    }
    start = (
        f"trtllm-serve {shlex.quote(served.path_of(placement))} --backend pytorch --tp_size {topology.num_ranks} "
        f"--ep_size {topology.num_ranks} --extra_llm_api_options options.yaml\n"
        f"where options.yaml has:\n{yaml.safe_dump(options, sort_keys=False)}"
    ).strip()
    remarks = ["the load balancer works with attention data parallelism and more than one rank only"]
    if not served.num_mtp:
        remarks.append(
            "if you serve with multi-token prediction, give --num-mtp-layers: a layer without a row is an error"
        )
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=10**9)
    return Export(text.encode(), start, tuple(remarks))


ENGINE = Engine("TensorRT-LLM", "its source of 2025 and 2026 (class MoeLoadBalancerConfig)", (".yaml", ".yml"), export)
"""What `write_export` takes for TensorRT-LLM."""
