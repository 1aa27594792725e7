"""The optimum of the planned tokens: set partitioning with a proof, where groups of experts can be enumerated.
Knows no copies, and proves nothing itself: `placement/certify.py` does.

Where its minute a layer is enough for the proof, no plan within the load cap has a lower busiest ingress, or where that
is the objective fan_out, on the tokens that this one was made of; `--certify` says where.  It fits them: on other
sequences of recorded routing it reaches what the search's does to less than 1%, and is less balanced.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.layer_problem import LayerProblem, Objective
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.load import load as load_only
from placement.solvers.search import ranks_of, search
from profiler.errors import CoterieError

SECONDS = 60.0
"""A layer, at most; then the best plan found is taken without a proof.  64 experts on 16 ranks take 4."""


def partitioning(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """The least busiest ingress on the planned tokens within the load cap; of such plans, one of low fan_out.

    With the objective fan-out it is the least fan_out.

    Where the load-only plan breaks the cap, its largest load stands for it, as in the search.

    Raises:
        CoterieError: there are free slots or groups to preserve, groups of experts are too many to enumerate, or token
            weights are not whole.
    """
    # Imports networkx and scipy's optimizers, which other strategies need not wait for.
    from placement.certify import optimal_busiest_ingress, optimal_fan_out
    from placement.columns import can_enumerate

    if problem.num_groups > 1:
        raise CoterieError("strategy 'partitioning' knows of no groups to preserve; use 'search'")
    if problem.topology.num_slots != problem.num_experts:
        raise CoterieError(
            f"strategy 'partitioning' fills every slot with an expert of its own, and there are "
            f"{problem.topology.num_slots} slots for {problem.num_experts} experts; use 'search'"
        )
    if problem.num_ranks > 1 and not can_enumerate(problem):
        raise CoterieError(
            f"strategy 'partitioning' enumerates all groups of {problem.slots_per_rank} of {problem.num_experts} "
            "experts, which are too many; use more ranks, or 'search'"
        )
    balanced = ranks_of(load_only(problem, rng), problem)
    load = problem.rank_load(balanced)
    load_cap = max(problem.load_cap, float(load.max() / max(load.mean(), 1e-300)))
    for_fan_out = problem.objective.fan_out > 0 and not problem.objective.ingress
    objective = Objective(fan_out=1.0) if for_fan_out else Objective(ingress=1.0)
    problem = replace(problem.merged(), load_cap=load_cap, objective=objective, worst_fold=False, draws=None)
    start = ranks_of(search(problem, rng), problem)
    found = (optimal_fan_out if for_fan_out else optimal_busiest_ingress)(problem, start, SECONDS)
    return slots_of_ranks(start if found.rank_of_expert is None else found.rank_of_expert, problem.topology)
