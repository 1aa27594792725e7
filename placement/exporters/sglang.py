"""SGLang's initial expert location: a row for every hidden layer, dense ones included. Knows no other engine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from placement.exporters.contract import Engine, Export, ServedModel, full_rows
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError

_IN_FILE_ORDER = ("gpt_oss",)
"""Model types whose loaders in SGLang put experts in file order whatever the file says (`srt/models/gpt_oss.py`)."""


def export(placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """`{"physical_to_logical_map": int[hidden layers][P]}` for `--init-expert-location`.

    The loader (`sglang/srt/eplb/expert_location.py`) hands every key on as an argument, so there can be no other; it
    indexes rows by the layer's global number and never checks their number or that every expert is there.  Rows of
    dense layers are what SGLang itself starts with, expert `slot % E`, and are never read.

    Raises:
        CoterieError: a slot is empty, the number of hidden layers is not known, or SGLang cannot place this model.
    """
    model_type = served.model_type or placement.model.model_type
    if model_type in _IN_FILE_ORDER:
        raise CoterieError(
            f"model type {model_type}: SGLang loads its experts in file order whatever the plan says, "
            "and has no DeepEP for it; serve a permuted checkpoint, --to checkpoint"
        )
    total = served.require_total(placement, "SGLang")
    dense = [slot % placement.model.num_experts for slot in range(placement.topology.num_slots)]
    row_of_layer = dict(zip(placement.model.layer_ids, full_rows(placement, "SGLang"), strict=True))
    rows = [row_of_layer.get(layer, dense) for layer in range(total)]
    topology = placement.topology
    words = ["python -m sglang.launch_server --model-path", shlex.quote(served.path_of(placement))]
    words += [f"--tp-size {topology.num_ranks} --ep-size {topology.num_ranks}"]
    if topology.num_nodes > 1:
        words += [f"--nnodes {topology.num_nodes} --node-rank 0 --dist-init-addr HOST:PORT"]
    if placement.num_redundant:
        words += [f"--ep-num-redundant-experts {placement.num_redundant}"]
    words += ["--moe-a2a-backend deepep --init-expert-location", shlex.quote(str(path))]
    remarks = (
        "a line to start from: the exchange, HOST:PORT, each host's own --node-rank and more options are yours to set",
        "a model without get_model_config_for_expert_location in SGLang cannot be served with the file: "
        "0.5.23 stops at the first forward pass, 0.5.6.post2 passes over the file without a word",
        "keep --moe-a2a-backend deepep in 0.5.6.post2: with none it loads experts by the file and routes as if it had "
        "not, and outputs are wrong",
        "layers for multi-token prediction stay in file order: SGLang has no row for them",
    )
    content = json.dumps({"physical_to_logical_map": rows}, separators=(",", ":")) + "\n"
    return Export(content.encode(), " ".join(words), remarks)


ENGINE = Engine("SGLang", "sglang 0.5.6.post2 and 0.5.23", (".json",), export)
"""What `write_export` takes for SGLang."""
