"""What a map does to traffic and balance: the metrics of every table, exact on token sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.placement_map import PlacementMap
from profiler.trace import TokenTrace

FloatsL = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """Figures of one map on one trace.

    Attributes:
        fan_out: float64 (L,), mean over tokens of the distinct ranks that serve a token.
        ingress: float64 (L, R), share of all tokens with at least one expert on the rank.
        load: int64 (L, R), (token, expert) pairs served by the rank.
        intra_share: float64 (L,), co-activated pairs on one rank / all of them; NaN for top-1 models, which have none.
    """

    fan_out: FloatsL
    ingress: npt.NDArray[np.float64]
    load: npt.NDArray[np.int64]
    intra_share: FloatsL

    @property
    def busiest_ingress(self) -> FloatsL:
        """float64 (L,), the largest ingress of a rank."""
        busiest: FloatsL = self.ingress.max(axis=1)
        return busiest

    @property
    def imbalance_ratio(self) -> FloatsL:
        """float64 (L,), the largest load of a rank over the mean load, at least 1."""
        ratio: FloatsL = self.load.max(axis=1) / self.load.mean(axis=1)
        return ratio

    def summary(self) -> dict[str, dict[str, float | None]]:
        """For each metric its mean over layers and its worst layer; None where it is not defined."""
        worst = {"fan_out": np.max, "busiest_ingress": np.max, "imbalance_ratio": np.max, "intra_share": np.min}
        return {
            name: {"mean": _finite(np.mean(getattr(self, name))), "worst": _finite(pick(getattr(self, name)))}
            for name, pick in worst.items()
        }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def evaluate(placement: PlacementMap, tokens: TokenTrace) -> Metrics:
    """Measure a map on token sets.

    Raises:
        CoterieError: the map holds redundant experts.
    """
    num_ranks = placement.topology.num_ranks
    num_layers = len(tokens.topk_ids)
    fan_out, intra_share = np.empty(num_layers), np.empty(num_layers)
    ingress, load = np.empty((num_layers, num_ranks)), np.empty((num_layers, num_ranks), dtype=np.int64)
    picks_LT = tokens.picked.sum(axis=2)
    num_pairs_L = (picks_LT * (picks_LT - 1) // 2).sum(axis=1)
    for layer, (ids_TK, rank_of_expert) in enumerate(zip(tokens.topk_ids, placement.rank_of_expert, strict=True)):
        # A pick of no expert is served on one rank past the last, which is then left out.
        rank_of_pick = np.append(rank_of_expert, num_ranks)[np.minimum(ids_TK, len(rank_of_expert))]
        served_TR = _served(rank_of_pick, num_ranks + 1)[:, :num_ranks]
        ingress[layer] = (served_TR > 0).mean(axis=0)
        load[layer] = served_TR.sum(axis=0, dtype=np.int64)
        fan_out[layer] = ingress[layer].sum()
        intra_pairs = (served_TR * (served_TR - 1) // 2).sum(dtype=np.int64)
        intra_share[layer] = intra_pairs / num_pairs_L[layer] if num_pairs_L[layer] else np.nan
    return Metrics(fan_out, ingress, load, intra_share)


def _served(ranks_TK: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.int16]:
    """How many of its experts each token finds on each rank, int16 (T, R)."""
    out = np.zeros((len(ranks_TK), num_ranks), dtype=np.int16)
    rows = np.arange(len(ranks_TK))
    for column in ranks_TK.T:
        out[rows, column] += 1  # one expert of each token at a time, so no index repeats
    return out
