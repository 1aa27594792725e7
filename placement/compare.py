"""Every strategy on one profile, side by side, with the figures of the traffic that none of them has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.solvers import DEFAULT_LOAD_CAP, STRATEGIES, plan
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.profile import Profile


def plan_and_compare(
    profile: Profile,
    topology: Topology,
    strategy: str = "search",
    *,
    held_out: Profile | None = None,
    load_cap: float = DEFAULT_LOAD_CAP,
    seed: int = 0,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """The plan of one strategy, with `metrics` that compare all of them.

    Args:
        held_out: measure on this profile; where None, plan with the even sequences and measure on the odd ones.
        on_layer: called as each layer of each strategy is done.

    Raises:
        CoterieError: as `plan` does, or the two profiles are of different models.
    """
    source = profile.digest
    if held_out is None:
        profile, held_out = profile.split_by_sequence()
    elif not profile.model.routes_like(held_out.model):
        raise CoterieError(
            f"the profile is of {profile.model.describe()}, the held-out one of {held_out.model.describe()}; "
            "record both on one model"
        )
    if strategy not in STRATEGIES:
        raise CoterieError(f"strategy {strategy!r}: must be one of {', '.join(STRATEGIES)}")
    train, unseen = profile.require_tokens(), held_out.require_tokens()
    metrics, maps = {}, {}
    for name in STRATEGIES:
        maps[name] = plan(profile, topology, name, load_cap=load_cap, seed=seed, on_layer=on_layer)
        metrics[name] = {
            "train": evaluate(maps[name], train).summary(),
            "held_out": evaluate(maps[name], unseen).summary(),
            "tokens_planned_on": train.num_tokens,
            "tokens_measured_on": unseen.num_tokens,
        }
    return replace(maps[strategy], metrics=metrics, profile_digest=source)
