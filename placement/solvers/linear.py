"""Experts in file order, as engines place them when they are told nothing. Looks at no token."""

from __future__ import annotations

import numpy as np

from placement.layer_problem import LayerProblem
from placement.placement_map import linear_slots
from placement.solvers.contract import Slots


def linear(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """The slots of `linear_slots`, which any map without a plan has."""
    return linear_slots(problem.num_experts, problem.num_redundant, problem.topology)
