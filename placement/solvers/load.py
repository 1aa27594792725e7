"""Balance only: what EPLB does where there are no redundant experts. It knows nothing of traffic."""

from __future__ import annotations

import numpy as np

from placement.solvers.contract import LayerProblem, RankOfExpert


def load(problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
    """Longest processing time first: each expert, heaviest first, to the least loaded rank with a free slot.

    The rule is Graham's (1969); with equal counts a rank it is the packing step of EPLB.
    """
    expert_load = problem.expert_load
    rank_load = np.zeros(problem.num_ranks, dtype=np.int64)
    free = np.full(problem.num_ranks, problem.slots_per_rank)
    rank_of_expert = np.empty(problem.num_experts, dtype=np.int64)
    for expert in np.argsort(-expert_load, kind="stable"):
        rank = int(np.where(free > 0, rank_load, np.iinfo(np.int64).max).argmin())
        rank_of_expert[expert] = rank
        rank_load[rank] += expert_load[expert]
        free[rank] -= 1
    return rank_of_expert
