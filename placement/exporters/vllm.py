"""vLLM has no placement file: a checked copy of the plan, for the plugin in `vllm_plugin.py`. Knows no other engine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from placement.exporters.contract import Engine, Export, ServedModel, full_rows
from placement.exporters.vllm_plugin import PLAN_VARIABLE
from placement.placement_map import PlacementMap


def export(placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """The map in coterie's own format, which the plugin reads.

    Raises:
        CoterieError: a slot is empty.
    """
    full_rows(placement, "vLLM")
    topology = placement.topology
    balancing = json.dumps({"num_redundant_experts": placement.num_redundant})
    words = [f"{PLAN_VARIABLE}={shlex.quote(str(path))} vllm serve", shlex.quote(served.path_of(placement))]
    words += [f"--tensor-parallel-size 1 --data-parallel-size {topology.num_ranks}"]
    if topology.num_nodes > 1:
        words += [f"--data-parallel-size-local {topology.ranks_per_node} --data-parallel-address HOST"]
    words += [f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(balancing)}"]
    words += ["--all2all-backend deepep_high_throughput"]
    remarks = (
        "install coterie beside vLLM with `pip install --no-deps PATH-TO-COTERIE`: the plugin needs only what vLLM has",
        "vLLM moves experts first after a quarter of eplb-config's step_interval (750 forward passes unless set); "
        "a permuted checkpoint holds from the first token on",
    )
    return Export(placement.to_bytes(), " ".join(words), remarks)


ENGINE = Engine("vLLM", "vllm 0.33.0", (".json",), export)
"""What `write_export` takes for vLLM."""
