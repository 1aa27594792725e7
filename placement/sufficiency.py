"""Was there enough text?  Plans made from less, from other halves and from other domains, measured on the same traffic.

Plans come from a `Planner`, a function that the caller has filled with strategy, topology and options, so that this
module knows no solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from placement.cost import FIGURES, evaluate
from placement.placement_map import EMPTY_SLOT, PlacementMap
from profiler.analysis import total_coactivation, total_load
from profiler.profile import Profile
from profiler.trace import TokenTrace

Planner = Callable[[Profile], PlacementMap]
"""A plan from a profile with token sets: the whole recipe but the data."""

TOLERANCE = 0.01
"""A size is enough if it and all larger ones stay within this share of the figure of all tokens."""
FEWEST_TOKENS = 250
"""The smallest amount of text that is planned from."""


def convergence(
    planned: Profile,
    held_out: TokenTrace,
    planner: Planner,
    num_sizes: int = 6,
    num_draws: int = 2,
    seed: int = 0,
    on_plan: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """The held-out figures of plans made from more and more text.

    Sizes double up to all tokens.  A draw takes whole sequences in a random order until it has enough tokens; larger
    sizes of a draw hold its smaller ones.

    Args:
        planned: what there is to plan with.
        held_out: other sequences, to measure all plans on.
        num_draws: random orders; spread among them is luck of the text.
        on_plan: called as each plan is done.

    Returns:
        A row for each size and draw: `tokens` that were planned with, `draw`, and the held-out mean over layers of
        `busiest_ingress`, `fan_out` and `imbalance_ratio`.
    """
    tokens = planned.require_tokens()
    sizes = np.unique(np.maximum(tokens.num_tokens / 2.0 ** np.arange(num_sizes), FEWEST_TOKENS).astype(int))
    sizes = np.unique(np.minimum(sizes, tokens.num_tokens))
    sequences, place_T = np.unique(tokens.sequence_ids, return_inverse=True)
    length_S = np.bincount(place_T)
    rows = []
    for draw in range(num_draws):
        order = np.random.default_rng((seed, draw)).permutation(len(sequences))
        upto_S = np.empty(len(sequences), dtype=np.int64)
        upto_S[order] = np.cumsum(length_S[order]) - length_S[order]  # tokens of the draw before each sequence
        for size in sizes:
            if draw and size == tokens.num_tokens:
                continue  # all tokens can be drawn in one way only
            some = tokens.where((upto_S < size)[place_T])
            placement = planner(Profile.from_tokens(planned.model, planned.domains, some, planned.provenance))
            rows.append({"tokens": some.num_tokens, "draw": draw, **_figures(placement, held_out)})
            on_plan()
    return pd.DataFrame(rows).sort_values(["tokens", "draw"], ignore_index=True)


@dataclass(frozen=True)
class Recommendation:
    """How many tokens are enough.

    Attributes:
        tokens: the least number that is; None where even all that there were may be too few.
        all_tokens: what there was.
        figure: held-out busiest_ingress of all tokens.
        still_falling: by how much of it the last doubling brought it down; None where there was too little to halve.
    """

    tokens: int | None
    all_tokens: int
    figure: float
    still_falling: float | None

    @property
    def sentence(self) -> str:
        """In plain words."""
        if self.tokens is not None:
            return (
                f"{self.tokens:,} tokens a layer are enough: they and more come within {TOLERANCE:.0%} of the final "
                f"held-out figure ({self.figure:.3f} with {self.all_tokens:,})."
            )
        if self.still_falling is None:
            return f"{self.all_tokens:,} tokens a layer are too few to plan from parts of them; record more text."
        return (
            f"{self.all_tokens:,} tokens a layer may not be enough: the last doubling still brought busiest_ingress "
            f"down by {self.still_falling:.1%}; record more text."
        )


def recommend(curve: pd.DataFrame, tolerance: float = TOLERANCE) -> Recommendation:
    """The least calibration size that, with all larger ones, is within `tolerance` of the figure of all tokens.

    The figure of all tokens is only final if half of them come as near: where the last doubling still won more than
    the tolerance, no number is named.

    Args:
        curve: as `convergence` gives it.
    """
    by_size = _mean_curve(curve, "busiest_ingress")
    final, sizes = float(by_size.iloc[-1]), by_size.index
    near = (by_size / final - 1) <= tolerance
    enough = None
    for size, fits in zip(reversed(sizes), reversed(near.tolist()), strict=True):
        if not fits:
            break
        enough = int(size)
    if len(by_size) < 2:
        return Recommendation(None, int(sizes[-1]), final, None)
    falling = float(by_size.iloc[-2] / final - 1)
    return Recommendation(enough if falling <= tolerance else None, int(sizes[-1]), final, max(falling, 0.0))


def split_half(
    planned: Profile, held_out: TokenTrace, planner: Planner, seed: int = 0, on_plan: Callable[[], None] = lambda: None
) -> pd.DataFrame:
    """Do two random halves of the text tell the same story?

    Returns:
        A row for each layer: `layer`; `load_correlation` and `coactivation_correlation`, Pearson's r of the halves'
        counts (1 is the same; of pairs NaN for top-1 models); `plan_agreement`, the adjusted Rand index of their two
        plans (Hubert and Arabie, Journal of Classification 2, 1985; 0 is chance, 1 the same companions), NaN with
        redundant experts; `first` and `second`, the two plans' busiest_ingress on the same held-out tokens: plans may
        differ much and be as good as each other.
    """
    tokens = planned.require_tokens()
    sequences, place_T = np.unique(tokens.sequence_ids, return_inverse=True)
    in_first_S = np.random.default_rng(seed).permutation(len(sequences)) % 2 == 0
    halves = [
        Profile.from_tokens(planned.model, planned.domains, tokens.where(in_first_S[place_T] == side), {})
        for side in (True, False)
    ]
    maps = []
    for half in halves:
        maps.append(planner(half))
        on_plan()
    first, second = (evaluate(each, held_out).busiest_ingress for each in maps)
    upper = np.triu_indices(planned.model.num_experts, 1)
    loads, pairs = ([count(half) for half in halves] for count in (total_load, total_coactivation))
    return pd.DataFrame(
        {
            "layer": planned.model.layer_ids,
            "load_correlation": [_correlation(*both) for both in zip(*loads, strict=True)],
            "coactivation_correlation": [
                _correlation(one[upper], other[upper]) for one, other in zip(*pairs, strict=True)
            ],
            "plan_agreement": _agreement(*maps),
            "first": first,
            "second": second,
        }
    )


def transfer(
    planned: Profile,
    held_out: Profile,
    planner: Planner,
    baselines: Mapping[str, PlacementMap],
    domains: Sequence[str] | None = None,
    on_plan: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Planned on one domain, measured on another.

    Args:
        planned, held_out: the same domains, other sequences.
        domains: which ones; all if None.
        baselines: maps to measure on every domain beside the domains' own plans, such as linear and the plan itself.

    Returns:
        A row for each map and domain measured on: `planned_on`, `measured_on` (a domain called like a baseline has
        ` (domain)` behind its name), `busiest_ingress`, `fan_out` and
        `imbalance_ratio`, held out, means over layers; `regret`, busiest_ingress over that of the domain's own plan
        less 1.  Domains without tokens on both sides are left out.
    """

    def label(domain: str) -> str:
        return f"{domain} (domain)" if domain in baselines else domain

    own, unseen = (
        {label(domain): part for domain, part in each.split_by_domain().items()} for each in (planned, held_out)
    )
    wanted = set(map(label, domains or planned.domains))
    shared = [name for name in own if name in wanted and _has(own[name]) and _has(unseen.get(name))]
    maps = dict(baselines)
    for name in shared if len(shared) > 1 else []:
        maps[name] = planner(own[name])
        on_plan()
    rows = [
        {"planned_on": source, "measured_on": name, **_figures(placement, unseen[name].require_tokens())}
        for source, placement in maps.items()
        for name in (shared if len(shared) > 1 else [])
    ]
    frame = pd.DataFrame(rows, columns=["planned_on", "measured_on", *FIGURES])
    at_home = frame[frame["planned_on"] == frame["measured_on"]].set_index("measured_on")["busiest_ingress"]
    own = frame["measured_on"].map(at_home)
    frame["regret"] = np.where(own > 0, frame["busiest_ingress"] / own.where(own > 0, 1.0) - 1, 0.0)
    return frame


