"""Which copy of each picked expert serves a token, where experts have several.
Evaluator, solvers and runtime ask it; it knows none of them.

Per token, as engines with a dispatch of their own can: ranks that the token visits anyway come first, then ranks that
cover most of what is left, then ranks on nodes that it visits anyway; ties go to the rank that has served least so far.
What was served so far is counted over what is chosen together: all tokens when planning, one rank's tokens of one layer
call when running, where a rank knows of no others (`first_load`).
Per source rank, as SGLang's static dispatch: a rank always sends an expert's tokens to the same copy, the nearest one.
"""

from __future__ import annotations

from typing import Literal

import numba
import numpy as np
import numpy.typing as npt

from placement.placement_map import EMPTY_SLOT
from placement.topology import Topology

Int64s = npt.NDArray[np.int64]

Choice = Literal["token", "source"]
"""Who chooses among the copies of an expert: each token, or each source rank once and for all."""


def ranks_of_experts(slots_P: Int64s, num_experts: int, slots_per_rank: int) -> Int64s:
    """The ranks that hold each expert, int64 (E, X), ascending and padded with -1; X copies of the commonest expert."""
    filled = np.flatnonzero(slots_P != EMPTY_SLOT)
    experts, ranks = slots_P[filled], filled // slots_per_rank
    copies = np.bincount(experts, minlength=num_experts)
    out = np.full((num_experts, int(copies.max())), -1, dtype=np.int64)
    order = np.lexsort((ranks, experts))
    column = np.arange(len(order)) - np.repeat(np.cumsum(copies) - copies, copies)
    out[experts[order], column] = ranks[order]
    return out


def nearest_ranks(ranks_EX: Int64s, topology: Topology) -> Int64s:
    """The rank to which each source rank sends each expert's tokens, int64 (R, E).

    Its own where it holds the expert; else one on its node; else any.  Among several the choice goes round with the
    source rank and the expert, so that sources spread over the copies.
    """
    num_ranks, per_node = topology.num_ranks, topology.ranks_per_node
    out = np.empty((num_ranks, len(ranks_EX)), dtype=np.int64)
    for expert, padded in enumerate(ranks_EX):
        ranks = padded[padded >= 0]
        for source in range(num_ranks):
            near = ranks[ranks == source]
            if not len(near):
                near = ranks[ranks // per_node == source // per_node]
            if not len(near):
                near = ranks
            out[source, expert] = near[(source + expert) % len(near)]
    return out


def first_load(source: int, num_ranks: int) -> npt.NDArray[np.float64]:
    """The load that a source rank's choice starts from, float64 (R,): too little to count, enough to break ties.

    So that sources with few tokens do not all lean to the first ranks, ties go round from the source itself.
    """
    load: npt.NDArray[np.float64] = ((np.arange(num_ranks) - source) % num_ranks).astype(np.float64) * 2.0**-20
    return load


@numba.njit(cache=True, nogil=True)
def choose_ranks(
    ids_TK: Int64s,
    ranks_EX: Int64s,
    ranks_per_node: int,
    load: npt.NDArray[np.float64],
) -> Int64s:
    """The rank that serves each pick of tokens that are chosen together, int64 (T, K), -1 for no expert.

    Args:
        ids_TK: int64 (T, K); negative where a pick went to no expert.
        ranks_EX: as `ranks_of_experts` gives it.
        load: (R,) such as `first_load`; what the ranks then serve is added to it.
    """
    out = np.empty(ids_TK.shape, np.int64)
    served, node_served = np.zeros(len(load), np.int64), np.zeros(len(load) // ranks_per_node, np.int64)
    for token in range(len(ids_TK)):
        choose(ids_TK[token], ranks_EX, ranks_per_node, load, served, node_served, out[token])
        for rank in out[token]:
            if rank >= 0:
                load[rank] += 1
                served[rank], node_served[rank // ranks_per_node] = 0, 0
    return out


@numba.njit(cache=True, nogil=True)
def choose(
    experts: Int64s,
    ranks_EX: Int64s,
    ranks_per_node: int,
    load: npt.NDArray[np.float64],
    served: Int64s,
    node_served: Int64s,
    out: Int64s,
) -> None:
    """Choose the rank that serves each expert of one token.

    Args:
        experts: the token's picks, negative where a pick went to no expert.
        ranks_EX: as `ranks_of_experts` gives it.
        load: (R,) what each rank has served so far; not changed.
        served: (R,) all zeros before; after, the experts of the token that each rank serves.
        node_served: (N,) likewise for nodes.
        out: (K,) the rank of each pick, -1 for no expert.
    """
    left = 0
    several = ranks_EX.shape[1] > 1
    for k in range(len(experts)):
        out[k] = -1
        if experts[k] < 0:
            continue
        if not several or ranks_EX[experts[k], 1] < 0:
            out[k] = ranks_EX[experts[k], 0]
            served[out[k]] += 1
            node_served[out[k] // ranks_per_node] += 1
        else:
            left += 1
    if left == 0:
        return
    # Experts with several copies: 0 counts as visited here and is made good below.
    while True:
        best, best_cover, best_near = -1, 0, False
        for k in range(len(experts)):
            if experts[k] < 0 or out[k] >= 0 or _is_served(ranks_EX[experts[k]], served):
                continue
            for rank in ranks_EX[experts[k]]:
                if rank < 0:
                    break
                cover = 0
                for other in range(len(experts)):
                    if experts[other] >= 0 and out[other] < 0 and not _is_served(ranks_EX[experts[other]], served):
                        for at in ranks_EX[experts[other]]:
                            cover += at == rank
                near = node_served[rank // ranks_per_node] > 0
                if (
                    cover > best_cover
                    or (cover == best_cover and near and not best_near)
                    or (cover == best_cover and near == best_near and load[rank] < load[best])
                ):
                    best, best_cover, best_near = rank, cover, near
        if best < 0:
            break
        for k in range(len(experts)):  # one expert opens the rank; the others may still go elsewhere
            if experts[k] >= 0 and out[k] < 0 and not _is_served(ranks_EX[experts[k]], served):
                held = False
                for at in ranks_EX[experts[k]]:
                    held = held or at == best
                if held:
                    out[k] = best
                    served[best] += 1
                    node_served[best // ranks_per_node] += 1
                    break
    for k in range(len(experts)):
        if experts[k] >= 0 and out[k] < 0:
            best = -1
            for rank in ranks_EX[experts[k]]:
                if rank < 0:
                    break
                if served[rank] and (best < 0 or load[rank] < load[best]):
                    best = rank
            out[k] = best
            served[best] += 1
            node_served[best // ranks_per_node] += 1


@numba.njit(cache=True, nogil=True)
def _is_served(ranks: Int64s, served: Int64s) -> bool:
    """Whether one of the ranks serves the token already."""
    for rank in ranks:
        if rank < 0:
            return False
        if served[rank]:
            return True
    return False
