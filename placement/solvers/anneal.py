"""Copies, where they lie and which of them serves each token, searched together.
Knows no strategy: the plan to start from is given.

Copying experts one by one onto a finished plan leaves the plan as it was made for one copy each.  Here every slot may
change: slots swap experts, and a slot with one of several copies may take another expert.  After each change the
tokens that hold one of the experts concerned choose their ranks anew, by the rule of `choice.py`, with the loads of
their fold as they then are: so a plan is balanced where choices can balance it, whatever the traffic.  Changes that
make it worse are kept at first with a probability that falls to nothing: simulated annealing (Kirkpatrick, Gelatt and
Vecchi, 1983).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from placement.choice import choose, ranks_of_experts
from placement.layer_problem import LayerProblem
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.swaps import DOUBLINGS, Effort, Tokens, Weights, over_folds, power, prepare, root, weights_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TRIES_PER_KICK = 90
"""Changes tried for each kick that a search without copies would make."""

MAX_SETS = 4_000
"""Token sets to judge changes by: a draw of so many tokens where there are more."""

LOAD_COUNTS = 6.0
"""How much more load weighs here than without copies: these balance nearly any load, for a little of the traffic."""

EXCESS_COUNTS = 5.0
"""Shares of the objective that each share of the mean load above the load cap costs."""

HOTTEST = 0.002
"""Share of the objective by which a change may be worse and still be kept once in e times at the start."""

CHUNK = 500
"""Tries between looks at the clock."""


def search_copies(problem: LayerProblem, slots: Slots, rng: np.random.Generator, effort: Effort) -> Slots:
    """Fill the free slots of a plan without copies, then change slots while tokens choose anew."""
    slots = with_copies(slots, problem)
    if not any(weights_of(problem)._replace(collaboration=0.0)):
        return slots  # which pairs meet on a rank is not judged token by token
    topology = problem.topology
    shape = (topology.num_nodes, topology.ranks_per_node, topology.slots_per_rank)
    tokens, weights = prepare(_mixed(problem.drawn(MAX_SETS, rng), rng)), weights_of(problem)
    weights = weights._replace(load=LOAD_COUNTS * weights.load)
    ranks_EX = _room_for_copies(slots, problem)
    served = _served(tokens, ranks_EX, shape)
    best, best_value = slots.copy(), np.array([np.inf])
    num_tries = effort.num_kicks * TRIES_PER_KICK
    for first in range(0, num_tries, CHUNK):
        if time.monotonic() > effort.deadline and first:
            break
        _anneal(
            tokens,
            slots,
            ranks_EX,
            served,
            shape,
            weights,
            problem.load_cap,
            problem.worst_fold,
            (first, min(first + CHUNK, num_tries), num_tries),
            best,
            best_value,
            rng,
        )
    return best


def _room_for_copies(slots: Slots, problem: LayerProblem) -> Ints:
    """The ranks of each expert, int64 (E, R), ascending and padded with -1."""
    known = ranks_of_experts(slots, problem.num_experts, problem.slots_per_rank)
    out = np.full((problem.num_experts, problem.num_ranks), -1, dtype=np.int64)
    out[:, : known.shape[1]] = known
    return out


def _mixed(problem: LayerProblem, rng: np.random.Generator) -> LayerProblem:
    """The same token sets in random order: choices go by the load so far."""
    order = rng.permutation(len(problem.sets))
    return replace(problem, sets=problem.sets[order], folds=problem.folds[order], weights=problem.weights[order])


class Served(NamedTuple):
    """Which ranks serve the token sets, and what that adds up to, in shares of each fold's tokens."""

    chosen: Ints  # (U, K)
    reached: Floats  # (R, F)
    node_reached: Floats  # (N, F)
    load: Floats  # (R, F)
    total_load: Floats  # (F, R) the same for choices: a fold knows of no other fold's loads, as other traffic will not


@numba.njit(cache=True, nogil=True)
def _served(tokens: Tokens, ranks_EX: Ints, shape: tuple[int, int, int]) -> Served:
    """Let every token set choose its ranks, one after another."""
    num_nodes, ranks_per_node, _ = shape
    num_ranks, num_folds = num_nodes * ranks_per_node, tokens.picked.shape[1]
    out = Served(
        np.full(tokens.sets.shape, -1, np.int64),
        np.zeros((num_ranks, num_folds)),
        np.zeros((num_nodes, num_folds)),
        np.zeros((num_ranks, num_folds)),
        np.zeros((num_folds, num_ranks)),
    )
    seen, node_seen = np.zeros(num_ranks, np.int64), np.zeros(num_nodes, np.int64)
    experts, ranks = np.empty(tokens.sets.shape[1], np.int64), np.empty(tokens.sets.shape[1], np.int64)
    for row in range(len(tokens.sets)):
        experts[:] = tokens.sets[row]
        choose(experts, ranks_EX, ranks_per_node, out.total_load[tokens.folds[row]], seen, node_seen, ranks)
        out.chosen[row] = ranks
        _count(row, 1.0, tokens, ranks_per_node, seen, node_seen, out)
    return out