def some_layers(profile: Profile, num_layers: int) -> tuple[Profile, list[int]]:
    """A profile of at most so many layers at equal distances, and which: a study of all would plan for hours."""
    chosen = np.unique(np.linspace(0, profile.model.num_layers - 1, num_layers).round().astype(int)).tolist()
    if len(chosen) == profile.model.num_layers:
        return profile, chosen
    model = replace(profile.model, layer_ids=tuple(profile.model.layer_ids[layer] for layer in chosen))
    tokens = profile.require_tokens().without_weights()
    tokens = replace(tokens, topk_ids=tokens.topk_ids[chosen])
    return Profile.from_tokens(model, profile.domains, tokens, profile.provenance), chosen


def _has(profile: Profile | None) -> bool:
    """Whether any of its tokens was taken by an expert."""
    return profile is not None and profile.tokens is not None and bool(profile.tokens.picked.any())


def _figures(placement: PlacementMap, tokens: TokenTrace) -> dict[str, float]:
    metrics = evaluate(placement, tokens)
    return {name: float(np.mean(getattr(metrics, name))) for name in FIGURES}


def _mean_curve(curve: pd.DataFrame, figure: str) -> pd.Series[float]:
    """The mean over draws by size: draws stop at whole sequences, so their numbers of tokens are averaged too."""
    rank = curve.groupby("draw")["tokens"].rank(method="first")  # the same tokens may be drawn for two sizes
    place = np.where(curve["tokens"] == curve["tokens"].max(), rank.max(), rank)
    sizes = curve.groupby(place)["tokens"].mean().round().astype(int)
    means = curve.groupby(place)[figure].mean()
    means.index = pd.Index(sizes)
    return means


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _agreement(first: PlacementMap, second: PlacementMap) -> list[float]:
    for placement in (first, second):
        slots = placement.physical_to_logical_map
        if (slots != EMPTY_SLOT).sum(axis=1).max() > placement.model.num_experts:
            return [float("nan")] * placement.model.num_layers
    return [adjusted_rand(*ranks) for ranks in zip(first.rank_of_expert, second.rank_of_expert, strict=True)]


def adjusted_rand(first_E: np.ndarray, second_E: np.ndarray) -> float:
    """Hubert and Arabie's index of two partitions of the experts: 1 the same, 0 as alike as chance."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = np.zeros((first_E.max() + 1, second_E.max() + 1))
    np.add.at(table, (first_E, second_E), 1)
    both, one, other = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    everything = len(first_E) * (len(first_E) - 1) / 2
    chance = one * other / everything if everything else 0.0
    most = (one + other) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)
