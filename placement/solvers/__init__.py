"""From a profile to a placement map: one strategy a file, all behind `contract.Strategy`. Never imports the runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.layer_problem import Draws, LayerProblem, Objective
from placement.placement_map import PlacementMap
from placement.solvers.contract import Slots, Strategy
from placement.solvers.draws import drawn_parts
from placement.solvers.folds import folds_by_picks
from placement.solvers.hypergraph import hypergraph
from placement.solvers.linear import linear
from placement.solvers.load import load
from placement.solvers.metis import metis
from placement.solvers.occult import occult
from placement.solvers.partitioning import partitioning
from placement.solvers.quadratic import quadratic
from placement.solvers.random import random
from placement.solvers.search import search
from placement.solvers.spectral import spectral
from placement.timing import Workload, has_times, linear_costs, touching_share
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.profile import Profile
from profiler.spec import MoESpec
from profiler.trace import TokenTrace

STRATEGIES: dict[str, Strategy] = {
    "linear": linear,
    "random": random,
    "load": load,
    "occult": occult,
    "metis": metis,
    "spectral": spectral,
    "quadratic": quadratic,
    "hypergraph": hypergraph,
    "partitioning": partitioning,
    "search": search,
}
"""In the order of tables: without planning, with balancing only, with traffic only, the optimum of the planned tokens
where sizes allow, and the project's search."""

ALWAYS_COMPARED = ("linear", "random", "load", "search")
"""What every plan is shown beside: file order, chance, balance alone, the search."""

LOAD_CAP_OF_ONE_EXPERT = 0.5
"""The default load cap is 1 + this / slots a rank, between the next two: the fewer experts a rank holds, the more
traffic it costs to balance them.  Chosen on recorded routing, see docs/log.md."""

LEAST_LOAD_CAP = 1.06
"""Of the default."""

MOST_LOAD_CAP = 1.15
"""Of the default."""

HALVINGS = 2
"""Sequences are halved so often where they differ most: a plan has to be good on each of these folds too, so that it
stays good where traffic comes to differ in what it did differ in.  How other folds did is in docs/log.md."""

FEWEST_SEQUENCES = 64
"""With fewer there are no folds by picks: a quarter of them would tell of single texts rather than of a kind of text.
Recorded traces had 23 and 176 to plan on, the first better without folds, see docs/log.md."""

SHRINKAGE = 6.0
"""Few sequences foretell how many ranks a token visits, and hardly which rank will be the busiest: planned on S
sequences, the mean rank's ingress counts `SHRINKAGE` / S of what the busiest one's does, at most as much; both together
what the busiest one's would.  Chosen on recorded routing, see docs/log.md."""

TOGETHER = 0.9
"""What all tokens together count beside the mean over folds: a fold overstates how far sequences differ."""

TRANSFER_TO_COMPUTE = 2.5
"""How many times as long as a random plan's experts its dispatch, and its combine, are taken to last without links."""

OBJECTIVES = ("time", "fan-out", "balance", "collaboration")
"""What a plan can be made for; see `objective_of`."""


