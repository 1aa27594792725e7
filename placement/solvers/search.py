"""The project's own search: swaps that lower the busiest rank's ingress, on token sets, under a load cap.

For experts a on rank r and b on rank s, what a swap does to ingress follows from three tallies over token sets:

- `lone[a]`: tokens that reach rank r only through a, and would leave it with a;
- `new[b, r]`: tokens that pick b and do not reach rank r yet, and would come to it with b;
- `both[a, b]`: tokens that reach rank r only through a and pick b as well, so that b keeps them on r.

So ingress[r] becomes ingress[r] - lone[a] + both[a, b] + new[b, r], likewise for s, and no other rank changes.  All
swaps are judged from the tallies at once; only sets that hold a or b are tallied again after a swap.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from placement.solvers.contract import LayerProblem, RankOfExpert
from placement.solvers.load import load

POWERS = (6.0, 16.0)
"""Descents minimise sum ingress^p, first with a p that feels several ranks, then with one closer to the maximum; how
other exponents did is in docs/log.md."""

NUM_KICKS = 40
SWAPS_PER_KICK = 4


class _Tallies(NamedTuple):
    ingress: npt.NDArray[np.int64]  # (R,) tokens that reach the rank
    lone: npt.NDArray[np.int64]  # (E,)
    new: npt.NDArray[np.int64]  # (E, R)
    both: npt.NDArray[np.int64]  # (E, E)


def search(problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
    """Iterated local search from the load-only plan: descend, swap a few random pairs, descend again, keep the best.

    No rank's load exceeds `load_cap` times the mean, or the load-only plan's largest where that is higher.
    """
    start = load(problem, rng)
    expert_load = problem.expert_load
    rank_load = np.bincount(start, expert_load, minlength=problem.num_ranks)
    limit = max(problem.load_cap * rank_load.mean(), rank_load.max())
    members, first_member = _members(problem)
    best, best_value = start, np.inf
    for kick in range(NUM_KICKS + 1):
        rank_of = best.copy()
        if kick:
            _kick(rank_of, expert_load, limit, problem.num_ranks, rng)
        for power in POWERS:
            value = _descend(
                problem.sets,
                problem.weights,
                members,
                first_member,
                rank_of,
                expert_load,
                problem.num_ranks,
                limit,
                power,
            )
        if value < best_value:
            best, best_value = rank_of, value
    return best


def _members(problem: LayerProblem) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the sets that hold each expert, one expert after another, and where each expert's rows start."""
    experts = problem.sets.ravel()
    order = np.argsort(experts, kind="stable")[(experts < 0).sum() :]
    held = np.bincount(experts[experts >= 0], minlength=problem.num_experts)
    return order // problem.sets.shape[1], np.concatenate([[0], np.cumsum(held)])


def _kick(
    rank_of: RankOfExpert, expert_load: npt.NDArray[np.int64], limit: float, num_ranks: int, rng: np.random.Generator
) -> None:
    """Swap a few random pairs in place, passing over those that break the load limit."""
    rank_load = np.bincount(rank_of, expert_load, minlength=num_ranks)
    for a, b in rng.integers(0, len(rank_of), (SWAPS_PER_KICK, 2)):
        r, s = rank_of[a], rank_of[b]
        shift = expert_load[b] - expert_load[a]
        if r != s and rank_load[r] + shift <= limit and rank_load[s] - shift <= limit:
            rank_of[a], rank_of[b] = s, r
            rank_load[r] += shift
            rank_load[s] -= shift


@numba.njit(cache=True, nogil=True)
def _descend(
    sets: npt.NDArray[np.int32],
    weights: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    first_member: npt.NDArray[np.int64],
    rank_of: RankOfExpert,
    expert_load: npt.NDArray[np.int64],
    num_ranks: int,
    limit: float,
    power: float,
) -> float:
    """Apply the best swap until none lowers sum ingress^power; changes `rank_of`, returns that sum."""
    num_experts = len(rank_of)
    tallies = _Tallies(
        np.zeros(num_ranks, np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_experts), np.int64),
    )
    served = np.zeros(num_ranks, np.int64)
    for row in range(len(sets)):
        _tally(sets[row], weights[row], rank_of, served, tallies)
    rank_load = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        rank_load[rank_of[expert]] += expert_load[expert]
    scale = 1.0 / weights.sum()
    while True:
        a, b = _best_swap(rank_of, expert_load, rank_load, tallies, limit, power, scale)
        if a < 0:
            break
        for sign in (-1, 1):
            for expert in (a, b):
                for row in members[first_member[expert] : first_member[expert + 1]]:
                    if expert == a or a not in sets[row]:  # sets with both are tallied once
                        _tally(sets[row], sign * weights[row], rank_of, served, tallies)
            if sign == -1:
                r, s = rank_of[a], rank_of[b]
                rank_of[a], rank_of[b] = s, r
                rank_load[r] += expert_load[b] - expert_load[a]
                rank_load[s] += expert_load[a] - expert_load[b]
    value: float = ((tallies.ingress * scale) ** power).sum()
    return value


@numba.njit(cache=True, nogil=True)
def _tally(
    experts: npt.NDArray[np.int32],
    weight: int,
    rank_of: RankOfExpert,
    served: npt.NDArray[np.int64],
    tallies: _Tallies,
) -> None:
    """Add one token set, `weight` times, to the tallies; `served` is all zeros before and after."""
    experts = experts[experts >= 0]
    for expert in experts:
        served[rank_of[expert]] += 1
    for expert in experts:
        rank = rank_of[expert]
        if served[rank] == 1:
            tallies.lone[expert] += weight
            for other in experts:
                tallies.both[expert, other] += weight
    for rank in range(len(served)):
        if served[rank]:
            tallies.ingress[rank] += weight
        else:
            for expert in experts:
                tallies.new[expert, rank] += weight
        served[rank] = 0


@numba.njit(cache=True, nogil=True)
def _best_swap(
    rank_of: RankOfExpert,
    expert_load: npt.NDArray[np.int64],
    rank_load: npt.NDArray[np.int64],
    tallies: _Tallies,
    limit: float,
    power: float,
    scale: float,
) -> tuple[int, int]:
    """The swap that lowers sum ingress^power most while no rank goes above the load limit; (-1, -1) if none does."""
    value = (tallies.ingress * scale) ** power
    best_change, best_a, best_b = -1e-12 * value.sum(), -1, -1
    for a in range(len(rank_of)):
        r = rank_of[a]
        for b in range(a):
            s = rank_of[b]
            shift = expert_load[b] - expert_load[a]
            if r == s or rank_load[r] + shift > limit or rank_load[s] - shift > limit:
                continue
            ingress_r = tallies.ingress[r] - tallies.lone[a] + tallies.both[a, b] + tallies.new[b, r]
            ingress_s = tallies.ingress[s] - tallies.lone[b] + tallies.both[b, a] + tallies.new[a, s]
            change = (ingress_r * scale) ** power + (ingress_s * scale) ** power - value[r] - value[s]
            if change < best_change:
                best_change, best_a, best_b = change, a, b
    return best_a, best_b
