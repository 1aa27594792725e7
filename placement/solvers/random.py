"""Experts dealt at random: what a plan buys over no plan at all."""

from __future__ import annotations

import numpy as np

from placement.solvers.contract import LayerProblem, RankOfExpert


def random(problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
    """A random permutation cut into equal parts."""
    return rng.permutation(problem.num_experts) // problem.slots_per_rank