@dataclass(frozen=True)
class Options:
    """How to plan.

    Attributes:
        objective: one of `OBJECTIVES`.
        workload: what the layers are given, for `time` on a topology with links.
        load_cap: the largest load of a rank that is wanted, over the mean; None for `default_load_cap` or as near as
            can be.
        num_redundant: copies beyond one of each expert.
        seed: the same seed gives the same plan.
        num_kicks: rounds of the search; more take longer and find more.  None for 80, or fewer for large layers.
        time_budget: seconds after which the search takes what it has; the same seed may then give another plan.
        domain_weights: what each domain counts, its tokens together; others count 0.  None for all tokens alike.
        worst_domain: plan for the domain that the plan is worst for, instead of for the mixture.
        preserve_groups: keep the router's groups together, so that a permuted checkpoint stays exact.
    """

    objective: str = "time"
    workload: Workload = field(default_factory=lambda: Workload(4096))
    load_cap: float | None = None
    num_redundant: int = 0
    seed: int = 0
    num_kicks: int | None = None
    time_budget: float | None = None
    domain_weights: Mapping[str, float] | None = None
    worst_domain: bool = False
    preserve_groups: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise CoterieError(f"objective {self.objective!r}: must be one of {', '.join(OBJECTIVES)}")
        if self.load_cap is not None and not 1 <= self.load_cap < math.inf:
            raise CoterieError(
                f"load cap {self.load_cap}: must be a number of at least 1, no rank can stay below the mean"
            )
        for name, value in (
            ("seed", self.seed),
            ("redundant experts", self.num_redundant),
            ("kicks", self.num_kicks or 0),
        ):
            if value < 0:
                raise CoterieError(f"{name} {value}: must be at least 0")
        if self.time_budget is not None and not 0 < self.time_budget < math.inf:
            raise CoterieError(f"time budget {self.time_budget}: must be a number above 0, in seconds")
        if self.worst_domain and self.objective == "collaboration":
            raise CoterieError("collaboration is counted over all tokens, no domain has its own: leave --robust out")
        if self.domain_weights is not None and self.worst_domain:
            raise CoterieError("domain weights and the worst domain: each domain counts alone there; leave one out")
        for domain, weight in (self.domain_weights or {}).items():
            if not 0 <= weight < math.inf:
                raise CoterieError(f"weight of domain {domain!r} {weight}: must be a number of at least 0")


