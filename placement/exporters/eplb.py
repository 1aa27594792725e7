"""EPLB's three tensors, for tools that take what its `rebalance_experts` returns. Knows no engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from placement.exporters.contract import Engine, Export, ServedModel, full_rows
from placement.placement_map import PlacementMap

Ints = npt.NDArray[np.int64]


def export(placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """`phy2log` (L, P), `log2phy` (L, E, X) and `logcnt` (L, E), int64, in one safetensors file.

    Raises:
        CoterieError: a slot is empty.
    """
    full_rows(placement, "EPLB")
    log2phy, logcnt = inverse(placement.physical_to_logical_map, placement.model.num_experts)
    tensors = {"phy2log": placement.physical_to_logical_map, "log2phy": log2phy, "logcnt": logcnt}
    start = f'tensors = safetensors.torch.load_file("{path}")  # phy2log, log2phy, logcnt of the MoE layers'
    return Export(save(tensors), start)


def inverse(phy2log: Ints, num_experts: int) -> tuple[Ints, Ints]:
    """The slots of every expert, int64 (L, E, X), ascending and padded with -1, and their number (L, E)."""
    num_layers, num_slots = phy2log.shape
    logcnt = np.zeros((num_layers, num_experts), dtype=np.int64)
    log2phy = np.full((num_layers, num_experts, num_slots), -1, dtype=np.int64)
    layers = np.arange(num_layers)
    for slot in range(num_slots):
        experts = phy2log[:, slot]
        log2phy[layers, experts, logcnt[layers, experts]] = slot
        logcnt[layers, experts] += 1
    return np.ascontiguousarray(log2phy[:, :, : logcnt.max()]), logcnt


ENGINE = Engine("EPLB", "deepseek-ai/EPLB, rebalance_experts", (".safetensors",), export)
"""What `write_export` takes for EPLB."""
