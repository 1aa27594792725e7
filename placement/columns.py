"""Every group of experts that one rank could hold, with its ingress and load: the columns of set partitioning.
Knows a layer, and no strategy.

The ingress of a group follows from how many tokens picked all of each of its parts, by inclusion and exclusion: for
experts a and b it is load[a] + load[b] - both[a, b].  Tokens are counted once for each small subset of experts, and
subsets are numbered in colexicographic order: {a < b < c} is number C(a, 1) + C(b, 2) + C(c, 3) (the combinatorial
number system, Knuth, The Art of Computer Programming 4A, 7.2.1.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numba
import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem

Ints = npt.NDArray[np.int64]
Members = npt.NDArray[np.int16]

MAX_COLUMNS = 12_000_000
"""32 experts in groups of 8 and 128 in groups of 4 are below; a scan of so many takes a tenth of a second."""

MAX_GROUP = 10
"""Experts a rank up to which 2^m parts of each group are looked up."""


@dataclass(frozen=True)
class Columns:
    """Groups that may share a rank, by rising ingress.

    Attributes:
        members: int16 (C, m), each row ascending.
        ingress: int64 (C,), tokens that picked at least one of the group.
        expert_load: int64 (E,), tokens that picked each expert.
    """

    members: Members
    ingress: Ints
    expert_load: Ints

    def __len__(self) -> int:
        return len(self.ingress)

    def up_to(self, ingress: int) -> int:
        """How many of the first at most so many tokens reach."""
        return int(np.searchsorted(self.ingress, ingress, side="right"))

    def first(self, end: int) -> Columns:
        """The first so many."""
        return Columns(self.members[:end], self.ingress[:end], self.expert_load)

    def rows_of(self, groups: npt.NDArray[np.integer]) -> Ints:
        """Rows of those of the groups (G, m), experts ascending, that are columns."""
        return np.concatenate([np.flatnonzero((self.members == group).all(axis=1)) for group in groups])


def can_enumerate(problem: LayerProblem) -> bool:
    """Whether all groups of the size of a rank fit in memory."""
    size = problem.slots_per_rank
    return size <= MAX_GROUP and comb(problem.num_experts, size) <= MAX_COLUMNS


def all_columns(problem: LayerProblem, load_limit: float) -> Columns:
    """Every group of `slots_per_rank` experts whose load is within the limit (tokens times experts)."""
    num_experts, size = problem.num_experts, problem.slots_per_rank
    binomial = np.array([[comb(n, k) for k in range(size + 2)] for n in range(num_experts + 1)], dtype=np.int64)
    weights = problem.weights.astype(np.int64)
    largest = min(size, problem.sets.shape[1])
    first = np.cumsum([0] + [comb(num_experts, part) for part in range(1, largest + 1)])
    counts = np.zeros(first[-1], dtype=np.int64)
    for part in range(1, largest + 1):
        _count(problem.sets, weights, binomial, part, counts[first[part - 1] : first[part]])
    load = problem.expert_load.astype(np.int64)
    members = np.empty((comb(num_experts, size), size), dtype=np.int16)
    kept = _enumerate(num_experts, size, load, load_limit, members)
    members = members[:kept]
    ingress = _ingress_by_parts(members, counts, first, binomial)
    order = np.argsort(ingress, kind="stable")
    return Columns(members[order], ingress[order], load)


@numba.njit(cache=True, nogil=True)
def _count(sets: npt.NDArray[np.int32], weights: Ints, binomial: Ints, size: int, out: Ints) -> None:
    """Add each set's weight to all its subsets of the given size, by their numbers."""
    at = np.zeros(size, np.int64)
    for row in range(len(sets)):
        picks = 0
        while picks < sets.shape[1] and sets[row, picks] >= 0:
            picks += 1
        if picks < size:
            continue
        at[:] = np.arange(size)
        while True:
            number = 0
            for i in range(size):
                number += binomial[sets[row, at[i]], i + 1]
            out[number] += weights[row]
            i = size - 1
            while i >= 0 and at[i] == picks - size + i:
                i -= 1
            if i < 0:
                break
            at[i] += 1
            for j in range(i + 1, size):
                at[j] = at[j - 1] + 1


@numba.njit(cache=True, nogil=True)
def _enumerate(num_experts: int, size: int, load: Ints, limit: float, out: Members) -> int:
    """Write the groups within the limit in lexicographic order; how many there are."""
    group = np.arange(size)
    kept = 0
    while True:
        total = 0
        for expert in group:
            total += load[expert]
        if total <= limit:
            out[kept] = group
            kept += 1
        i = size - 1
        while i >= 0 and group[i] == num_experts - size + i:
            i -= 1
        if i < 0:
            return kept
        group[i] += 1
        for j in range(i + 1, size):
            group[j] = group[j - 1] + 1


@numba.njit(cache=True, nogil=True)
def _ingress_by_parts(members: Members, counts: Ints, first: Ints, binomial: Ints) -> Ints:
    """Inclusion and exclusion over the parts of each group, which are bit masks of its positions."""
    size = members.shape[1]
    parts = 1 << size
    largest = len(first) - 1  # no token picked more experts
    bits, top = np.zeros(parts, np.int64), np.zeros(parts, np.int64)
    for part in range(1, parts):
        top[part] = top[part >> 1] + 1 if part > 1 else 0
        bits[part] = bits[part & ~(1 << top[part])] + 1
    number = np.zeros(parts, np.int64)
    out = np.zeros(len(members), np.int64)
    for row in range(len(members)):
        total = 0
        for part in range(1, parts):
            number[part] = number[part & ~(1 << top[part])] + binomial[members[row, top[part]], bits[part]]
            if bits[part] <= largest:
                tokens = counts[first[bits[part] - 1] + number[part]]
                total += tokens if bits[part] % 2 else -tokens
        out[row] = total
    return out
