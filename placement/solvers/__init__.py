"""From a profile to a placement map: one strategy a file, all behind `contract.Strategy`. Never imports the runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from placement.placement_map import PlacementMap
from placement.solvers.contract import LayerProblem, Strategy
from placement.solvers.linear import linear
from placement.solvers.load import load
from placement.solvers.random import random
from placement.solvers.search import search
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.profile import Profile

STRATEGIES: dict[str, Strategy] = {"linear": linear, "random": random, "load": load, "search": search}
"""In the order of tables: what one gets without planning, with balancing only, and with the project's own search."""

DEFAULT_LOAD_CAP = 1.1


def plan(
    profile: Profile,
    topology: Topology,
    strategy: str = "search",
    *,
    load_cap: float = DEFAULT_LOAD_CAP,
    seed: int = 0,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """Place the experts of every layer.

    Args:
        profile: must hold token sets.
        topology: with one slot for each expert.
        strategy: a name in `STRATEGIES`.
        load_cap: the largest load of a rank that is wanted, over the mean load.
        on_layer: called as each layer is done.

    Raises:
        CoterieError: an unknown strategy, a cap below 1, a negative seed, slots that do not fit the experts, or a
            counts-only profile.
    """
    if strategy not in STRATEGIES:
        raise CoterieError(f"strategy {strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if not 1 <= load_cap < float("inf"):
        raise CoterieError(f"load cap {load_cap}: must be a number of at least 1, no rank can stay below the mean")
    if seed < 0:
        raise CoterieError(f"seed {seed}: must be at least 0")
    if topology.num_slots != profile.model.num_experts:
        raise CoterieError(f"{topology.num_slots} slots for {profile.model.num_experts} experts: must be equal")
    ids_LTK = profile.require_tokens().topk_ids

    def place(layer: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        problem = LayerProblem.from_ids(ids_LTK[layer], profile.model.num_experts, topology.num_ranks, load_cap)
        rank_of_expert = STRATEGIES[strategy](problem, np.random.default_rng((seed, layer)))
        on_layer()
        return rank_of_expert

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ranks: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = list(pool.map(place, range(len(ids_LTK))))
    solver = {"name": strategy, "options": {"load_cap": load_cap}, "seed": seed}
    return PlacementMap.from_ranks(profile.model, topology, np.stack(ranks), solver, profile.digest)
