"""Experts in file order, as engines place them when they are told nothing."""

from __future__ import annotations

import numpy as np

from placement.solvers.contract import LayerProblem, Slots
from placement.solvers.copies import slots_of_held
from placement.solvers.equal_sizes import equal_sizes


def linear(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Consecutive experts on each rank; where they do not divide, the first ranks hold one more, as in vLLM.

    Redundant experts start again from expert 0, as SGLang's trivial location does: slot p holds expert p mod E where
    every slot is filled.
    """
    # No rank has more than E of these, so that consecutive numbers mod E never meet on a rank.
    num_copies = min(problem.num_experts + problem.num_redundant, problem.num_experts * problem.num_ranks)
    ends = np.cumsum(equal_sizes(num_copies, problem.num_ranks))
    held = np.split(np.arange(num_copies) % problem.num_experts, ends[:-1])
    return slots_of_held(held, problem.topology)
