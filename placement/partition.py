"""Exact set partitioning: groups that cover every expert once, at least cost, with proofs in whole numbers.
Knows groups, and nothing of tokens.

Linear relaxations are solved by column generation: a linear program over a few groups gives every expert a price, and
a scan over all groups finds those that the prices undervalue.  A relaxation proves something only through its prices:
for *any* whole prices y, every partition into R groups costs at least

    sum_e y[e] + R * min over groups S of (cost[S] - sum_{e in S} y[e])

since each expert is in exactly one group.  This is recomputed in int64 from rounded prices, so no proof rests on the
tolerance of a solver.  What relaxations leave open is decided by branching on whether two experts share a rank (Ryan
and Foster, 1981).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from placement.columns import Columns, Ints, Members

NEVER = int(np.iinfo(np.int64).max)
"""The value of what does not exist."""

UNIT = 1 << 20
"""Prices are whole multiples of 1 / UNIT of a token."""

WHOLE = 1e-6
"""Shares of a group this close to 0 or 1 count as whole; partitions are checked exactly afterwards."""

PRICED_PER_EXPERT = 2
"""Groups that join the linear program for each expert after a scan: more of them need fewer, larger programs."""

SHARE_OF_TIME = 1 / 3
"""Of the time that is left, what one question of a bisection may take before it is given up."""


class Solved(NamedTuple):
    """The best partition found, and what is proved about all.

    Attributes:
        rows: int64 (R,), its columns; None where none was found.
        value: of the partition, `NEVER` where there is none.
        bound: no partition is below it; equal to `value` where that is proved to be the least, or none to exist.
    """

    rows: Ints | None
    value: int
    bound: int


def least_maximum(columns: Columns, num_ranks: int, start: Ints | None, deadline: float) -> Solved:
    """The partition whose largest ingress is least.

    Bisects on the largest ingress that groups may have: by relaxations alone first, which are fast, then by search.

    Args:
        start: rows of a partition, or None.
        deadline: of `time.perf_counter`.
    """
    known = _any_partition(columns, num_ranks, start, deadline)
    if known.rows is None:
        return known
    search = _Search(columns, np.zeros(len(columns), dtype=np.int64), num_ranks, known.rows)

    def relax(most: int, until: float) -> Solved:
        end = columns.up_to(most)
        excluded = search.relax(np.arange(end), 0, until).bound > 0
        return Solved(None, NEVER, _ingress_at(columns, end)) if excluded else Solved(known.rows, most, 0)

    def find(most: int, until: float) -> Solved:
        end = columns.up_to(most)
        rows, certain = search.find(np.arange(end), 0, until)
        if rows is not None:
            return Solved(rows, int(columns.ingress[rows].max()), 0)
        return Solved(None, NEVER, _ingress_at(columns, end) if certain else 0)

    known = Solved(known.rows, int(columns.ingress[known.rows].max()), int(columns.ingress[0]))
    return _bisect(known._replace(bound=_bisect(known, relax, deadline).bound), find, deadline)


def least_sum(columns: Columns, num_ranks: int, start: Ints | None, deadline: float) -> Solved:
    """The partition whose ingress is least in sum; arguments as for `least_maximum`."""
    known = _any_partition(columns, num_ranks, start, deadline)
    if known.rows is None:
        return known
    search = _Search(columns, columns.ingress, num_ranks, known.rows)
    everything = np.arange(len(columns))

    def find(most: int, until: float) -> Solved:
        rows, certain = search.find(everything, most, until)
        if rows is not None:
            return Solved(rows, int(columns.ingress[rows].sum()), 0)
        return Solved(None, NEVER, most + 1 if certain else 0)

    value = int(columns.ingress[known.rows].sum())
    return _bisect(Solved(known.rows, value, search.relax(everything, value, deadline).bound), find, deadline)


def _any_partition(columns: Columns, num_ranks: int, start: Ints | None, deadline: float) -> Solved:
    """`start`, or else any partition; without its value."""
    if start is not None:
        return Solved(start, NEVER, 0)
    search = _Search(columns, np.zeros(len(columns), dtype=np.int64), num_ranks, None)
    rows, certain = search.find(np.arange(len(columns)), 0, deadline)
    return Solved(rows, NEVER, NEVER if rows is None and certain else 0)


def _ingress_at(columns: Columns, row: int) -> int:
    return int(columns.ingress[row]) if row < len(columns) else NEVER


def _bisect(known: Solved, ask: Callable[[int, float], Solved], deadline: float) -> Solved:
    """Close in on the least value, from what is known.

    Args:
        ask: finds a partition of at most a value before a deadline, or a bound above that value, or neither.
    """
    rows, high, proved = known
    low = proved
    while low < high and (now := time.perf_counter()) < deadline:
        middle = (low + high) // 2
        answer = ask(middle, now + (deadline - now) * SHARE_OF_TIME)
        if answer.rows is not None:
            rows, high = answer.rows, answer.value
        else:
            low = max(middle + 1, answer.bound)
            proved = max(proved, answer.bound)
    return Solved(rows, high, min(proved, high))


class _Relaxed(NamedTuple):
    """A proved bound, rows that a partition within `most` can use, columns of the last program and their shares."""

    bound: int
    rows: Ints
    used: Ints
    share: npt.NDArray[np.float64]


class _Search:
    """Partitions into columns, each at a cost; what linear programs came to is kept from one question to the next."""

    def __init__(self, columns: Columns, cost: Ints, num_ranks: int, start: Ints | None) -> None:
        self.columns, self.cost, self.num_ranks = columns, cost, num_ranks
        self.num_experts = len(columns.expert_load)
        self.in_program = np.zeros(len(columns), dtype=bool)
        if start is not None:
            self.in_program[start] = True

    def find(self, rows: Ints, most: int, deadline: float) -> tuple[Ints | None, bool]:
        """A partition into some of `rows` of at most the given cost, or None and whether there is none for certain."""
        members = self.columns.members
        certain = True
        nodes = [rows]
        while nodes:
            if time.perf_counter() > deadline:
                return None, False
            relaxed = self.relax(nodes.pop(), most, deadline)
            if relaxed.bound > most:
                continue
            rows, used, share = relaxed.rows, relaxed.used, relaxed.share
            together = np.zeros((self.num_experts, self.num_experts))
            for i in range(members.shape[1]):
                for j in range(i):
                    np.add.at(together, (members[used, j], members[used, i]), share)
            undecided = np.minimum(together, 1 - together)
            undecided[undecided < WHOLE] = 0
            heat = 1 + np.add.outer(self.columns.expert_load, self.columns.expert_load)  # hot experts have least choice
            a, b = np.unravel_index(int((undecided * heat).argmax()), undecided.shape)
            if undecided[a, b] > 0:
                has_a, has_b = ((members[rows] == expert).any(axis=1) for expert in (a, b))
                nodes += [rows[~(has_a & has_b)], rows[has_a == has_b]]  # on one rank is tried first
                continue
            found = used[share > 0.5]
            covered = np.sort(members[found].ravel())
            if np.array_equal(covered, np.arange(self.num_experts)) and self.cost[found].sum() <= most:
                return found, True
            certain = False  # the prices were too coarse to tell
        return None, certain

    def relax(self, rows: Ints, most: int, deadline: float) -> _Relaxed:
        """Column generation over `rows`, until the bound exceeds `most` or no column is undervalued."""
        bound = 0
        # Above the cost of any partition: leaving an expert out must never be the cheaper way.
        penalty = float(max(1, self.num_ranks * self.cost[rows].max(initial=0)))
        while True:
            used = rows[self.in_program[rows]]
            y, value, share = _prices(self.columns.members[used], self.cost[used], self.num_experts, penalty)
            prices = np.rint(y * UNIT).astype(np.int64)
            reduced, found = _scan(self.columns.members, self.cost, rows, prices, UNIT, PRICED_PER_EXPERT)
            least = int(reduced.min(initial=NEVER // (2 * self.num_ranks)))  # so much that no column means no partition
            others = int(prices.sum()) + (self.num_ranks - 1) * least
            bound = max(bound, -(-(others + least) // UNIT))
            fresh = found[found >= 0]
            fresh = fresh[~self.in_program[fresh]]
            if bound > most or value <= WHOLE or len(fresh) == 0 or time.perf_counter() > deadline:
                # A partition with one column costs at least what the others must and this one's reduced cost.
                return _Relaxed(bound, rows[reduced <= most * UNIT - others], used, share)
            self.in_program[fresh] = True


def _prices(
    members: Members, cost: Ints, num_experts: int, penalty: float
) -> tuple[npt.NDArray[np.float64], float, npt.NDArray[np.float64]]:
    """Prices (E,) of the linear program over the given groups, its value, and each group's share in its solution.

    An expert may stay uncovered, or be covered once more, at the penalty, so that there is always a solution.
    """
    if len(members) == 0:
        return np.full(num_experts, penalty), num_experts * penalty, np.empty(0)
    groups = np.repeat(np.arange(len(members)), members.shape[1])
    matrix = csr_matrix((np.ones(members.size), (groups, members.ravel())), shape=(len(members), num_experts))
    solved = linprog(
        -np.ones(num_experts), A_ub=matrix, b_ub=cost.astype(float), bounds=(-penalty, penalty), method="highs-ds"
    )
    if solved.x is None:  # never seen; prices of zero prove nothing and so do no harm
        return np.zeros(num_experts), -np.inf, np.zeros(len(members))
    return solved.x, -float(solved.fun), -solved.ineqlin.marginals


@numba.njit(cache=True, nogil=True)
def _scan(members: Members, cost: Ints, rows: Ints, prices: Ints, unit: int, keep: int) -> tuple[Ints, Ints]:
    """Reduced cost of each row, and for each expert the rows of least negative reduced cost, -1 where none."""
    size = members.shape[1]
    all_reduced = np.empty(len(rows), np.int64)
    found = np.full((len(prices), keep), -1, np.int64)
    value = np.zeros((len(prices), keep), np.int64)
    for index, row in enumerate(rows):
        reduced = cost[row] * unit
        for i in range(size):
            reduced -= prices[members[row, i]]
        all_reduced[index] = reduced
        if reduced >= 0:
            continue
        for i in range(size):
            expert = members[row, i]
            at = keep
            while at > 0 and reduced < value[expert, at - 1]:
                at -= 1
            if at < keep:
                for later in range(keep - 1, at, -1):
                    value[expert, later] = value[expert, later - 1]
                    found[expert, later] = found[expert, later - 1]
                value[expert, at] = reduced
                found[expert, at] = row
    return all_reduced, np.unique(found)