@numba.njit(cache=True, nogil=True)
def _anneal(
    tokens: Tokens,
    slots: Ints,
    ranks_EX: Ints,
    served: Served,
    shape: tuple[int, int, int],
    weights: Weights,
    load_cap: float,
    worst_fold: bool,
    tries: tuple[int, int, int],
    best_slots: Ints,
    best_value: Floats,
    rng: np.random.Generator,
) -> None:
    """Try changes of `slots`; changes it, `ranks_EX` and `served` in place, and `best_*` where a plan is better.

    Args:
        tries: the first, the one after the last, and how many there are in all: the heat falls with them.
    """
    num_nodes, ranks_per_node, slots_per_rank = shape
    top_k = tokens.sets.shape[1]
    value = _value(served, tokens, weights, load_cap, worst_fold)
    if value < best_value[0]:
        best_value[0] = value
        best_slots[:] = slots
    seen, node_seen = np.zeros(num_nodes * ranks_per_node, np.int64), np.zeros(num_nodes, np.int64)
    experts, out = np.empty(top_k, np.int64), np.empty(top_k, np.int64)
    rows, before = np.empty(len(tokens.sets), np.int64), np.empty(tokens.sets.shape, np.int64)
    marked = np.zeros(len(tokens.sets), np.bool_)
    copies = np.zeros(len(ranks_EX), np.int64)
    for expert in slots:
        if expert >= 0:
            copies[expert] += 1
    for attempt in range(tries[0], tries[1]):
        heat = HOTTEST * value * (1.0 - attempt / tries[2]) ** 2 + 1e-300
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
                        before[num_rows] = served.chosen[row]
                        num_rows += 1
        for row in rows[:num_rows]:
            marked[row] = False
            _count(row, -1.0, tokens, ranks_per_node, seen, node_seen, served)
            experts[:] = tokens.sets[row]
            choose(experts, ranks_EX, ranks_per_node, served.total_load[tokens.folds[row]], seen, node_seen, out)
            served.chosen[row] = out
            _count(row, 1.0, tokens, ranks_per_node, seen, node_seen, served)
        found = _value(served, tokens, weights, load_cap, worst_fold)
        if found <= value or rng.random() < math.exp((value - found) / heat):
            value = found
            if swap:
                slots[p], slots[q] = b, a
            else:
                slots[p] = b
                copies[a] -= 1
                copies[b] += 1
            if value < best_value[0] * (1 - 1e-12):
                best_value[0] = value
                best_slots[:] = slots
            continue
        for index in range(num_rows):
            _count(rows[index], -1.0, tokens, ranks_per_node, seen, node_seen, served)
            served.chosen[rows[index]] = before[index]
            _count(rows[index], 1.0, tokens, ranks_per_node, seen, node_seen, served)
        _move(ranks_EX[a], s if swap else -1, r)
        if b >= 0:
            _move(ranks_EX[b], r, s if swap else -1)


@numba.njit(cache=True, nogil=True)
def _count(
    row: int, sign: float, tokens: Tokens, ranks_per_node: int, seen: Ints, node_seen: Ints, served: Served
) -> None:
    """Add one token set as it is served; `seen` and `node_seen` are all zeros after."""
    fold, share = tokens.folds[row], sign * tokens.shares[row]
    ranks = served.chosen[row]
    for rank in ranks:
        if rank >= 0:
            seen[rank], node_seen[rank // ranks_per_node] = 0, 0
    for rank in ranks:
        if rank >= 0:
            served.load[rank, fold] += share
            served.total_load[fold, rank] += share
            if not seen[rank]:
                seen[rank] = 1
                served.reached[rank, fold] += share
            if not node_seen[rank // ranks_per_node]:
                node_seen[rank // ranks_per_node] = 1
                served.node_reached[rank // ranks_per_node, fold] += share
    for rank in ranks:
        if rank >= 0:
            seen[rank], node_seen[rank // ranks_per_node] = 0, 0


@numba.njit(cache=True, nogil=True)
def _value(served: Served, tokens: Tokens, weights: Weights, load_cap: float, worst_fold: bool) -> float:
    """The objective, and what load above the cap costs."""
    doublings, of_load = DOUBLINGS[-1], DOUBLINGS[-1] + 1
    num_ranks, num_folds = served.reached.shape
    shares = tokens.fold_shares
    of_fold = np.zeros(num_folds + 1)
    mean_load = (tokens.mean_load * shares).sum()
    for fold in range(num_folds + 1):
        reach_powers, load_powers, fan_out = 0.0, 0.0, 0.0
        for rank in range(num_ranks):
            if fold < num_folds:
                reached, load = served.reached[rank, fold], served.load[rank, fold] / tokens.mean_load[fold]
            else:  # all tokens together
                reached = (served.reached[rank] * shares).sum()
                load = (served.load[rank] * shares).sum() / mean_load
            reach_powers += power(max(reached, 0.0), doublings)
            load_powers += power(max(load, 0.0), of_load)
            fan_out += reached
        of_fold[fold] = weights.ingress * root(reach_powers, doublings) + weights.fan_out * fan_out
        of_fold[fold] += weights.load * root(load_powers, of_load)
        if weights.node_ingress > 0:
            powers = 0.0
            for node in range(len(served.node_reached)):
                node_reached = served.node_reached[node]
                reached = node_reached[fold] if fold < num_folds else (node_reached * shares).sum()
                powers += power(max(reached, 0.0), doublings)
            of_fold[fold] += weights.node_ingress * root(powers, doublings)
    excess = max(_highest_load(served, tokens) - load_cap, 0.0)
    return over_folds(of_fold, tokens.counts, worst_fold) * (1.0 + EXCESS_COUNTS * excess)


@numba.njit(cache=True, nogil=True)
def _highest_load(served: Served, tokens: Tokens) -> float:
    """The busiest rank's load over the mean, of all tokens together."""
    highest = 0.0
    for load in served.load:
        highest = max(highest, (load * tokens.fold_shares).sum())
    return float(highest / (tokens.mean_load * tokens.fold_shares).sum())


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
