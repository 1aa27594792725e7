"""The project's own search: a plan that is good at its busiest places, on token sets, under a load cap.
Knows no links: what they cost is in the weights of its objective.

It minimises the objective's busiest ingress, busiest node and busiest load together, each the p-norm over places (a
maximum that also feels the runners-up), of all tokens and, counting less, averaged over folds of the sequences that
differ in what they pick.  A plan whose busiest rank is another one in every fold pays for each of them, so that the
average rewards plans that stay balanced where the mixture of traffic shifts.  Of the plans that descents come by, it
keeps the one with the lowest objective on sequences drawn anew, see `draws.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.placement_map import EMPTY_SLOT, slots_of_ranks
from placement.solvers.anneal import search_copies
from placement.solvers.contract import Slots
from placement.solvers.load import load as load_only
from placement.solvers.metis import metis
from placement.solvers.spectral import spectral
from placement.solvers.swaps import MANY_KICKS, Effort, improve, prepare
from placement.topology import Topology

Ints = npt.NDArray[np.int64]


KICKS = 80
"""Rounds of the search; more gain less than one part in a hundred on recorded routing."""

FEWEST_KICKS = 6
"""Rounds that even the largest layer gets."""

LARGE = 500_000
"""Experts times token sets of a layer from which on rounds become fewer, so that they cost about the same in all."""

MAX_SETS = 20_000
"""Token sets that rounds are made on: a draw of so many tokens where there are more, and the last descent on all."""


def search(
    problem: LayerProblem, rng: np.random.Generator, num_kicks: int | None = None, seconds: float | None = None
) -> Slots:
    """Iterated local search: descend, swap a few random pairs, descend again, keep the best.

    It starts from the best of the load-only plan and, where there is time for many rounds, those of METIS and of
    spectral clustering once balanced; with several nodes, experts are first placed on nodes, then on the ranks inside
    each, then on all ranks together.  No rank's load exceeds `load_cap` times the mean, or the load-only plan's largest
    where that is higher; where groups stay together, it is as near as descents come.  Redundant experts are then added
    and everything is searched again, see `anneal.py`.

    Args:
        num_kicks: rounds; if None `KICKS`, or fewer for a large layer.
        seconds: stop kicking after this time; None for never.
    """
    if num_kicks is None:
        size = problem.num_experts * min(len(problem.sets), MAX_SETS)
        num_kicks = min(KICKS, max(FEWEST_KICKS, KICKS * LARGE // max(size, 1)))
    now = time.monotonic()
    effort = Effort(num_kicks, math.inf if seconds is None else now + seconds)
    if not problem.num_redundant:
        return slots_of_ranks(place_once(problem, rng, effort), problem.topology)
    first = effort if seconds is None else replace(effort, deadline=now + seconds / 2)
    slots = slots_of_ranks(place_once(problem, rng, first), problem.topology)
    return search_copies(problem, slots, rng, effort)


def place_once(problem: LayerProblem, rng: np.random.Generator, effort: Effort) -> Ints:
    """The rank of each expert, int64 (E,), where none is copied."""
    problem, topology = replace(problem, num_redundant=0), problem.topology
    if problem.num_groups > 1:
        return _place_groups(problem, rng, effort)
    anywhere = np.zeros(problem.num_experts, dtype=np.int64)
    few = problem.drawn(MAX_SETS, rng)
    tokens = prepare(few)
    if topology.num_nodes > 1 and topology.ranks_per_node > 1:
        start = _nodes_first(few, rng, effort.part(2))
        starts = [improve(few, tokens, [start], start // topology.ranks_per_node, rng, effort.part(2))]
    else:
        starts = [ranks_of(load_only(problem, rng), problem)]
        of_sums = not (problem.objective.ingress or problem.objective.load)  # which is what both of these minimise
        if topology.num_ranks > 1 and (effort.num_kicks >= MANY_KICKS or of_sums):
            starts += [_balanced(few, ranks_of(seed(few, rng), few), anywhere, rng) for seed in (metis, spectral)]
    start = improve(few, tokens, starts, anywhere, rng, effort)
    kept = _within_cap(problem, start, rng)
    if few is problem and kept is start:
        return start
    return improve(problem, prepare(problem), [kept], anywhere, rng, replace(effort, num_kicks=0))


def _balanced(problem: LayerProblem, rank_of: Ints, zone_of: Ints, rng: np.random.Generator) -> Ints:
    """Swap the experts of a plan that knows nothing of load until load, counting most, leaves it no better swap."""
    goal = problem.objective
    most = max(goal.ingress, goal.node_ingress, goal.fan_out, goal.collaboration)
    problem = replace(problem, objective=replace(goal, load=max(8 * goal.load, most)))
    return improve(problem, prepare(problem), [rank_of], zone_of, rng, Effort(0, math.inf))


def _within_cap(problem: LayerProblem, rank_of: Ints, rng: np.random.Generator) -> Ints:
    """The plan; where its start, or the draw that it was made on, let it break the cap, one near it that keeps it."""
    load = problem.expert_load

    def highest(plan: Ints) -> float:
        return float(problem.rank_load(plan).max())

    even = ranks_of(load_only(problem, rng), problem)
    limit = max(problem.load_cap * load.sum() / problem.num_ranks, highest(even)) * (1 + 1e-12)
    if highest(rank_of) <= limit:
        return rank_of
    relieved = _relieved(rank_of, load, limit, problem.num_ranks)
    return relieved if highest(relieved) <= limit else even


def _relieved(rank_of: Ints, load_E: npt.NDArray[np.float64], limit: float, num_ranks: int) -> Ints:
    """Swap experts of the busiest rank for lighter ones, as little as helps, until no rank is above the limit."""
    rank_of = rank_of.copy()
    while True:
        rank_load = np.bincount(rank_of, load_E, minlength=num_ranks)
        busiest = int(rank_load.argmax())
        mine, others = np.flatnonzero(rank_of == busiest), np.flatnonzero(rank_of != busiest)
        shift = load_E[mine, None] - load_E[others]
        after = np.maximum(rank_load[busiest] - shift, rank_load[rank_of[others]] + shift)
        better = (shift > 0) & (after < rank_load[busiest])
        if rank_load[busiest] <= limit or not better.any():
            return rank_of
        enough = better & (after <= limit)
        worth = np.where(enough, shift, np.inf) if enough.any() else np.where(better, after, np.inf)
        a, b = np.unravel_index(worth.argmin(), worth.shape)
        rank_of[mine[a]], rank_of[others[b]] = rank_of[others[b]], busiest


def ranks_of(slots: Slots, problem: LayerProblem) -> Ints:
    """The rank of each expert, int64 (E,), out of slots without copies."""
    filled = np.flatnonzero(slots != EMPTY_SLOT)
    out = np.empty(problem.num_experts, dtype=np.int64)
    out[slots[filled]] = filled // problem.slots_per_rank
    return out


def _nodes_first(problem: LayerProblem, rng: np.random.Generator, effort: Effort) -> Ints:
    """Place on nodes as if each were one large rank, then balance the load over the ranks of each."""
    nodes, per_node = problem.topology.num_nodes, problem.topology.ranks_per_node
    weights = problem.objective
    coarse = replace(
        problem,
        topology=Topology(1, nodes, per_node * problem.slots_per_rank),
        objective=replace(weights, ingress=weights.ingress + weights.node_ingress, node_ingress=0.0),
    )
    start = ranks_of(load_only(coarse, rng), coarse)
    node_of = improve(coarse, prepare(coarse), [start], np.zeros(problem.num_experts, dtype=np.int64), rng, effort)
    rank_of = np.empty(problem.num_experts, dtype=np.int64)
    for node in range(nodes):
        rank_load, free = np.zeros(per_node), np.full(per_node, problem.slots_per_rank)
        held = np.flatnonzero(node_of == node)
        for expert in held[np.argsort(-problem.expert_load[held], kind="stable")]:
            rank = int(np.where(free > 0, rank_load, np.inf).argmin())
            rank_of[expert] = node * per_node + rank
            rank_load[rank] += problem.expert_load[expert]
            free[rank] -= 1
    return rank_of


def _place_groups(problem: LayerProblem, rng: np.random.Generator, effort: Effort) -> Ints:
    """Whole groups change places with each other, and experts inside their group.

    Where ranks hold whole groups these are placed like experts, by the sets of groups that tokens pick; where a group
    lies on several ranks, groups are placed on nodes, and then experts on the ranks of their group.
    """
    groups, topology = problem.num_groups, problem.topology
    group_of = np.arange(problem.num_experts) * groups // problem.num_experts
    places = topology.num_ranks if groups % topology.num_ranks == 0 else topology.num_nodes
    if groups % places:
        places = 1
    coarse_sets = np.sort(np.where(problem.sets >= 0, group_of[problem.sets], groups), axis=1)
    coarse_sets[:, 1:][coarse_sets[:, 1:] == coarse_sets[:, :-1]] = groups
    coarse_sets = np.sort(coarse_sets, axis=1).astype(np.int32)
    coarse_sets[coarse_sets == groups] = -1
    work = np.zeros((groups, problem.num_folds))
    for column in problem.sets.T:
        there = column >= 0
        np.add.at(work, (group_of[column[there]], problem.folds[there]), problem.weights[there])
    work /= np.maximum(np.bincount(problem.folds, problem.weights, minlength=problem.num_folds), 1e-300)
    nodes = topology.num_nodes if places % topology.num_nodes == 0 else 1
    # Many sets of experts are one of groups.
    rows, row = np.unique(np.column_stack([coarse_sets, problem.folds]), axis=0, return_inverse=True)
    coarse = replace(
        problem,
        sets=rows[:, :-1].astype(np.int32),
        folds=rows[:, -1].astype(np.int64),
        weights=np.bincount(row.ravel(), problem.weights).astype(np.float64),
        num_experts=groups,
        num_groups=1,
        topology=Topology(nodes, places // nodes, groups // places),
        work=work,
        draws=None,
    )
    place_of_group = place_once(coarse, rng, effort)
    order = np.argsort(place_of_group, kind="stable")  # groups one after another, as they will lie
    position = np.empty(groups, dtype=np.int64)
    position[order] = np.arange(groups)
    size = problem.num_experts // groups
    rank_of = (position[group_of] * size + np.arange(problem.num_experts) % size) // problem.slots_per_rank
    if problem.slots_per_rank % size == 0:
        return rank_of
    return improve(problem, prepare(problem), [_balanced(problem, rank_of, group_of, rng)], group_of, rng, effort)