def plan(
    profile: Profile,
    topology: Topology,
    strategy: str = "search",
    options: Options | None = None,
    *,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """Place the experts of every layer.

    Args:
        profile: must hold token sets.
        topology: with a slot at least for each expert and each redundant one.
        strategy: a name in `STRATEGIES`.
        on_layer: called as each layer is done.

    Raises:
        CoterieError: an unknown strategy or domain, too few slots, a load cap that cannot be kept, or a counts-only
            profile.
    """
    options = options or Options()
    require_strategy(strategy)
    return plan_layers(profile, topology, layer_problems(profile, topology, options), strategy, options, on_layer)


def require_strategy(name: str) -> None:
    """Check that there is such a strategy.

    Raises:
        CoterieError: there is not.
    """
    if name not in STRATEGIES:
        raise CoterieError(f"strategy {name!r}: must be one of {', '.join(STRATEGIES)}")


def plan_layers(
    profile: Profile,
    topology: Topology,
    problems: Sequence[LayerProblem],
    strategy: str,
    options: Options,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """`plan` for whoever asks several strategies to solve the same `layer_problems`; errors as there."""
    if options.load_cap is not None:
        for layer_id, problem in zip(profile.model.layer_ids, problems, strict=True):
            _require_feasible(problem, layer_id)
    place = STRATEGIES[strategy]
    if strategy == "search":
        turns = -(-len(problems) // (os.cpu_count() or 1))  # of layers, as many at once as there are processors
        seconds = None if options.time_budget is None else options.time_budget / turns
        place = partial(search, num_kicks=options.num_kicks, seconds=seconds)

    def of_layer(layer: int) -> Slots:
        slots = place(problems[layer], np.random.default_rng((options.seed, layer)))
        on_layer()
        return slots

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        slots_LP = np.stack(list(pool.map(of_layer, range(len(problems)))))
    solver = {"name": strategy, "options": _to_json(options, topology), "seed": options.seed}
    return PlacementMap(profile.model, topology, slots_LP, solver, profile.digest)


def options_of(placement: PlacementMap) -> Options:
    """What a map was planned for: objective, workload, weights of domains and groups; else the defaults.

    Raises:
        CoterieError: the map says it in a way that is none.
    """
    try:
        said = placement.solver.get("options") or {}
        workload = Workload(**{"tokens_per_rank": 4096, **said.get("workload", {})})
        kept = ("objective", "domain_weights", "preserve_groups")
        return Options(workload=workload, **{name: said[name] for name in kept if name in said})
    except (AttributeError, TypeError) as error:
        raise CoterieError(f"the plan's solver.options are none ({error}); plan again") from error


def layer_problems(profile: Profile, topology: Topology, options: Options) -> list[LayerProblem]:
    """The task of each layer.

    Raises:
        CoterieError: an unknown domain, too few slots, or a counts-only profile.
    """
    model, tokens = profile.model, profile.require_tokens()
    if topology.num_slots < model.num_experts + options.num_redundant:
        raise CoterieError(
            f"{topology.num_slots} slots for {model.num_experts} experts and {options.num_redundant} redundant ones: "
            "give as many slots as experts at least"
        )
    weights_T = _weights(tokens, profile.domains, options)
    if weights_T is not None:
        tokens, weights_T = tokens.where(weights_T > 0), weights_T[weights_T > 0]
    folds_T = _folds(tokens, options)
    if options.preserve_groups and model.num_groups == 1:
        raise CoterieError(
            "groups cannot be preserved: the profile knows of none; leave --preserve-groups out, or import it with "
            "--model where the router has some"
        )
    if options.preserve_groups and (topology.num_slots != model.num_experts or options.num_redundant):
        raise CoterieError("groups can only be preserved with one slot for each expert and no redundant ones")
    objective = objective_of(model, topology, options)
    drawn = _drawn(tokens, folds_T, options)
    if drawn is not None:
        objective = _shrunk(objective, len(np.unique(tokens.sequence_ids)), topology.num_ranks)
    problems = []
    for ids_TK in tokens.topk_ids:
        problem = LayerProblem.from_ids(
            ids_TK,
            model.num_experts,
            topology,
            options.load_cap or default_load_cap(topology),
            folds_T=folds_T,
            weights_T=weights_T,
            num_redundant=options.num_redundant,
            num_groups=model.num_groups if options.preserve_groups else 1,
            objective=objective,
            worst_fold=options.worst_domain,
            together=0.0 if options.num_redundant else TOGETHER,  # with copies it makes no difference
        )
        if drawn is not None:
            part_T, times = drawn
            counted_T = np.ones(tokens.num_tokens) if weights_T is None else weights_T
            problem = replace(problem, draws=Draws(ids_TK, part_T, counted_T, times))
        problems.append(problem)
    return problems


def default_load_cap(topology: Topology) -> float:
    """The largest load over the mean that is wanted where the user names none."""
    return min(max(LEAST_LOAD_CAP, 1 + LOAD_CAP_OF_ONE_EXPERT / topology.slots_per_rank), MOST_LOAD_CAP)


def objective_of(model: MoESpec, topology: Topology, options: Options) -> Objective:
    """The objective in the units of `layer_problem.Objective`.

    `time` on a topology with links is the slope of `predicted_time`.  Without links, or where the model's sizes are not
    known, dispatch and combine are each taken to last `TRANSFER_TO_COMPUTE` times as long as a random plan's experts.
    """
    if options.objective == "fan-out":
        return Objective(fan_out=1.0)
    if options.objective == "balance":
        return Objective(load=1.0)
    if options.objective == "collaboration":
        return Objective(collaboration=1.0)
    if has_times(model, topology):
        return linear_costs(model, topology, options.workload)
    if options.workload.mode == "per-expert":
        return Objective(load=1.0)
    across = 0.5 if topology.num_nodes > 1 else 0.0
    return Objective(
        ingress=2 * TRANSFER_TO_COMPUTE * (1 - across) / touching_share(model, topology.num_ranks),
        node_ingress=2 * TRANSFER_TO_COMPUTE * across / touching_share(model, topology.num_nodes),
        load=1.0,
    )


def _folds(tokens: TokenTrace, options: Options) -> npt.NDArray[np.int64]:
    """The fold of each token, 0 .. F-1 all with tokens.

    The domain if the worst domain counts, else by what sequences pick.  With copies, sequences are dealt to folds in
    turn: tokens' choices make up for what differs between sequences; a plan that did so too would pay in traffic.
    """
    if options.worst_domain:
        _, folds = np.unique(tokens.domain_ids, return_inverse=True)
        return folds.astype(np.int64)
    if options.num_redundant:
        sequences, place = np.unique(tokens.sequence_ids, return_inverse=True)
        in_turn: npt.NDArray[np.int64] = place % min(2**HALVINGS, len(sequences))
        return in_turn
    few = len(np.unique(tokens.sequence_ids)) < FEWEST_SEQUENCES
    return folds_by_picks(tokens, 0 if few else HALVINGS)


def _drawn(
    tokens: TokenTrace, folds_T: npt.NDArray[np.int64], options: Options
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """`draws.drawn_parts` of the tokens; None where draws would say nothing.

    What is a sum over tokens has no busiest place, the worst domain has its own folds, copies have their own search.
    """
    if options.num_redundant or options.worst_domain or options.objective in ("fan-out", "collaboration"):
        return None
    sequences, sequence_T = np.unique(tokens.sequence_ids, return_inverse=True)
    return drawn_parts(sequence_T, folds_T, options.seed) if len(sequences) > 1 else None


def _shrunk(objective: Objective, num_sequences: int, num_ranks: int) -> Objective:
    """Part of what the busiest rank's ingress counts is counted of the mean rank's instead, see `SHRINKAGE`."""
    counted = min(1.0, SHRINKAGE / num_sequences)
    busiest = objective.ingress / (1 + counted)
    return replace(objective, ingress=busiest, fan_out=counted * busiest / num_ranks)


def _weights(tokens: TokenTrace, domains: tuple[str, ...], options: Options) -> npt.NDArray[np.float64] | None:
    """What each token counts: its domain's weight, shared by the domain's tokens."""
    if options.domain_weights is None:
        return None
    unknown = sorted(set(options.domain_weights) - set(domains))
    if unknown:
        raise CoterieError(f"domain {unknown[0]!r}: the profile has {', '.join(domains)}")
    per_domain = np.array([options.domain_weights.get(domain, 0.0) for domain in domains])
    per_domain /= max(per_domain.max(), 1e-300)  # only their ratios count, and no sum of them may overflow
    tokens_of = np.bincount(tokens.domain_ids, minlength=len(domains))
    per_token = per_domain * tokens.num_tokens / np.maximum(tokens_of, 1)
    weights: npt.NDArray[np.float64] = per_token[tokens.domain_ids]
    if not weights.any():
        raise CoterieError("the domains with a weight have no token; give a weight to one that has")
    return weights


def _require_feasible(problem: LayerProblem, layer_id: int) -> None:
    """Check that the hottest expert and the coldest company that it can have stay below the load cap.

    Raises:
        CoterieError: they do not; the message says how many redundant experts would help.
    """
    load = problem.expert_load
    if not load.any():
        return
    mean = load.sum() / problem.num_ranks
    # Slots may stay empty: so many share its rank where all others are full.
    company = max(problem.num_experts - problem.slots_per_rank * (problem.num_ranks - 1) - 1, 0)
    coldest = np.sort(load)[:company].sum()
    hottest = int(load.argmax())
    room = problem.load_cap * mean * (1 + 1e-12) - coldest
    copies = np.ceil(load / max(room, 1e-300)) if room > 0 else np.full(len(load), np.inf)
    wanted = float((copies - 1).clip(min=0).sum())
    if wanted > problem.num_redundant:
        remedy = f"give at least {wanted:.0f} redundant experts or a" if wanted < 1e6 else "give a"
        raise CoterieError(
            f"layer {layer_id}: load cap {problem.load_cap:g} cannot be kept, expert {hottest} alone takes "
            f"{load[hottest] / load.sum():.1%} of all picks and a rank's mean is {1 / problem.num_ranks:.1%}; "
            f"{remedy} load cap of {math.ceil(100 * (load[hottest] + coldest) / mean - 1e-9) / 100:.2f} or more"
        )


def _to_json(options: Options, topology: Topology) -> dict[str, Any]:
    value = asdict(options)
    value["load_cap"] = options.load_cap or default_load_cap(topology)
    value.pop("seed")
    return value
