"""Collaboration only: placement as a quadratic assignment of experts to slots. It knows nothing of load."""

from __future__ import annotations

import numpy as np

from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import equal_sizes, intra_weight, with_best_swaps

NUM_STARTS = 8
"""Random starts of FAQ; the best is taken."""


def quadratic(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Assign experts to places so that co-activated pairs share a rank: FAQ, then swaps.

    FAQ (Vogelstein et al., 2015) relaxes permutations to doubly stochastic matrices.  Its usual start, the barycentre,
    gives every place the same gradient here, so starts are random.  The best of several is swapped to a local optimum,
    as 2-opt does.
    """
    from scipy.optimize import quadratic_assignment  # takes a third of a second

    rank_of_place = np.repeat(np.arange(problem.num_ranks), equal_sizes(problem.num_experts, problem.num_ranks))
    same_rank = (rank_of_place[:, None] == rank_of_place).astype(np.float64)
    collaboration = problem.coactivation
    plans = []
    for _ in range(NUM_STARTS):
        options = {"maximize": True, "P0": "randomized", "rng": rng}
        place = quadratic_assignment(collaboration, same_rank, method="faq", options=options).col_ind
        plans.append(with_best_swaps(rank_of_place[place], collaboration, problem.num_ranks))
    rank_of = max(plans, key=lambda plan: intra_weight(plan, collaboration))
    return with_copies(slots_of_ranks(rank_of, problem.topology), problem)
