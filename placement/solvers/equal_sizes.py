"""Parts of equal size: what partitioners that only aim at them need before and after.
Knows neither tokens nor slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RankOfExpert = npt.NDArray[np.int64]
"""int64 (E,), the rank of the one copy of each expert."""


def equal_sizes(num_experts: int, num_ranks: int) -> npt.NDArray[np.int64]:
    """Experts on each rank, int64 (R,): E/R, or where that is uneven one more on the first E mod R ranks."""
    return num_experts // num_ranks + (np.arange(num_ranks) < num_experts % num_ranks).astype(np.int64)


def intra_weight(rank_of: RankOfExpert, coactivation: npt.NDArray[np.float64]) -> float:
    """Co-activations (E, E) of pairs on one rank, in tokens."""
    return float(coactivation[rank_of[:, None] == rank_of].sum()) / 2


def with_equal_sizes(rank_of: RankOfExpert, coactivation: npt.NDArray[np.float64], num_ranks: int) -> RankOfExpert:
    """Move experts from large parts to small ones until sizes differ by at most one, each time the cheapest move.

    A move costs the co-activations (E, E) with the part that is left, less those with the part that is joined.
    """
    rank_of = rank_of.copy()
    smallest, largest = len(rank_of) // num_ranks, -(-len(rank_of) // num_ranks)
    while True:
        sizes = np.bincount(rank_of, minlength=num_ranks)
        if sizes.max() <= largest and sizes.min() >= smallest:
            return rank_of
        # A part that is too large gives to any that may grow; one that is too small takes from any that may shrink.
        gives = sizes > (largest if sizes.max() > largest else smallest)
        takes = sizes < (smallest if sizes.min() < smallest else largest)
        to_part = _coactivation_to_parts(rank_of, coactivation, num_ranks)
        cost = to_part[np.arange(len(rank_of)), rank_of][:, None] - to_part
        cost[~gives[rank_of]] = np.inf
        cost[:, ~takes] = np.inf
        expert, rank = np.unravel_index(int(cost.argmin()), cost.shape)
        rank_of[expert] = rank


def with_best_swaps(rank_of: RankOfExpert, coactivation: npt.NDArray[np.float64], num_ranks: int) -> RankOfExpert:
    """Swap the pair that adds most to `intra_weight` until none adds (the gain is Kernighan and Lin's, 1970)."""
    rank_of = rank_of.copy()
    experts = np.arange(len(rank_of))
    to_part = _coactivation_to_parts(rank_of, coactivation, num_ranks)
    enough = 1e-9 * coactivation.sum()  # less is rounding, and could go round in circles
    while True:
        change = to_part[:, rank_of] - to_part[experts, rank_of][:, None]
        gain = change + change.T - 2 * coactivation
        gain[rank_of[:, None] == rank_of] = 0
        first, second = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[first, second] > enough:  # so that values that are no numbers end it, too
            return rank_of
        r, s = rank_of[first], rank_of[second]
        to_part[:, r] += coactivation[:, second] - coactivation[:, first]
        to_part[:, s] += coactivation[:, first] - coactivation[:, second]
        rank_of[first], rank_of[second] = s, r


def _coactivation_to_parts(
    rank_of: RankOfExpert, coactivation: npt.NDArray[np.float64], num_ranks: int
) -> npt.NDArray[np.float64]:
    """Affinity of each expert to each part, float64 (E, R)."""
    return coactivation @ np.eye(num_ranks)[rank_of]
