"""Balance only: DeepSeek's expert-parallelism load balancer (EPLB). It knows nothing of which experts work together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.solvers.contract import Slots
from placement.solvers.copies import slots_of_held

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def load(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Copy the most loaded experts, then pack the copies evenly: EPLB, github.com/deepseek-ai/EPLB.

    Its two policies, as its description tells them: where the number of nodes divides the number of expert groups,
    groups are packed onto nodes first, and each node copies and packs its own experts (hierarchical); otherwise all
    experts are copied and packed over all ranks at once (global).  Without redundant experts the global policy is
    Graham's longest processing time first (1969) with a limit on counts.  Unlike EPLB it never puts two copies of an
    expert on one rank, where the second would take no load off it.
    """
    topology, expert_load = problem.topology, problem.expert_load
    experts = np.arange(problem.num_experts)
    groups, nodes = problem.num_groups, topology.num_nodes
    if nodes == 1 or groups % nodes or problem.num_experts % groups:
        parts = [experts]
    else:
        experts_of_group = experts.reshape(groups, -1)
        group_load = expert_load[experts_of_group].sum(axis=1)
        packed = _packed(np.arange(groups), group_load, nodes, groups // nodes)
        parts = [experts_of_group[group_ids].ravel() for group_ids in packed]
    held: list[list[int]] = []
    for index, part in enumerate(parts):
        num_ranks = topology.num_ranks // len(parts)
        num_redundant = (problem.num_redundant + len(parts) - 1 - index) // len(parts)
        count = _copies(expert_load[part], num_redundant, num_ranks)
        copies = np.repeat(part, count)
        held += _packed(copies, np.repeat(expert_load[part] / count, count), num_ranks, topology.slots_per_rank)
    return slots_of_held(held, topology)


def _copies(load_E: Floats, num_redundant: int, num_ranks: int) -> Ints:
    """Copies of each expert, int64 (E,): each further one to the expert with the highest load per copy."""
    count = np.ones(len(load_E), dtype=np.int64)
    for _ in range(min(num_redundant, len(load_E) * (num_ranks - 1))):
        count[np.where(count < num_ranks, load_E / count, -1.0).argmax()] += 1
    return count


def _packed(items: Ints, item_load: Floats, num_parts: int, capacity: int) -> list[list[int]]:
    """Each item, heaviest first, to the least loaded part with room that does not hold its like."""
    parts: list[dict[int, float]] = [{} for _ in range(num_parts)]
    part_load = np.zeros(num_parts)
    for index in np.argsort(-item_load, kind="stable"):
        item, weight = int(items[index]), float(item_load[index])
        with_room = [part for part in range(num_parts) if len(parts[part]) < capacity]
        part = min((part for part in with_room if item not in parts[part]), key=part_load.__getitem__, default=None)
        if part is None:
            part = _make_room(item, weight, with_room, parts, part_load)
        parts[part][item] = weight
        part_load[part] += weight
    return [list(part) for part in parts]


def _make_room(
    item: int, item_load: float, with_room: list[int], parts: list[dict[int, float]], part_load: Floats
) -> int:
    """Where only parts with a copy of the item have room: move another item there from a full part without it.

    There always is one: the full part holds more items than the one with room, so one at least that is not there.
    Of these moves the one is made after which the busier of the two parts has least to do.
    """
    moves = [
        (max(part_load[full] - weight + item_load, part_load[target] + weight), full, target, other)
        for target in with_room
        for full, held in enumerate(parts)
        if item not in held
        for other, weight in held.items()
        if other not in parts[target]
    ]
    _, full, target, other = min(moves)
    weight = parts[full].pop(other)
    parts[target][other] = weight
    part_load[full] -= weight
    part_load[target] += weight
    return full
