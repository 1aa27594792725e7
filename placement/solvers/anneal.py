"""Copies, where they lie and which of them serves each token, searched together.

Copying experts one by one onto a finished plan leaves the plan as it was made for one copy each.  Here every slot may
change: slots swap experts, and a slot with one of several copies may take another expert.  After each change the
tokens that hold one of the experts concerned choose their ranks anew, by the rule of `choice.py`, with the loads as
they then are; the objective is that of all tokens.  Changes that make it worse are kept at first with a probability
that falls to nothing: simulated annealing (Kirkpatrick, Gelatt and Vecchi, 1983).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from placement.choice import choose, ranks_of_experts
from placement.solvers.contract import LayerProblem, Slots
from placement.solvers.copies import with_copies
from placement.solvers.swaps import DOUBLINGS, Effort, Tokens, Weights, over_folds, power, prepare, root, weights_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TRIES_PER_KICK = 200
"""Changes tried for each kick that a search without copies would make; they cost about the same."""

MAX_ROWS = 10_000
"""Token sets to judge changes by: a draw of so many tokens where there are more."""

LOAD_COUNTS = 8.0
"""Copies can balance any load, and greedy choices lean to ranks that many tokens visit: load counts so much more."""

HOTTEST = 0.004
"""Share of the objective by which a change may be worse and still be kept once in e times at the start."""


def search_copies(problem: LayerProblem, slots: Slots, rng: np.random.Generator, effort: Effort) -> Slots:
    """Fill the free slots of a plan without copies, then change slots while tokens choose anew."""
    slots = with_copies(slots, problem)
    topology = problem.topology
    ranks_EX = np.full((problem.num_experts, topology.num_ranks), -1, dtype=np.int64)
    known = ranks_of_experts(slots, problem.num_experts, topology.slots_per_rank)
    ranks_EX[:, : known.shape[1]] = known
    weights = weights_of(problem)
    _anneal(
        prepare(_sample(problem, rng)),
        slots,
        ranks_EX,
        (topology.num_nodes, topology.ranks_per_node, topology.slots_per_rank),
        weights._replace(load=weights.load * LOAD_COUNTS),
        problem.load_cap,
        DOUBLINGS[-1],
        problem.worst_fold,
        effort.num_kicks * TRIES_PER_KICK,
        rng,
    )
    return slots


def _sample(problem: LayerProblem, rng: np.random.Generator) -> LayerProblem:
    """The problem, or one of `MAX_ROWS` tokens drawn from it with replacement."""
    if len(problem.sets) <= MAX_ROWS:
        return problem
    drawn = rng.multinomial(MAX_ROWS, problem.weights / problem.weights.sum())
    keep = drawn > 0
    return replace(problem, sets=problem.sets[keep], folds=problem.folds[keep], weights=drawn[keep].astype(np.float64))


@numba.njit(cache=True, nogil=True)
def _anneal(
    tokens: Tokens,
    slots: Ints,
    ranks_EX: Ints,
    shape: tuple[int, int, int],
    weights: Weights,
    load_cap: float,
    doublings: int,
    worst_fold: bool,
    num_tries: int,
    rng: np.random.Generator,
) -> None:
    """Change `slots` (and `ranks_EX`, which has room for a copy on every rank) in place, ending with the best found."""
    num_nodes, ranks_per_node, slots_per_rank = shape
    num_ranks, (num_experts, num_folds) = num_nodes * ranks_per_node, tokens.picked.shape
    top_k = tokens.sets.shape[1]
    reached, load = np.zeros((num_ranks, num_folds)), np.zeros((num_ranks, num_folds))
    node_reached = np.zeros((num_nodes, num_folds))
    total_load = np.zeros(num_ranks)
    chosen = np.full(tokens.sets.shape, -1, dtype=np.int64)
    served, node_served = np.zeros(num_ranks, np.int64), np.zeros(num_nodes, np.int64)
    experts, out = np.empty(top_k, np.int64), np.empty(top_k, np.int64)
    for row in range(len(tokens.sets)):
        experts[:] = tokens.sets[row]
        choose(experts, ranks_EX, ranks_per_node, total_load, served, node_served, out)
        chosen[row] = out
        _count(row, 1.0, chosen, tokens, ranks_per_node, served, node_served, reached, node_reached, load, total_load)
    value = _value(reached, node_reached, load, tokens, weights, load_cap, doublings, worst_fold)
    best, best_slots = value, slots.copy()
    rows, before = np.empty(len(tokens.sets), np.int64), np.empty(tokens.sets.shape, np.int64)
    marked = np.zeros(len(tokens.sets), np.bool_)
    copies = np.zeros(num_experts, np.int64)
    for expert in slots:
        if expert >= 0:
            copies[expert] += 1
    for attempt in range(num_tries):
        heat = HOTTEST * value * (1.0 - attempt / num_tries) ** 2 + 1e-300
        p, q = rng.integers(0, len(slots)), rng.integers(0, len(slots))
        r, s = p // slots_per_rank, q // slots_per_rank
        a, b = slots[p], slots[q]
        if a < 0 or a == b:
            continue
        if rng.random() < 0.5 and copies[a] > 1:
            if b < 0 or _has(ranks_EX[b], r):
                continue
            swap = False  # slot p takes b, whose copy in q stays
        else:
            if r == s or _has(ranks_EX[a], s) or (b >= 0 and _has(ranks_EX[b], r)):
                continue
            swap = True
        _move(ranks_EX[a], r, s if swap else -1)
        if b >= 0:
            _move(ranks_EX[b], s if swap else -1, r)
        num_rows = 0
        for expert in (a, b):
            if expert >= 0:
                for row in tokens.rows[tokens.first_row[expert] : tokens.first_row[expert + 1]]:
                    if not marked[row]:
                        marked[row] = True
                        rows[num_rows] = row
                        before[num_rows] = chosen[row]
                        num_rows += 1
        for index in range(num_rows):
            row = rows[index]
            marked[row] = False
            _count(
                row, -1.0, chosen, tokens, ranks_per_node, served, node_served, reached, node_reached, load, total_load
            )
            experts[:] = tokens.sets[row]
            choose(experts, ranks_EX, ranks_per_node, total_load, served, node_served, out)
            for k in range(top_k):
                if out[k] >= 0:
                    served[out[k]] = 0
                    node_served[out[k] // ranks_per_node] = 0
                chosen[row, k] = out[k]
            _count(
                row, 1.0, chosen, tokens, ranks_per_node, served, node_served, reached, node_reached, load, total_load
            )
        found = _value(reached, node_reached, load, tokens, weights, load_cap, doublings, worst_fold)
        if found <= value or rng.random() < math.exp((value - found) / heat):
            value = found
            if swap:
                slots[p], slots[q] = b, a
            else:
                slots[p] = b
                copies[a] -= 1
                copies[b] += 1
            if value < best * (1 - 1e-12):
                best = value
                best_slots[:] = slots
            continue
        for index in range(num_rows):
            row = rows[index]
            _count(
                row, -1.0, chosen, tokens, ranks_per_node, served, node_served, reached, node_reached, load, total_load
            )
            chosen[row] = before[index]
            _count(
                row, 1.0, chosen, tokens, ranks_per_node, served, node_served, reached, node_reached, load, total_load
            )
        _move(ranks_EX[a], s if swap else -1, r)
        if b >= 0:
            _move(ranks_EX[b], r, s if swap else -1)
    slots[:] = best_slots


@numba.njit(cache=True, nogil=True)
def _count(
    row: int,
    sign: float,
    chosen: Ints,
    tokens: Tokens,
    ranks_per_node: int,
    served: Ints,
    node_served: Ints,
    reached: Floats,
    node_reached: Floats,
    load: Floats,
    total_load: Floats,
) -> None:
    """Add one token set as it is served; `served` and `node_served` are all zeros after."""
    fold, share = tokens.folds[row], sign * tokens.shares[row]
    for rank in chosen[row]:
        if rank >= 0:
            served[rank], node_served[rank // ranks_per_node] = 0, 0
    for rank in chosen[row]:
        if rank >= 0:
            load[rank, fold] += share
            total_load[rank] += share
            if not served[rank]:
                served[rank] = 1
                reached[rank, fold] += share
            if not node_served[rank // ranks_per_node]:
                node_served[rank // ranks_per_node] = 1
                node_reached[rank // ranks_per_node, fold] += share
    for rank in chosen[row]:
        if rank >= 0:
            served[rank], node_served[rank // ranks_per_node] = 0, 0


@numba.njit(cache=True, nogil=True)
def _value(
    reached: Floats,
    node_reached: Floats,
    load: Floats,
    tokens: Tokens,
    weights: Weights,
    load_cap: float,
    doublings: int,
    worst_fold: bool,
) -> float:
    """The objective; load above the cap costs as much again for each share of the mean load."""
    num_ranks, num_folds = reached.shape
    of_fold = np.zeros(num_folds)
    for fold in range(num_folds):
        reach_powers, load_powers, fan_out = 0.0, 0.0, 0.0
        for rank in range(num_ranks):
            reach_powers += power(max(reached[rank, fold], 0.0), doublings)
            load_powers += power(max(load[rank, fold] / tokens.mean_load[fold], 0.0), doublings)
            fan_out += reached[rank, fold]
        of_fold[fold] = weights.ingress * root(reach_powers, doublings) + weights.fan_out * fan_out
        of_fold[fold] += weights.load * root(load_powers, doublings)
        if weights.node_ingress > 0:
            powers = 0.0
            for node in range(len(node_reached)):
                powers += power(max(node_reached[node, fold], 0.0), doublings)
            of_fold[fold] += weights.node_ingress * root(powers, doublings)
    value = over_folds(of_fold, worst_fold)
    highest = 0.0
    for rank in range(num_ranks):
        mean = 0.0
        for fold in range(num_folds):
            mean += load[rank, fold] / tokens.mean_load[fold] / num_folds
        highest = max(highest, mean)
    return value * (1.0 + max(highest - load_cap, 0.0))


@numba.njit(cache=True, nogil=True)
def _has(ranks: Ints, rank: Any) -> bool:
    for held in ranks:
        if held == rank:
            return True
        if held < 0:
            return False
    return False


@numba.njit(cache=True, nogil=True)
def _move(ranks: Ints, leaves: Any, comes: Any) -> None:
    """Take one rank out of an expert's ranks and put another in, either none if negative; they stay ascending."""
    count = 0
    for held in ranks:
        if held < 0:
            break
        count += 1
    if leaves >= 0:
        at = 0
        while ranks[at] != leaves:
            at += 1
        for index in range(at, count - 1):
            ranks[index] = ranks[index + 1]
        count -= 1
        ranks[count] = -1
    if comes >= 0:
        at = count
        while at > 0 and ranks[at - 1] > comes:
            ranks[at] = ranks[at - 1]
            at -= 1
        ranks[at] = comes
