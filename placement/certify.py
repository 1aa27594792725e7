"""How far a plan is from the best there can be: lower bounds for one layer, and proven optima where sizes allow.
Knows no strategy.

Everything is for plans without redundant experts (as many slots as experts), on the planned tokens merged into one
fold, among plans within the load cap.  Token counts are whole numbers and bounds are proved in whole numbers, so a gap
of 0 is a proof and no tolerance.  Which method applies follows from E experts and m experts a rank:

- set partitioning: all groups of m experts are enumerated; relaxation first, then branching (`placement/partition.py`);
- matching: for m = 2 a plan is a perfect matching of the experts (Edmonds, 1965);
- counting: where groups cannot be enumerated, or there is one rank; valid, but no tight bound is known.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import numpy.typing as npt

from placement.columns import Columns, Ints, all_columns, can_enumerate
from placement.layer_problem import LayerProblem
from placement.partition import NEVER, Solved, least_maximum, least_sum
from profiler.errors import CoterieError

MAX_MATCHED = 64
"""Experts up to which m = 2 is solved as a matching: networkx takes seconds there; set partitioning is faster above."""

NUM_MULTIPLIERS = 65
"""Prices of load that the counting bound tries; any of them is valid."""


@dataclass(frozen=True)
class Bound:
    """One metric of a plan beside the least that any plan can have.

    Attributes:
        value: of the plan.
        bound: no plan within the load cap is below it.
        method: "set partitioning" (the bound is the optimum), "matching" (likewise), "relaxation" (time ran out) or
            "counting".
    """

    value: float
    bound: float
    method: str

    @property
    def gap(self) -> float:
        """Value over bound, less 1: the plan is at most this much above the best."""
        return self.value / self.bound - 1 if self.bound else 0.0

    @property
    def optimal(self) -> bool:
        """Whether the plan is proved to be a best one."""
        return self.value <= self.bound


@dataclass(frozen=True)
class Certificate:
    """What is proved about the plan of one layer.

    Attributes:
        fan_out: mean over tokens of the ranks that serve a token.
        busiest_ingress: share of tokens that reach the busiest rank.
        load_cap: bounds are over plans within it: the problem's cap, or the plan's own imbalance where that is higher.
        statement: what is proved, in words.
    """

    fan_out: Bound
    busiest_ingress: Bound
    load_cap: float
    statement: str

    def to_json(self) -> dict[str, Any]:
        """The form in which a placement map holds it."""
        metrics = {
            name: {**asdict(bound), "gap": bound.gap, "optimal": bound.optimal}
            for name, bound in (("fan_out", self.fan_out), ("busiest_ingress", self.busiest_ingress))
        }
        return {**metrics, "load_cap": self.load_cap, "statement": self.statement}


class Optimum(NamedTuple):
    """The best plan found and what is proved about all plans within the load cap.

    Attributes:
        rank_of_expert: int64 (E,), None where no plan keeps the load cap or none was found in time.
        bound: no plan within the cap is below it; the plan's own value where it is optimal; inf where there is none.
        message: one line for people.
    """

    rank_of_expert: Ints | None
    bound: float
    message: str


def certify(problem: LayerProblem, rank_of_expert: npt.ArrayLike, time_limit: float = 60.0) -> Certificate:
    """Bound what any plan could reach, and say how far this one is from it.

    Args:
        rank_of_expert: int (E,), `slots_per_rank` experts on each rank.
        time_limit: seconds, both metrics together, after groups are enumerated (half a minute at most).

    Raises:
        CoterieError: as `optimal_busiest_ingress` does.
    """
    problem = _checked(problem)
    plan = _checked_plan(problem, rank_of_expert)
    problem = replace(problem, load_cap=max(problem.load_cap, _imbalance(problem, plan)))
    columns = _columns(problem)
    started = time.perf_counter()
    ingress, total = _ingress(problem, plan), problem.total_weight
    busiest = _least(problem, columns, plan, started + time_limit / 2, busiest=True)
    fan_out = _least(problem, columns, plan, started + time_limit, busiest=False)
    bounds = (
        Bound(float(ingress.sum()) / total, fan_out.bound / total, fan_out.method),
        Bound(float(ingress.max()) / total, busiest.bound / total, busiest.method),
    )
    return Certificate(*bounds, problem.load_cap, _statement(problem, *bounds))


def optimal_busiest_ingress(problem: LayerProblem, start: npt.ArrayLike, time_limit: float = 60.0) -> Optimum:
    """The least possible ingress of the busiest rank within the load cap; of such plans, one of low fan_out.

    Args:
        start: int (E,), rank_of_expert of any plan; a good one saves time.
        time_limit: seconds, after groups are enumerated (half a minute at most).

    Raises:
        CoterieError: redundant or empty slots, weights that are not whole, or a plan that does not fit the ranks.
    """
    problem = _checked(problem)
    columns = _columns(problem)
    deadline = time.perf_counter() + time_limit
    found = _least(problem, columns, _checked_plan(problem, start), deadline, busiest=True)
    if found.ranks is not None and columns is not None:
        found = found._replace(ranks=_then_fan_out(problem, columns, found.ranks, deadline))
    return _optimum(problem, "busiest_ingress", found)


def optimal_fan_out(problem: LayerProblem, start: npt.ArrayLike, time_limit: float = 60.0) -> Optimum:
    """The least possible fan_out within the load cap; arguments and errors as for `optimal_busiest_ingress`."""
    problem = _checked(problem)
    columns = _columns(problem)
    deadline = time.perf_counter() + time_limit
    found = _least(problem, columns, _checked_plan(problem, start), deadline, busiest=False)
    return _optimum(problem, "fan_out", found)


class _Found(NamedTuple):
    """A plan within the cap if one is known, a bound in tokens and how it was proved; inf where there is no plan."""

    ranks: Ints | None
    bound: float
    method: str


def _is_matching(problem: LayerProblem) -> bool:
    return problem.slots_per_rank == 2 and problem.num_experts <= MAX_MATCHED


def _columns(problem: LayerProblem) -> Columns | None:
    """All groups, where set partitioning is the method."""
    if _is_matching(problem) or problem.num_ranks == 1 or not can_enumerate(problem):
        return None
    return all_columns(problem, _load_limit(problem))


def _least(problem: LayerProblem, columns: Columns | None, start: Ints, deadline: float, *, busiest: bool) -> _Found:
    """The least busiest ingress, or the least fan_out."""
    count, solve = (_busiest_by_counting, least_maximum) if busiest else (_fan_out_by_counting, least_sum)
    counted = _Found(start if _fits(problem, start) else None, count(problem), "counting")
    if _is_matching(problem):
        return _better(_matched(problem, deadline, busiest=busiest), counted)
    if columns is None:
        return counted
    solved = solve(columns, problem.num_ranks, _rows(problem, columns, start), deadline)
    return _better(_partitioned(solved, columns), counted)


def _better(solved: _Found, counted: _Found) -> _Found:
    """The higher of two bounds: counting has one even where no time was left for anything else."""
    return solved if solved.bound >= counted.bound else solved._replace(bound=counted.bound, method="counting")


def _then_fan_out(problem: LayerProblem, columns: Columns, ranks: Ints, deadline: float) -> Ints:
    """The plan of least fan_out whose busiest rank is no busier than in the given one."""
    within = columns.first(columns.up_to(int(_ingress(problem, ranks).max())))
    solved = least_sum(within, problem.num_ranks, _rows(problem, within, ranks), deadline)
    assert solved.rows is not None
    return _ranks_of(within.members[solved.rows])


def _partitioned(solved: Solved, columns: Columns) -> _Found:
    ranks = None if solved.rows is None else _ranks_of(columns.members[solved.rows])
    bound = np.inf if solved.bound == NEVER else float(solved.bound)
    return _Found(ranks, bound, "set partitioning" if solved.bound == solved.value else "relaxation")


def _matched(problem: LayerProblem, deadline: float, *, busiest: bool) -> _Found:
    """Experts are vertices, pairs within the load cap edges, and a plan is a perfect matching."""
    load = problem.expert_load
    a, b = np.triu_indices(problem.num_experts, 1)
    within = load[a] + load[b] <= _load_limit(problem)
    a, b = a[within], b[within]
    ingress = (load[a] + load[b] - problem.coactivation[a, b]).astype(np.int64)

    def perfect(most: int) -> Ints | None:
        graph: nx.Graph[int] = nx.Graph()
        graph.add_weighted_edges_from((a[i], b[i], int(ingress[i])) for i in np.flatnonzero(ingress <= most))
        pairs = nx.min_weight_matching(graph)
        return np.array(sorted(pairs)) if len(pairs) == problem.num_ranks else None

    thresholds = np.unique(ingress)
    pairs = perfect(int(thresholds[-1])) if len(thresholds) else None
    if pairs is None:
        return _Found(None, np.inf, "matching")
    low, high = 0, len(thresholds) - 1
    while busiest and low < high:
        if time.perf_counter() > deadline:  # below the lowest threshold left there is none
            return _Found(_ranks_of(pairs), float(thresholds[low]), "relaxation")
        middle = (low + high) // 2
        found = perfect(int(thresholds[middle]))
        if found is None:
            low = middle + 1
        else:
            pairs, high = found, middle
    ranks = _ranks_of(pairs)
    return _Found(
        ranks, float(_ingress(problem, ranks).max() if busiest else _ingress(problem, ranks).sum()), "matching"
    )


def _shares_by_counting(problem: LayerProblem) -> npt.NDArray[np.float64]:
    """Tokens (E,) that each expert brings to its rank at least, where those that n of its experts share count 1/n each.

    Let x be how many of the m - 1 others on its rank a token of the expert picked too.  Its share is 1 / (1 + x),
    which is convex, so that the mean of x bounds the mean share (Jensen).  The sum of x is a sum of co-activations
    over the others; what others fit beside it within the load cap is relaxed with a price on load.
    """
    load, together = problem.expert_load, problem.coactivation
    others = problem.slots_per_rank - 1
    if others == 0:
        return load
    room = _load_limit(problem) - load
    most = np.full(problem.num_experts, np.inf)
    steepest = 2 * together.max() / max(load.mean(), 1e-9)
    for multiplier in np.linspace(0, steepest, NUM_MULTIPLIERS):
        worth = together - multiplier * load
        np.fill_diagonal(worth, -np.inf)
        most = np.minimum(most, np.sort(worth, axis=1)[:, -others:].sum(axis=1) + multiplier * room)
    mean = np.divide(np.maximum(most, 0), load, out=np.zeros(len(load)), where=load > 0)
    picks = np.arange(problem.sets.shape[1])
    shares: npt.NDArray[np.float64] = load * np.interp(mean, picks, 1 / (1 + picks))
    return shares


def _fan_out_by_counting(problem: LayerProblem) -> float:
    """Tokens times ranks, at least: from shares, and as ceil(experts of a token / m)."""
    ranks = -(-(problem.sets >= 0).sum(axis=1) // problem.slots_per_rank)
    by_shares = np.ceil(_shares_by_counting(problem).sum() * (1 - 1e-9))
    return float(max(by_shares, (ranks * problem.weights).sum()))


def _busiest_by_counting(problem: LayerProblem) -> float:
    """Tokens of the busiest rank, at least: the mean rank, and the rank of each expert with the best others."""
    mean = -(-_fan_out_by_counting(problem) // problem.num_ranks)
    others = problem.slots_per_rank - 1
    if others == 0:
        return float(problem.expert_load.max())
    load, shares = problem.expert_load, _shares_by_counting(problem)
    pairs = load[:, None] + load - problem.coactivation
    np.fill_diagonal(pairs, np.inf)
    np.fill_diagonal(pairs, load)
    # Of m - 1 others the one that adds most adds at least what the (m - 1)-th best pair does.
    by_pairs = np.sort(pairs, axis=1)[:, others].max()
    cheapest = np.sort(shares)[:others].sum()
    by_shares = np.ceil((shares.max() + cheapest) * (1 - 1e-9))
    return float(max(mean, by_pairs, by_shares))


def _groups(problem: LayerProblem, ranks: Ints) -> Ints:
    """Experts of each rank, int64 (R, m), ascending."""
    return np.argsort(ranks, kind="stable").reshape(problem.num_ranks, -1)


def _rows(problem: LayerProblem, columns: Columns, ranks: Ints) -> Ints | None:
    """Columns of a plan, None where it is not within the load cap."""
    return columns.rows_of(_groups(problem, ranks)) if _fits(problem, ranks) else None


def _ranks_of(groups: npt.NDArray[np.integer]) -> Ints:
    """rank_of_expert (E,) of the groups (R, m), ranks in the order of their first experts."""
    groups = np.sort(groups, axis=1)
    out = np.empty(groups.size, dtype=np.int64)
    for rank, group in enumerate(groups[np.argsort(groups[:, 0])]):
        out[group] = rank
    return out


def _ingress(problem: LayerProblem, ranks: Ints) -> npt.NDArray[np.float64]:
    """Tokens that reach each rank, float64 (R,)."""
    rank_of_pick = np.append(ranks, problem.num_ranks)[problem.sets]  # -1 is no expert and on no rank
    reached = np.zeros((len(problem.sets), problem.num_ranks + 1), dtype=bool)
    for column in rank_of_pick.T:
        reached[np.arange(len(column)), column] = True
    tokens: npt.NDArray[np.float64] = problem.weights @ reached[:, :-1]
    return tokens


def _load_limit(problem: LayerProblem) -> float:
    """Largest load of a rank within the cap; a millionth of a token stands for rounding in the cap itself."""
    return problem.load_cap * float(problem.expert_load.sum()) / problem.num_ranks + 1e-6


def _imbalance(problem: LayerProblem, ranks: Ints) -> float:
    load = problem.rank_load(ranks)
    return float(load.max() / load.mean()) if load.any() else 1.0


def _fits(problem: LayerProblem, ranks: Ints) -> bool:
    return bool(problem.rank_load(ranks).max() <= _load_limit(problem))


def _checked(problem: LayerProblem) -> LayerProblem:
    """The problem in one fold."""
    if problem.topology.num_slots != problem.num_experts:
        raise CoterieError(
            f"{problem.topology.num_slots} slots for {problem.num_experts} experts: bounds are known without redundant "
            "experts only; plan with as many slots as experts"
        )
    if (problem.weights != np.floor(problem.weights)).any():
        raise CoterieError("proofs count tokens, these have weights; plan without --domain-weight, or use 'search'")
    return problem.merged()


def _checked_plan(problem: LayerProblem, ranks: npt.ArrayLike) -> Ints:
    plan = np.asarray(ranks, dtype=np.int64)
    equal = [problem.slots_per_rank] * problem.num_ranks
    if plan.shape != (problem.num_experts,) or plan.min() < 0 or np.bincount(plan).tolist() != equal:
        raise CoterieError(
            f"the plan must put {problem.slots_per_rank} of {problem.num_experts} experts on each of "
            f"{problem.num_ranks} ranks"
        )
    return plan


def _optimum(problem: LayerProblem, metric: str, found: _Found) -> Optimum:
    bound = found.bound / problem.total_weight
    if found.ranks is not None:
        proved = "is the least there is" if found.method in ("set partitioning", "matching") else "is a lower bound"
        return Optimum(found.ranks, bound, f"{metric} {bound:.4f} {proved} within a load cap of {problem.load_cap:g}")
    load = np.sort(problem.expert_load)
    least = load[-1] + load[: problem.slots_per_rank - 1].sum()
    mean = load.sum() / problem.num_ranks
    what = "no plan keeps" if found.bound == np.inf else "no plan was found that keeps"
    hottest = int(problem.expert_load.argmax())
    return Optimum(
        None,
        bound,
        f"{what} a load cap of {problem.load_cap:g}: the hottest expert, {hottest}, beside the coldest makes the load "
        f"of its rank {least / mean:.3f} of the mean; raise the cap or add redundant experts",
    )


def _statement(problem: LayerProblem, fan_out: Bound, busiest: Bound) -> str:
    words = []
    for name, bound in (("fan_out", fan_out), ("busiest_ingress", busiest)):
        if bound.optimal:
            words.append(f"{name} {bound.value:.4f} is proved optimal ({bound.method})")
        else:
            words.append(f"{name} {bound.value:.4f} is at most {bound.gap:.2%} above the best ({bound.method})")
    if "counting" in (fan_out.method, busiest.method) and problem.num_ranks > 1:
        size = f"{problem.num_experts} experts, {problem.slots_per_rank} a rank"
        words.append(
            f"time ran out before a tight bound was found ({size}); give --certify more seconds"
            if can_enumerate(problem)
            else f"no tight bound is known at this size ({size})"
        )
    return "; ".join(words)
