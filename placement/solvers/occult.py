"""Collaboration only: Occult's greedy clustering of experts into equal groups. It knows nothing of load."""

from __future__ import annotations

import numpy as np

from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import equal_sizes


def occult(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Fill one rank after another with the experts that collaborate most (Occult, arXiv 2505.13345, Algorithm 1).

    The first rank starts from the pair that is picked together most often, each further one from the expert that
    collaborates least with all placed so far; each takes the expert of greatest mean collaboration with its members
    until it is full.  Ties go to the first expert in file order.
    """
    collaboration = problem.coactivation
    rank_of = np.full(problem.num_experts, -1, dtype=np.int64)
    for rank, size in enumerate(equal_sizes(problem.num_experts, problem.num_ranks)):
        if rank == 0:
            first = np.unravel_index(int(collaboration.argmax()), collaboration.shape)[0]
        else:
            first = np.where(rank_of < 0, collaboration[:, rank_of >= 0].sum(axis=1), np.inf).argmin()
        # The best partner of either end of the strongest pair is the other end, so one of them is seed enough.
        members = [first]
        rank_of[first] = rank
        while len(members) < size:
            best = np.where(rank_of < 0, collaboration[:, members].sum(axis=1), -1.0).argmax()
            members.append(best)
            rank_of[best] = rank
    return with_copies(slots_of_ranks(rank_of, problem.topology), problem)
