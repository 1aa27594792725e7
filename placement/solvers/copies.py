"""Copies beyond one of each expert, for strategies that only know where to put the first.
Knows loads, and nothing of which experts work together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.placement_map import EMPTY_SLOT
from placement.solvers.contract import Slots
from placement.topology import Topology


def with_copies(slots: Slots, problem: LayerProblem) -> Slots:
    """Fill free slots with `num_redundant` copies of the most loaded experts.

    One copy at a time: of the expert with the highest load per copy that some rank with a free slot lacks, to the least
    loaded of these ranks.  Tokens are taken to spread evenly over the copies of an expert.  Fewer copies are made where
    every rank with a free slot holds every expert.
    """
    held = [set(row[row != EMPTY_SLOT].tolist()) for row in slots.reshape(problem.num_ranks, -1)]
    lacks = np.ones((problem.num_ranks, problem.num_experts), dtype=bool)
    for rank, experts in enumerate(held):
        lacks[rank, list(experts)] = False
    for _ in range(problem.num_redundant):
        num_copies = (~lacks).sum(axis=0)
        load_per_copy = problem.expert_load / num_copies
        rank_load = (~lacks * load_per_copy).sum(axis=1)
        has_room = np.array([len(experts) < problem.slots_per_rank for experts in held])
        fits = lacks & has_room[:, None]
        if not fits.any():
            break
        expert = int(np.where(fits.any(axis=0), load_per_copy, -1.0).argmax())
        rank = int(np.where(fits[:, expert], rank_load, np.inf).argmin())
        held[rank].add(expert)
        lacks[rank, expert] = False
    return slots_of_held(held, problem.topology)


def slots_of_held(held: Sequence[Collection[int] | npt.NDArray[np.int64]], topology: Topology) -> Slots:
    """Slots from the experts that each rank holds: in file order, empty slots last."""
    slots = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY_SLOT, dtype=np.int64)
    for row, experts in zip(slots, held, strict=True):
        row[: len(experts)] = sorted(experts)
    return slots.ravel()
