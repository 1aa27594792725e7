"""What every strategy is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

RankOfExpert = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerProblem:
    """Place the experts of one layer, `slots_per_rank` on every rank.

    Attributes:
        sets: int32 (U, K), the distinct sets of experts that tokens picked, each row ascending.
        weights: int64 (U,), tokens that picked each set.
        num_experts: E.
        num_ranks: R, a divisor of E.
        load_cap: the largest load of a rank that is wanted, over the mean load.
    """

    sets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int64]
    num_experts: int
    num_ranks: int
    load_cap: float

    @classmethod
    def from_ids(
        cls, ids_TK: npt.NDArray[np.unsignedinteger], num_experts: int, num_ranks: int, load_cap: float
    ) -> LayerProblem:
        """Merge tokens that picked the same experts."""
        ordered = np.ascontiguousarray(np.sort(ids_TK, axis=1).astype(np.uint16).byteswap())
        # One opaque value a row (most significant byte first, so that the order is the numbers' own).
        keys = ordered.view(np.dtype((np.void, ordered.dtype.itemsize * ordered.shape[1]))).ravel()
        unique, weights = np.unique(keys, return_counts=True)
        sets = unique.view(np.uint16).reshape(-1, ids_TK.shape[1]).byteswap().astype(np.int32)
        return cls(sets, weights.astype(np.int64), num_experts, num_ranks, load_cap)

    @property
    def slots_per_rank(self) -> int:
        """Experts that each rank holds."""
        return self.num_experts // self.num_ranks

    @property
    def expert_load(self) -> npt.NDArray[np.int64]:
        """Tokens that picked each expert, int64 (E,)."""
        weights = np.repeat(self.weights, self.sets.shape[1])
        # Sums of whole numbers below 2**53 are exact in the float64 that bincount adds in.
        return np.bincount(self.sets.ravel(), weights, minlength=self.num_experts).astype(np.int64)


class Strategy(Protocol):
    """A way to place one layer."""

    def __call__(self, problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
        """The rank of each expert, int64 (E,), `slots_per_rank` experts on each; the same seed gives the same plan."""
        ...
