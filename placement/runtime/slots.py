"""Which slot serves each pick of a rank's tokens, as the evaluator (`placement.cost`) assumes. Sends nothing."""

from __future__ import annotations

import numpy as np
import torch

from placement.choice import Choice, choose_ranks, first_load, nearest_ranks, ranks_of_experts
from placement.placement_map import EMPTY_SLOT, PlacementMap


class SlotChoice:
    """The slots of one layer as one rank sees them.

    Empty slots hold nothing and get no number: on the wire a rank's slots are those that it fills, in order.

    Attributes:
        slots_per_rank: filled slots of the rank that fills most.
        logical_of_rank: for each rank the logical expert in each filled slot.
        ranks_per_node: of the map's topology.
        has_copies: whether an expert has several slots.
    """

    def __init__(self, placement: PlacementMap, layer: int, rank: int, choice: Choice = "token") -> None:
        """Read one layer of a map.

        Args:
            rank: this one, where tokens come from.
            choice: "token" as the planner assumes, sequential on the host where experts have copies; or "source", one
                copy for all tokens of a rank, a table.
        """
        topology, num_experts = placement.topology, placement.model.num_experts
        slots_P = placement.physical_to_logical_map[layer]
        self.logical_of_rank = [
            held[held != EMPTY_SLOT].tolist() for held in slots_P.reshape(topology.num_ranks, topology.slots_per_rank)
        ]
        self.slots_per_rank = max(len(held) for held in self.logical_of_rank)
        self.ranks_per_node = topology.ranks_per_node
        self._first_load = first_load(rank, topology.num_ranks)
        self._ranks_EX = ranks_of_experts(slots_P, num_experts, topology.slots_per_rank)
        slot_ER = np.full((num_experts, topology.num_ranks), -1, dtype=np.int64)
        for at, held in enumerate(self.logical_of_rank):
            slot_ER[held, at] = at * self.slots_per_rank + np.arange(len(held))
        self._slot_ER = torch.from_numpy(slot_ER)
        self.has_copies = self._ranks_EX.shape[1] > 1
        self._fixed_E: torch.Tensor | None = None  # the one slot for each expert, and none behind the last
        if not self.has_copies or choice == "source":
            rank_E = nearest_ranks(self._ranks_EX, topology)[rank] if self.has_copies else self._ranks_EX[:, 0]
            self._fixed_E = torch.from_numpy(np.append(slot_ER[np.arange(num_experts), rank_E], -1))

    def slots_of(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The slot that serves each pick, int64 (T, K), -1 where its id is none of an expert.

        Args:
            topk_ids: integers (T, K), logical experts.
        """
        num_experts = len(self._slot_ER)
        ids = topk_ids.long()
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        if self._fixed_E is not None:
            self._fixed_E = self._fixed_E.to(ids.device)
            return self._fixed_E[ids]
        on_host = torch.where(ids < num_experts, ids, -1).cpu().contiguous()
        ranks = choose_ranks(on_host.numpy(), self._ranks_EX, self.ranks_per_node, self._first_load.copy())
        slots = self._slot_ER[on_host.clamp(min=0), torch.from_numpy(ranks).clamp(min=0)]
        return torch.where(on_host < 0, -1, slots).to(ids.device)
