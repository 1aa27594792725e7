"""Whether a map fits a run, and whether all ranks were given the same. Knows no model."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from placement.placement_map import PlacementMap
from placement.runtime.membership import wait_long
from profiler.errors import CoterieError


def require_fit(placement: PlacementMap, num_layers: int, num_ranks: int) -> None:
    """Check that a map is for so many layers and ranks.

    Raises:
        CoterieError: it is for others.
    """
    if placement.topology.num_ranks != num_ranks:
        planned = placement.topology.num_ranks
        raise CoterieError(f"the map is for {planned} ranks, this run has {num_ranks}; start {planned} or plan again")
    if placement.model.num_layers != num_layers:
        raise CoterieError(
            f"the map has {placement.model.num_layers} MoE layers, the model {num_layers}; plan for this model"
        )


def require_same_map(placement: PlacementMap, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
    """Check that all ranks were given the same map; they call it together.

    Raises:
        CoterieError: one was given another; on every rank.
    """
    wait_long(group)  # as the first exchange of a group, this one waits for whoever still loads the model
    topology = (placement.topology.num_nodes, placement.topology.ranks_per_node, placement.topology.slots_per_rank)
    digest = hashlib.sha256(repr(topology).encode() + placement.physical_to_logical_map.tobytes()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
    all_of_them = mine.new_empty((dist.get_world_size(group), len(mine)))
    dist.all_gather_single(all_of_them.view(-1), mine, group=group)
    digests = [bytes(row.tolist()).hex()[:8] for row in all_of_them.cpu()]
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise CoterieError(
                f"rank {rank} has the placement map {other}, rank 0 has {digests[0]}; give all ranks the same file"
            )
