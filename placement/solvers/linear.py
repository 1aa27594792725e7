"""Experts in file order, as engines place them when they are told nothing."""

from __future__ import annotations

import numpy as np

from placement.solvers.contract import LayerProblem, RankOfExpert


def linear(problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
    """The first E/R experts on rank 0, the next on rank 1, and so on."""
    return np.arange(problem.num_experts) // problem.slots_per_rank
