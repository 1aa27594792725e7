"""Experts dealt at random: what a plan buys over no plan at all. Looks at neither tokens nor nodes."""

from __future__ import annotations

import numpy as np

from placement.layer_problem import LayerProblem
from placement.solvers.contract import Slots
from placement.solvers.copies import slots_of_held
from placement.solvers.equal_sizes import equal_sizes


def random(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """A random permutation cut into equal parts; then copies of random experts, none twice before all have one.

    Each copy goes to the rank with most free slots among those that lack it, a random one of several.
    """
    ends = np.cumsum(equal_sizes(problem.num_experts, problem.num_ranks))
    held = [set(part.tolist()) for part in np.split(rng.permutation(problem.num_experts), ends[:-1])]
    copies = np.zeros(problem.num_experts, dtype=np.int64)
    for _ in range(problem.num_redundant):
        sizes = np.array([len(experts) for experts in held])
        sizes[sizes >= min(problem.slots_per_rank, problem.num_experts)] = np.iinfo(np.int64).max
        rank = int(np.lexsort((rng.random(len(held)), sizes))[0])
        if sizes[rank] == np.iinfo(np.int64).max:
            break
        lacking = np.setdiff1d(np.arange(problem.num_experts), list(held[rank]))
        expert = int(rng.choice(lacking[copies[lacking] == copies[lacking].min()]))
        held[rank].add(expert)
        copies[expert] += 1
    return slots_of_held(held, problem.topology)
