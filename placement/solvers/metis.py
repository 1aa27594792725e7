"""Collaboration only: METIS's partition of the co-activation graph. It knows nothing of load."""

from __future__ import annotations

import numpy as np
import pymetis

from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import intra_weight, with_best_swaps, with_equal_sizes

NUM_STARTS = 8
"""Seeds; the least cut is taken."""

TOTAL_EDGE_WEIGHT = 2**29
"""METIS sums edge weights in 32 bits."""


def metis(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """The least cut of several runs of METIS (Karypis and Kumar, 1998), its parts made equal.

    Recursive bisection, which suits dense graphs better than METIS's k-way scheme.  Vertices weigh one each, since
    ranks hold equal counts.  METIS leaves parts a few per cent apart, so experts are moved until sizes are equal, then
    swapped while that lowers the cut.
    """
    num_experts, num_ranks = problem.num_experts, problem.num_ranks
    collaboration = problem.coactivation
    scaled = np.rint(collaboration * (TOTAL_EDGE_WEIGHT / max(collaboration.sum(), 1.0))).astype(np.int64)
    source, neighbours = np.nonzero(scaled)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=num_experts))])
    graph = pymetis.CSRAdjacency(offsets.tolist(), neighbours.tolist())
    edge_weights = scaled[source, neighbours].tolist()
    num_parts = min(num_ranks, num_experts)
    plans = []
    for seed in rng.integers(0, 2**31 - 1, NUM_STARTS).tolist():
        options = pymetis.Options(seed=seed, ufactor=1)
        _, parts = pymetis.part_graph(num_parts, graph, eweights=edge_weights, recursive=True, options=options)
        equal = with_equal_sizes(np.array(parts, dtype=np.int64), collaboration, num_ranks)
        plans.append(with_best_swaps(equal, collaboration, num_ranks))
    rank_of = max(plans, key=lambda plan: intra_weight(plan, collaboration))
    return with_copies(slots_of_ranks(rank_of, problem.topology), problem)
