"""All that is known about one profile and one plan, gathered for people: what the report and `coterie inspect` show.

Knows no solver: plans other than the given one come from functions that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from placement.bootstrap import bootstrap
from placement.cost import Metrics, evaluate
from placement.placement_map import PlacementMap
from placement.runtime.results import BenchResult
from placement.sufficiency import Planner, Recommendation, convergence, recommend, some_layers, split_half, transfer
from profiler.analysis import (
    affinity_table,
    community_table,
    expert_table,
    lift,
    load_table,
    total_coactivation,
    total_load,
)
from profiler.drift import domain_table
from profiler.errors import CoterieError
from profiler.profile import Profile

MAX_LAYERS_STUDIED = 4
"""Layers, at equal distances, that a study plans for; all would take hours."""

NUM_SIZES = 6
"""Amounts of text that a study plans from, each half of the next."""

MAX_DOMAINS_STUDIED = 12
"""The largest domains, so many of which get plans of their own in a study."""


@dataclass(frozen=True)
class Study:
    """What only planning again can tell, on layers at equal distances.

    Attributes:
        layer_ids: the layers planned for.
        curve: as `sufficiency.convergence` gives it.
        halves: as `sufficiency.split_half`.
        transfer: as `sufficiency.transfer`; empty with one domain.
    """

    layer_ids: tuple[int, ...]
    curve: pd.DataFrame
    halves: pd.DataFrame
    transfer: pd.DataFrame

    @cached_property
    def recommendation(self) -> Recommendation:
        """How many tokens are enough."""
        return recommend(self.curve)


@dataclass(frozen=True)
class Insight:
    """One profile and one plan.

    Attributes:
        profile: whose counts and domains are shown.
        measured: what `maps` were measured on.
        seen: whether the plan was made with the tokens measured on.
        maps: by name, `linear`, `load` where it could be planned, and `plan`.
        metrics: of each map.
        intervals: as `bootstrap.bootstrap` gives them.
        pairs: as `pairs_beyond_chance` gives them.
        experts, loads, communities, community_of_expert, affinity, domains: tables of `profiler.analysis` and `drift`.
        study: None where it was not asked for.
        bench: the run that was measured, if there was one.
    """

    profile: Profile
    measured: Profile
    seen: bool
    maps: Mapping[str, PlacementMap]
    metrics: Mapping[str, Metrics]
    intervals: pd.DataFrame
    experts: pd.DataFrame
    loads: pd.DataFrame
    communities: pd.DataFrame
    community_of_expert: pd.DataFrame
    pairs: pd.DataFrame
    affinity: pd.DataFrame
    domains: pd.DataFrame
    study: Study | None
    bench: BenchResult | None

    @property
    def plan(self) -> PlacementMap:
        """The plan that all is about."""
        return self.maps["plan"]

    def interval(self, name: str, figure: str = "busiest_ingress") -> pd.Series[float]:
        """A row of `intervals`."""
        rows = self.intervals[(self.intervals["map"] == name) & (self.intervals["figure"] == figure)]
        return rows.iloc[0]


def gather(
    profile: Profile,
    placement: PlacementMap,
    *,
    held_out: Profile | None = None,
    load_only: Planner | None = None,
    study: Study | None = None,
    bench: BenchResult | None = None,
) -> Insight:
    """Compute every table.

    Args:
        profile: what the plan was made with, or any other traffic of the model.
        held_out: measure on this; where None, on the half of the profile that the plan has not seen.
        load_only: plans for balance alone, the peer that a plan has to beat.
        bench: the run to show beside them.

    Raises:
        CoterieError: plan or bench are for another model or other ranks, or the profile holds counts or no picks only.
    """
    placement.require_model(profile.model)
    if held_out:
        placement.require_model(held_out.model)
    ranks = placement.topology.num_ranks
    if bench is not None and not bench.on(ranks):
        raise CoterieError(
            f"the bench ran on {bench.runs[0].num_ranks} ranks, the plan is for {ranks}; bench this plan"
        )
    if bench is not None and bench.model not in (placement.model.name, profile.model.name):
        raise CoterieError(f"the bench ran {bench.model}, the plan is for {placement.model.name}; bench this plan")
    planned, measured, seen = planned_and_measured(profile, placement, held_out)
    tokens = measured.require_tokens()
    if not tokens.picked.any():
        raise CoterieError(f"none of {tokens.num_tokens} tokens is taken by an expert: nothing to judge; give others")
    maps = {"linear": PlacementMap.linear(profile.model, placement.topology, placement.num_redundant)}
    if load_only:
        maps["load"] = load_only(planned)
    # Times are of the model that was recorded, so that all maps are of weights of one type.
    maps["plan"] = replace(placement, model=replace(profile.model, num_groups=placement.model.num_groups))
    communities, community_of_expert = community_table(profile)
    return Insight(
        profile=profile,
        measured=measured,
        seen=seen,
        maps=maps,
        metrics={name: evaluate(each, tokens) for name, each in maps.items()},
        intervals=bootstrap(maps, tokens),
        experts=expert_table(profile),
        loads=load_table(profile),
        communities=communities,
        community_of_expert=community_of_expert,
        pairs=pairs_beyond_chance(profile),
        affinity=affinity_table(profile),
        domains=domain_table(profile),
        study=study,
        bench=bench,
    )


def pairs_beyond_chance(profile: Profile, most: int = 4) -> pd.DataFrame:
    """The pairs of experts that serve most tokens beyond chance, of all layers.

    Returns:
        `layer`, `expert`, `partner`, `share` of the expert's tokens, `lift`, how many times as often as chance, and
        `excess`, how many tokens more; the most first.
    """
    found = []
    loads_LE, pairs_LEE = total_load(profile), total_coactivation(profile)
    for layer, load_E, pairs_EE in zip(profile.model.layer_ids, loads_LE, pairs_LEE, strict=True):
        expert, partner = np.triu_indices(len(load_E), 1)
        together, times = pairs_EE[expert, partner], lift(pairs_EE, load_E)[expert, partner]
        excess = together * (1 - np.divide(1.0, times, out=np.ones_like(times), where=times > 0))
        some = np.argsort(-excess, kind="stable")[:most]
        share = together[some] / np.maximum(load_E[expert[some]], 1)
        columns = {"expert": expert, "partner": partner, "lift": times, "excess": excess}
        frame = pd.DataFrame({"layer": layer, "share": share, **{name: part[some] for name, part in columns.items()}})
        found.append(frame[frame["excess"] > 0])
    return pd.concat(found, ignore_index=True).nlargest(most, "excess")


def planned_and_measured(
    profile: Profile, placement: PlacementMap, held_out: Profile | None
) -> tuple[Profile, Profile, bool]:
    """What to plan peers with, what to measure on, and whether the plan has seen that.

    A plan that was compared on one half of its own profile has not seen that half; one made with all of it has.  Of a
    part of its profile, or one that was united with others, that half is not known, so that it counts as seen.
    """
    if held_out is not None:
        seen = placement.profile_digest in held_out.sources or (
            placement.profile_digest == profile.digest and held_out.digest in profile.sources
        )
        return profile, held_out, seen
    tokens = profile.require_tokens()
    if len(np.unique(tokens.sequence_ids)) < 2:
        return profile, profile, placement.profile_digest in profile.sources
    even, odd = profile.split_by_sequence()
    if placement.profile_digest != profile.digest:
        return even, odd, placement.profile_digest in profile.sources
    used = [figures["tokens_planned_on"] for figures in (placement.metrics or {}).values()]
    return even, odd, not used or used[0] != even.require_tokens().num_tokens


def study_data(
    profile: Profile,
    placement: PlacementMap,
    held_out: Profile | None,
    planner: Planner,
    on_plan: Callable[[int], None] = lambda _: None,
) -> Study | None:
    """Plan again and again, on few layers; None where there are too few sequences for that.

    Args:
        planner: for profiles with the layers that `sufficiency.some_layers` takes.
        on_plan: called as each plan is done, with how many there will be.
    """
    planned, measured, _ = planned_and_measured(profile, placement, held_out)
    if len(np.unique(planned.require_tokens().sequence_ids)) < 4:
        return None
    planned, layers = some_layers(planned, MAX_LAYERS_STUDIED)
    measured, _ = some_layers(measured, MAX_LAYERS_STUDIED)
    tokens = measured.require_tokens()
    num_tokens = planned.counts.tokens
    largest = np.argsort(-num_tokens, kind="stable")[:MAX_DOMAINS_STUDIED]
    names = [planned.domains[domain] for domain in sorted(largest) if num_tokens[domain]]
    total = 2 * (NUM_SIZES - 1) + 1 + 2 + (len(names) if len(names) > 1 else 0)

    def done() -> None:
        on_plan(total)

    curve = convergence(planned, tokens, planner, num_sizes=NUM_SIZES, on_plan=done)
    halves = split_half(planned, tokens, planner, on_plan=done)
    this = replace(
        placement,
        model=planned.model,
        physical_to_logical_map=placement.physical_to_logical_map[layers],
        metrics=None,
        certificate=None,
    )
    linear = PlacementMap.linear(planned.model, placement.topology, placement.num_redundant)
    across = transfer(planned, measured, planner, {"linear": linear, "this plan": this}, names, on_plan=done)
    return Study(planned.model.layer_ids, curve, halves, across)
