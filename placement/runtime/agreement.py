"""Whether a map fits a run, and whether all ranks were given the same, and the same options. Knows no model."""

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


def require_same(
    placement: PlacementMap, options: object, group: dist.ProcessGroup, device: torch.device | str = "cpu"
) -> None:
    """Check that all ranks were given the same map and the same options; they call it together.

    Args:
        options: of how tokens travel; what differs in them shows in their `repr`.

    Raises:
        CoterieError: one was given others; on every rank.
    """
    wait_long(group)  # as the first exchange of a group, this one waits for whoever still loads the model
    topology = (placement.topology.num_nodes, placement.topology.ranks_per_node, placement.topology.slots_per_rank)
    of_map = hashlib.sha256(repr(topology).encode() + placement.physical_to_logical_map.tobytes()).digest()
    of_options = hashlib.sha256(repr(options).encode()).digest()
    mine = torch.frombuffer(bytearray(of_map + of_options), dtype=torch.uint8).to(device)
    all_of_them = mine.new_empty((dist.get_world_size(group), len(mine)))
    dist.all_gather_single(all_of_them.view(-1), mine, group=group)
    rows = [bytes(row.tolist()) for row in all_of_them.cpu()]
    maps, ways = ([row[part].hex()[:8] for row in rows] for part in (slice(32), slice(32, None)))
    for rank, (of_rank, way) in enumerate(zip(maps, ways, strict=True)):
        if of_rank != maps[0]:
            raise CoterieError(
                f"rank {rank} has the placement map {of_rank}, rank 0 has {maps[0]}; give all ranks the same file"
            )
        if way != ways[0]:
            own = dist.get_rank(group)
            raise CoterieError(
                f"rank {rank} has other options than rank 0, such as rank {own}'s {options}; give all ranks the same"
            )
