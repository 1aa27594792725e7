"""The task of planning one layer: deduplicated, weighted token sets, where experts may go, and what to minimise.
Knows no strategy, no map and no profile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.topology import Topology


@dataclass(frozen=True)
class Objective:
    """What a second of the layer is made of: the search minimises the sum of its parts, each at its busiest place.

    Attributes:
        ingress: per share of all tokens that reach the busiest rank.
        node_ingress: per share of all tokens that touch the busiest node.
        load: per load of the busiest rank over the mean load.
        fan_out: per rank that a token visits on average.
        collaboration: per share of co-activated pairs that are not on one rank.
    """

    ingress: float = 0.0
    node_ingress: float = 0.0
    load: float = 0.0
    fan_out: float = 0.0
    collaboration: float = 0.0


@dataclass(frozen=True)
class Draws:
    """A layer's tokens by sequence, and draws of the sequences with replacement.

    Attributes:
        ids: (T, K), picks of each token; numbers from E on are no expert.
        sequence: int64 (T,), the sequence of each token, 0 .. S-1.
        weights: float64 (T,), what each token counts.
        times: float64 (B, S), how often each draw holds each sequence.
    """

    ids: npt.NDArray[np.unsignedinteger]
    sequence: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerProblem:
    """Place the experts of one layer.

    Attributes:
        sets: int32 (U, K), sets of experts that tokens picked, each row ascending; -1 at the end of rows of tokens
            some of whose picks went to no expert.  Rows differ in set or fold.
        folds: int64 (U,), which part of the sequences a row comes from, 0 .. F-1: what differs between folds is
            likely to differ again on traffic that is yet to come.
        weights: float64 (U,), tokens that picked the set in the fold.
        num_experts: E.
        topology: nodes, ranks and slots, P >= E of these.
        load_cap: the largest load of a rank that is wanted, over the mean load.
        num_redundant: copies beyond one of each expert that may be placed, at most P - E.
        num_groups: G; where above 1, experts may only change places so that a permuted checkpoint stays exact under
            group-limited routing: whole groups with each other, and experts inside their group.
        objective: what to minimise.
        worst_fold: minimise the worst fold instead of the mean over folds.
        together: what all tokens together count beside that mean, 0 to 1.
        work: float64 (E, F), picks of an expert by a token of the fold on average; None where each set picks an expert
            once, otherwise of groups, several of whose experts a token may pick.
        draws: what plans are judged on; None for the token sets themselves.
    """

    sets: npt.NDArray[np.int32]
    folds: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    num_experts: int
    topology: Topology
    load_cap: float
    num_redundant: int = 0
    num_groups: int = 1
    objective: Objective = Objective(ingress=1.0)
    worst_fold: bool = False
    together: float = 0.0
    work: npt.NDArray[np.float64] | None = None
    draws: Draws | None = None

    @classmethod
    def from_ids(
        cls,
        ids_TK: npt.NDArray[np.unsignedinteger],
        num_experts: int,
        topology: Topology,
        load_cap: float,
        *,
        folds_T: npt.NDArray[np.int64] | None = None,
        weights_T: npt.NDArray[np.float64] | None = None,
        num_redundant: int = 0,
        num_groups: int = 1,
        objective: Objective = Objective(ingress=1.0),
        worst_fold: bool = False,
        together: float = 0.0,
    ) -> LayerProblem:
        """Merge tokens of a fold that picked the same experts.

        Args:
            ids_TK: all-ones is no expert.
            folds_T: fold of each token; one fold if None.
            weights_T: what each token counts; 1 if None.
            num_redundant, num_groups, objective, worst_fold, together: as the attributes.
        """
        no_expert = np.iinfo(ids_TK.dtype).max
        num_tokens = len(ids_TK)
        folds_T = np.zeros(num_tokens, dtype=np.int64) if folds_T is None else folds_T
        # One opaque value a row (most significant byte first, so that the order is the numbers' own).
        columns = np.column_stack([np.sort(ids_TK, axis=1), folds_T]).astype(np.uint16).byteswap()
        keys = np.ascontiguousarray(columns).view(np.dtype((np.void, 2 * columns.shape[1]))).ravel()
        unique, row_of_token = np.unique(keys, return_inverse=True)
        rows = unique.view(np.uint16).reshape(-1, columns.shape[1]).byteswap()
        sets, folds = rows[:, :-1].astype(np.int32), rows[:, -1].astype(np.int64)
        sets[sets == no_expert] = -1
        weights = np.bincount(row_of_token.ravel(), weights_T, minlength=len(rows)).astype(np.float64)
        return cls(
            sets,
            folds,
            weights,
            num_experts,
            topology,
            load_cap,
            num_redundant,
            num_groups,
            objective,
            worst_fold,
            together,
        )

    def merged(self) -> LayerProblem:
        """The same tokens in one fold."""
        if not self.folds.any():
            return self
        sets, row = np.unique(self.sets, axis=0, return_inverse=True)
        weights = np.bincount(row.ravel(), self.weights, minlength=len(sets)).astype(np.float64)
        return replace(self, sets=sets, folds=np.zeros(len(sets), dtype=np.int64), weights=weights)

    def drawn(self, max_sets: int, rng: np.random.Generator) -> LayerProblem:
        """Itself where it has so few token sets, else a problem of so many tokens drawn from it by their weights."""
        if len(self.sets) <= max_sets:
            return self
        weights = rng.multinomial(max_sets, self.weights / self.weights.sum()).astype(np.float64)
        keep = np.flatnonzero(weights)
        drawn = replace(self, sets=self.sets[keep], folds=self.folds[keep], weights=weights[keep])
        # It may have missed the last folds.
        return drawn if self.work is None else replace(drawn, work=self.work[:, : drawn.num_folds])

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.topology.num_ranks

    @property
    def slots_per_rank(self) -> int:
        """Positions on each rank."""
        return self.topology.slots_per_rank

    @property
    def num_folds(self) -> int:
        """F."""
        return int(self.folds.max()) + 1

    @cached_property
    def total_weight(self) -> float:
        """Tokens in all."""
        return float(self.weights.sum())

    @cached_property
    def expert_load(self) -> npt.NDArray[np.float64]:
        """Picks of each expert, float64 (E,)."""
        if self.work is not None:
            return self.work @ np.bincount(self.folds, self.weights, minlength=self.num_folds)
        picked = self.sets.ravel() >= 0
        weights = np.repeat(self.weights, self.sets.shape[1])
        load = np.bincount(self.sets.ravel()[picked], weights[picked], minlength=self.num_experts)
        return load.astype(np.float64)

    def rank_load(self, rank_of_expert: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Picks that each rank serves, float64 (R,), where every expert is on one rank."""
        load = np.bincount(rank_of_expert, self.expert_load, minlength=self.num_ranks)
        return load.astype(np.float64, copy=False)

    @cached_property
    def coactivation(self) -> npt.NDArray[np.float64]:
        """Tokens that picked both experts, float64 (E, E), symmetric with zero diagonal."""
        out = np.zeros((self.num_experts, self.num_experts))
        for first in range(self.sets.shape[1]):
            for second in range(first + 1, self.sets.shape[1]):
                both = self.sets[:, second] >= 0  # none stands at the end
                np.add.at(out, (self.sets[both, first], self.sets[both, second]), self.weights[both])
        return out + out.T
