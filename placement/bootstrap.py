"""How sure a held-out figure is: sequences drawn anew with replacement (Efron, Annals of Statistics 7, 1979).
Knows no solver.

Tokens of one sequence resemble each other, so sequences are drawn, not tokens; all maps meet the same draws, so that
differences between maps are surer than each figure.  The busiest rank of a draw is busier than that of the text itself,
being the largest of noisier figures, so intervals are moved back by how far the draws' mean lies from the figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from placement.cost import FIGURES, imbalance, serving_ranks
from placement.placement_map import PlacementMap
from profiler.trace import TokenTrace

Floats = npt.NDArray[np.float64]


def bootstrap(
    maps: Mapping[str, PlacementMap], tokens: TokenTrace, num_draws: int = 400, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Intervals of the figures of several maps, and of their gains.

    Returns:
        A row for each map and figure: `map`, `figure` (busiest_ingress, fan_out or imbalance_ratio, mean over layers),
        `value`, `low` and `high`, the interval at `level`; and for every other map `over_<map>`, the share
        by which this one is lower, with `over_<map>_low` and `over_<map>_high`.  With one sequence all ends are equal:
        it says nothing about others.
    """
    rng = np.random.default_rng(seed)
    num_sequences = len(np.unique(tokens.sequence_ids))
    drawn_BS = rng.multinomial(num_sequences, np.full(num_sequences, 1 / num_sequences), size=num_draws)
    weights_BS = np.concatenate([np.ones((1, num_sequences)), drawn_BS])  # the first row is what was observed
    drawn = {name: _figures(placement, tokens, weights_BS) for name, placement in maps.items()}
    tails = [(1 - level) / 2, (1 + level) / 2]
    rows = []
    for name, figures in drawn.items():
        for figure, values_B in figures.items():
            low, high = _interval(values_B, tails)
            row = {"map": name, "figure": figure, "value": values_B[0], "low": low, "high": high}
            for other, others in drawn.items():
                gain_B = 1 - np.divide(
                    values_B, others[figure], out=np.full_like(values_B, np.nan), where=others[figure] > 0
                )
                low, high = _interval(gain_B, tails)
                row |= {f"over_{other}": gain_B[0], f"over_{other}_low": low, f"over_{other}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def _interval(values_B: Floats, tails: list[float]) -> tuple[float, float]:
    """Quantiles of the draws, moved so that their mean is the figure itself, which comes first.

    Draws of sequences without picks have no gain and are left out; where all have none, or the figure has, neither has
    the interval.
    """
    observed, draws = float(values_B[0]), values_B[1:][np.isfinite(values_B[1:])]
    if not len(draws) or not np.isfinite(observed):
        return np.nan, np.nan
    low, high = np.quantile(draws - (draws.mean() - observed), tails)
    return float(low), float(high)


def _figures(placement: PlacementMap, tokens: TokenTrace, weights_BS: Floats) -> dict[str, Floats]:
    """Each figure's mean over layers, float64 (B,), with the sequences weighted as each row says."""
    sequences, place_T = np.unique(tokens.sequence_ids, return_inverse=True)
    length_B = weights_BS @ np.bincount(place_T)
    num_ranks = placement.topology.num_ranks
    sums = {name: np.zeros(len(weights_BS)) for name in FIGURES}
    for ranks_TK in serving_ranks(placement, tokens):
        reached_SR, load_SR = np.zeros((2, len(sequences), num_ranks))
        served_TR = np.zeros((len(ranks_TK), num_ranks + 1), dtype=np.int64)  # the last one gathers no expert
        np.add.at(served_TR, (np.arange(len(ranks_TK))[:, None], ranks_TK), 1)
        for rank in range(num_ranks):
            load_SR[:, rank] = np.bincount(place_T, served_TR[:, rank], minlength=len(sequences))
            reached_SR[:, rank] = np.bincount(place_T, served_TR[:, rank] > 0, minlength=len(sequences))
        ingress_BR = weights_BS @ reached_SR / length_B[:, None]
        load_BR = weights_BS @ load_SR
        sums["busiest_ingress"] += ingress_BR.max(axis=1)
        sums["fan_out"] += ingress_BR.sum(axis=1)
        sums["imbalance_ratio"] += imbalance(load_BR)
    return {name: total / len(tokens.topk_ids) for name, total in sums.items()}
