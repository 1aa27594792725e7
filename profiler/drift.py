"""Has the routing changed?  Two profiles, or the domains of one, against what sampling alone would show. Knows no plan.

Tokens of one sequence resemble each other, so chance is found by dealing whole sequences, not tokens, to the two sides
anew: a permutation test (Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from profiler.analysis import entropy
from profiler.errors import CoterieError
from profiler.profile import Profile
from profiler.trace import TokenTrace

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]

DRIFT_BELOW = 0.01
"""p from which a difference is called drift; many layers are looked at, so the usual 0.05 would cry wolf."""


_SEQUENCES_TOGETHER = 64


@dataclass(frozen=True)
class Drift:
    """How far two sides are apart.

    Attributes:
        layers: a row for each layer, and last one with `layer` "all" for the mean over layers: `load_distance` and
            `coactivation_distance`, Jensen-Shannon divergences in bits (Lin, IEEE Transactions on Information Theory
            37, 1991; 0 is alike, 1 is nothing in common) of the two sides' loads and co-activated pairs;
            `load_noise` and `coactivation_noise`, the median of what the same sequences show when they are dealt to the
            sides at random; `load_p` and `coactivation_p`, the share of deals that are as far apart or farther
            (with the observed one among them, so never 0); NaN where sides are so small that no difference between
            them could be called drift.
        experts: a row for each layer and expert: `first_share` and `second_share` of the side's picks in the layer,
            `change`, their ratio (second over first), `z`, their difference over its standard deviation among deals.
        num_sequences: of each side.
    """

    layers: pd.DataFrame
    experts: pd.DataFrame
    num_sequences: tuple[int, int]

    @property
    def p(self) -> float:
        """The smaller p of load and co-activation over all layers, doubled since there are two (Bonferroni).

        NaN where neither is known.
        """
        last = self.layers.iloc[-1]
        return float(np.minimum(1.0, 2 * np.fmin(last["load_p"], last["coactivation_p"])))

    @property
    def drifted(self) -> bool:
        """Whether the two differ by more than sampling noise."""
        return self.p < DRIFT_BELOW  # not so where p is not known


def drift(first: Profile, second: Profile, num_permutations: int = 299, seed: int = 0) -> Drift:
    """How two profiles of one model differ, and whether that is more than the noise of which texts were taken.

    Args:
        first, second: with token sets; all of these count.
        num_permutations: random deals; the smallest p that can be found is 1 / (this + 1).

    Raises:
        CoterieError: they are of different models, hold counts only, or have fewer than two sequences each.
    """
    if not first.model.routes_like(second.model):
        raise CoterieError(
            f"the profiles are of {first.model.describe()} and of {second.model.describe()}; compare one model's"
        )
    sides = [profile.require_tokens().without_weights() for profile in (first, second)]
    places = [np.unique(side.sequence_ids, return_inverse=True)[1] for side in sides]
    sizes = [int(place.max()) + 1 for place in places]
    if min(sizes) < 2:
        raise CoterieError(f"{min(sizes)} sequence on one side: noise needs at least 2 of each; profile more text")
    sequence_T = np.concatenate([places[0], places[1] + sizes[0]])
    in_first = np.arange(sum(sizes)) < sizes[0]
    return _drifts(first, TokenTrace.concatenate(sides), sequence_T, [in_first], num_permutations, seed)[0]


def domain_table(profile: Profile, num_permutations: int = 299, seed: int = 0) -> pd.DataFrame:
    """Each domain against all others of the profile.

    Returns:
        A row for each domain with tokens: `domain`, `tokens`, `sequences`, the columns of `Drift.layers` (mean over
        layers), `drifted`, and `hottest`, the layer and expert that stand out most against the other domains, as "layer
        3 expert 17 (4.1x)" or "(only here)", or "none".  Empty where there is one domain only.  Noise and p are NaN for
        a domain of one sequence, or beside one sequence.

    Raises:
        CoterieError: the profile holds counts only.
    """
    tokens = profile.require_tokens()
    # A sequence with tokens of several domains counts as one of each.
    unit_S, sequence_T = np.unique(
        tokens.domain_ids.astype(np.int64) * 2**32 + tokens.sequence_ids, return_inverse=True
    )
    domain_S = unit_S // 2**32
    present = np.unique(domain_S).tolist()
    if len(present) < 2:
        return pd.DataFrame()
    sides = [domain_S != index for index in present]
    rows = []
    for index, found in zip(present, _drifts(profile, tokens, sequence_T, sides, num_permutations, seed), strict=True):
        marked = found.experts[found.experts["second_share"] >= 1 / profile.model.num_experts]
        hottest = "none"
        if len(marked):  # else no token of the domain picked an expert
            top = marked.loc[marked["change"].idxmax()]
            times = f"{top['change']:.1f}x" if top["first_share"] > 0 else "only here"
            hottest = f"layer {top['layer']:.0f} expert {top['expert']:.0f} ({times})"
        rows.append(
            {
                "domain": profile.domains[index],
                "tokens": int((tokens.domain_ids == index).sum()),
                "sequences": found.num_sequences[1],
                **found.layers.iloc[-1].drop("layer").to_dict(),
                "drifted": found.drifted,
                "hottest": hottest,
            }
        )
    return pd.DataFrame(rows)


def domain_expert_table(profile: Profile) -> pd.DataFrame:
    """How each domain loads each expert.

    Returns:
        A row for each domain with tokens, layer and expert: `domain`, `layer`, `expert`, `share` of the domain's picks
        in the layer, `change`, that share over the expert's share in all domains together.
    """
    load_DLE = profile.counts.load
    share_DLE = load_DLE / np.maximum(load_DLE.sum(axis=2, keepdims=True), 1)
    all_LE = load_DLE.sum(axis=0) / np.maximum(load_DLE.sum(axis=(0, 2))[:, None], 1)
    change_DLE = np.divide(share_DLE, all_LE, out=np.ones_like(share_DLE), where=all_LE > 0)
    _, num_layers, num_experts = load_DLE.shape
    frames = [
        pd.DataFrame(
            {
                "domain": profile.domains[index],
                "layer": np.repeat(profile.model.layer_ids, num_experts),
                "expert": np.tile(np.arange(num_experts), num_layers),
                "share": share_DLE[index].ravel(),
                "change": change_DLE[index].ravel(),
            }
        )
        for index in np.flatnonzero(profile.counts.tokens)
    ]
    return pd.concat(frames, ignore_index=True)


def jensen_shannon(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> Floats:
    """Divergence in bits of counts along the last axis, each side scaled to 1; 0 where a side is empty."""
    sides = [np.asarray(side, dtype=np.float64) for side in (first, second)]
    sums = [side.sum(axis=-1, keepdims=True) for side in sides]
    shares = [side / np.maximum(total, 1e-300) for side, total in zip(sides, sums, strict=True)]
    bits = entropy((shares[0] + shares[1]) / 2) - (entropy(shares[0]) + entropy(shares[1])) / 2
    filled: Floats = np.where((sums[0] > 0).all(axis=-1) & (sums[1] > 0).all(axis=-1), bits.clip(min=0.0), 0.0)
    return filled


def _drifts(
    profile: Profile,
    tokens: TokenTrace,
    sequence_T: npt.NDArray[np.int64],
    first_sides: list[npt.NDArray[np.bool_]],
    num_permutations: int,
    seed: int,
) -> list[Drift]:
    """What `drift` gives, for several ways to part sequences 0 .. S-1 into a first side, bool (S,), and the rest.

    Sides of one sequence have no noise to compare with: NaN.
    """
    model, num_sequences = profile.model, len(first_sides[0])
    deals = [_deals(side, num_permutations, np.random.default_rng(seed)) for side in first_sides]
    distances: list[dict[str, list[Floats]]] = [{"load": [], "coactivation": []} for _ in deals]
    experts: list[list[pd.DataFrame]] = [[] for _ in deals]
    for layer_id, ids_TK, picked_TK in zip(model.layer_ids, tokens.topk_ids, tokens.picked, strict=True):
        experts_TK = np.where(picked_TK, ids_TK, model.num_experts).astype(np.int64)
        load_SE, pairs_SX = _sequence_counts(experts_TK, sequence_T, num_sequences, model.num_experts)
        for sides_BS, of_layer, rows in zip(deals, distances, experts, strict=True):
            for name, counts in (("load", load_SE), ("coactivation", pairs_SX)):
                in_first = sides_BS @ counts
                of_layer[name].append(jensen_shannon(in_first, counts.sum(axis=0) - in_first))
            rows.append(_expert_changes(layer_id, sides_BS @ load_SE, load_SE.sum(axis=0)))
    return [
        Drift(
            _distance_table(model.layer_ids, of_layer, _can_drift(side)),
            pd.concat(rows, ignore_index=True),
            (int(side.sum()), int((~side).sum())),
        )
        for side, of_layer, rows in zip(first_sides, distances, experts, strict=True)
    ]


def _deals(first_S: npt.NDArray[np.bool_], num_permutations: int, rng: np.random.Generator) -> Float32s:
    """Which sequences are on the first side, float32 (1 + permutations, S); the first row is what was observed."""
    if min(first_S.sum(), (~first_S).sum()) < 2:
        num_permutations = 0
    sides = np.tile(first_S.astype(np.float32), (1 + num_permutations, 1))
    sides[1:] = rng.permuted(sides[1:], axis=1)
    return sides


def _can_drift(first_S: npt.NDArray[np.bool_]) -> bool:
    """Whether sequences can be dealt to the sides in so many ways that the one observed may stand out.

    The p of the farthest of all deals is one over their number; of equal sides two are the same with names changed.
    """
    total, chosen = len(first_S), int(first_S.sum())
    return math.comb(total, chosen) / (2 if 2 * chosen == total else 1) > 2 / DRIFT_BELOW


def _sequence_counts(
    experts_TK: npt.NDArray[np.int64], sequence_T: npt.NDArray[np.int64], num_sequences: int, num_experts: int
) -> tuple[Float32s, Float32s]:
    """Load (S, E) and co-activated pairs (S, pairs that occur) of each sequence in one layer; expert E is none."""
    width = num_experts + 1
    load = np.bincount((sequence_T[:, None] * width + experts_TK).ravel(), minlength=num_sequences * width)
    first, second = np.triu_indices(experts_TK.shape[1], 1)
    ordered = np.sort(experts_TK, axis=1)
    pairs_TP = ordered[:, first] * width + ordered[:, second]
    real = (np.arange(width**2) % width < num_experts) & (np.bincount(pairs_TP.ravel(), minlength=width**2) > 0)
    column_of_pair = np.where(real, np.cumsum(real) - 1, real.sum())
    columns = int(real.sum()) + 1  # the last one gathers pairs with no expert
    pairs = np.empty((num_sequences, columns - 1), dtype=np.float32)
    order = np.argsort(sequence_T, kind="stable")
    firsts = np.searchsorted(sequence_T[order], np.arange(num_sequences + _SEQUENCES_TOGETHER))
    for start in range(0, num_sequences, _SEQUENCES_TOGETHER):  # all at once take three times the memory of the result
        rows, stop = order[firsts[start] : firsts[start + _SEQUENCES_TOGETHER]], start + _SEQUENCES_TOGETHER
        keys = (sequence_T[rows, None] - start) * columns + column_of_pair[pairs_TP[rows]]
        counted = np.bincount(keys.ravel(), minlength=_SEQUENCES_TOGETHER * columns).reshape(-1, columns)
        pairs[start:stop] = counted[: num_sequences - start, :-1]
    return load.reshape(num_sequences, width)[:, :-1].astype(np.float32), pairs


def _expert_changes(layer_id: int, in_first_BE: Float32s, load_E: Float32s) -> pd.DataFrame:
    """`Drift.experts` of one layer."""
    in_second_BE = load_E - in_first_BE
    first, second = (side / np.maximum(side.sum(axis=1, keepdims=True), 1) for side in (in_first_BE, in_second_BE))
    spread = (second - first)[1:].std(axis=0) if len(first) > 1 else np.full(len(load_E), np.nan)
    return pd.DataFrame(
        {
            "layer": layer_id,
            "expert": np.arange(len(load_E)),
            "first_share": first[0],
            "second_share": second[0],
            "change": second[0] / np.maximum(first[0], 1e-6),
            "z": np.divide(second[0] - first[0], spread, out=np.zeros_like(spread), where=spread != 0),
        }
    )


def _distance_table(layer_ids: tuple[int, ...], distances: dict[str, list[Floats]], can_drift: bool) -> pd.DataFrame:
    """`Drift.layers` from the distances (1 + permutations,) of each layer."""
    columns: dict[str, list[float]] = {}
    for name, per_layer in distances.items():
        distance_LB = np.stack([*per_layer, np.mean(per_layer, axis=0)])
        observed, dealt = distance_LB[:, :1], distance_LB[:, 1:]
        known = dealt.shape[1] > 0
        nothing = np.full(len(distance_LB), np.nan)
        farther = (dealt >= observed * (1 - 1e-6)).sum(axis=1)  # as far apart but for rounding
        columns[f"{name}_distance"] = observed[:, 0].tolist()
        columns[f"{name}_noise"] = (np.median(dealt, axis=1) if known else nothing).tolist()
        columns[f"{name}_p"] = ((1 + farther) / (1 + dealt.shape[1]) if known and can_drift else nothing).tolist()
    return pd.DataFrame({"layer": [*map(str, layer_ids), "all"], **columns})
