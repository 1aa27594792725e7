"""vllm-ascend's expert map: JSON by MoE ordinal and device. Knows no other engine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from placement.exporters.contract import Engine, Export, ServedModel, full_rows
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError


def export(placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """`moe_layer_count` and `layer_list` for `eplb_config.expert_map_path`.

    `vllm_ascend/eplb/core/eplb_utils.py` counts MoE layers from 0, wants equally many experts on every device and loses
    one of two copies on one device, which a `PlacementMap` never has.  The layer behind the last one, of a draft
    model, keeps the engine's own placement; more than one cannot be served with a map.

    Raises:
        CoterieError: a slot is empty, there is one rank, or the model has several MTP layers.
    """
    topology = placement.topology
    if topology.num_ranks == 1:
        raise CoterieError("vllm-ascend passes over the map on 1 rank; plan for at least 2")
    if served.num_mtp > 1:
        raise CoterieError(
            f"{served.num_mtp} MTP layers: vllm-ascend takes a map with at most 1; serve with fewer, and give "
            "--num-mtp-layers 0 or 1"
        )
    layer_list = []
    for ordinal, row in enumerate(full_rows(placement, "vllm-ascend")):
        ranks = [row[first : first + topology.slots_per_rank] for first in range(0, len(row), topology.slots_per_rank)]
        devices = [{"device_id": rank, "device_expert": held} for rank, held in enumerate(ranks)]
        layer_list.append({"layer_id": ordinal, "device_count": len(ranks), "device_list": devices})
    value = {"moe_layer_count": len(layer_list), "layer_list": layer_list}
    additional = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
    start = (
        f"vllm serve {shlex.quote(served.path_of(placement))} --tensor-parallel-size {topology.num_ranks} "
        f"--enable-expert-parallel --additional-config {shlex.quote(additional)}"
    )
    return Export((json.dumps(value, separators=(",", ":")) + "\n").encode(), start)


ENGINE = Engine("vllm-ascend", "vllm-ascend 0.23.0.post1", (".json",), export)
"""What `write_export` takes for vllm-ascend."""
