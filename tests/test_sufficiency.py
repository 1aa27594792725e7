"""Enough tokens, halves, transfer and intervals; plans come from a planner that is a plain function."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import make_spec, make_trace, random_ids

from placement.bootstrap import bootstrap
from placement.cost import FIGURES, evaluate, fan_out_counts, serving_ranks
from placement.placement_map import PlacementMap
from placement.solvers import Options, plan
from placement.sufficiency import adjusted_rand, convergence, recommend, some_layers, split_half, transfer
from placement.topology import Topology
from profiler import Profile

TOPOLOGY = Topology.for_experts(16, 4)
PLANNER = partial(plan, topology=TOPOLOGY, options=Options(num_kicks=3))


def big_profile():
    trace = make_trace(random_ids(0, 2, 4000, 16, 4), num_sequences=40)
    trace.domain_ids[:] = trace.sequence_ids // 2 % 2
    return Profile.from_tokens(make_spec(2, 16, 4), ["prose", "code"], trace, {})


def test_convergence_takes_whole_sequences_and_ends_with_all():
    planned, held_out = big_profile().split_by_sequence()
    seen = []
    done = []
    curve = convergence(
        planned, held_out.tokens, lambda part: seen.append(part) or PLANNER(part), 4, on_plan=lambda: done.append(1)
    )
    assert curve["tokens"].max() == planned.num_tokens
    assert len(curve) == len(seen) == len(done) == 2 * 3 + 1
    for part in seen:
        _, sizes = np.unique(part.tokens.sequence_ids, return_counts=True)
        assert (sizes == 100).all()
    whole = curve[curve["tokens"] == planned.num_tokens].iloc[0]
    assert whole["busiest_ingress"] == evaluate(PLANNER(planned), held_out.tokens).busiest_ingress.mean()
    assert whole["busiest_ingress"] <= curve["busiest_ingress"].iloc[0]


def curve_of(values):
    sizes = [1000 * 2**place for place in range(len(values))]
    return pd.DataFrame({"tokens": sizes, "draw": 0, "busiest_ingress": values})


def test_recommendation_is_the_first_size_from_which_all_are_near():
    found = recommend(curve_of([0.9, 0.606, 0.61, 0.602, 0.600]))
    assert found.tokens == 8000
    assert found.sentence.startswith("8,000 tokens a layer are enough")
    assert recommend(curve_of([0.9, 0.605, 0.602, 0.600])).tokens == 2000


def test_no_number_while_the_curve_still_falls():
    found = recommend(curve_of([0.9, 0.8, 0.7]))
    assert found.tokens is None
    assert "14.3%" in found.sentence
    assert recommend(curve_of([0.7])).tokens is None


def test_a_long_sequence_does_not_put_sizes_out_of_order():
    """One draw takes a long sequence first, so that its two smallest sizes are the same tokens."""
    tokens, draws = [900, 900, 1000, 2000, 250, 500, 1000], [0, 0, 0, 0, 1, 1, 1]
    curve = pd.DataFrame({"tokens": tokens, "draw": draws, "busiest_ingress": [0.45, 0.45, 0.4, 0.4, 0.5, 0.401, 0.4]})
    assert recommend(curve).tokens == 1000


def test_a_domain_may_be_called_like_a_baseline():
    planned, held_out = big_profile().split_by_sequence()
    named = [replace(part, domains=("linear", *part.domains[1:])) for part in (planned, held_out)]
    table = transfer(*named, PLANNER, {"linear": PlacementMap.linear(planned.model, TOPOLOGY)})
    assert len(table) == 6
    assert "linear (domain)" in set(table["planned_on"])


def test_two_halves_of_structured_routing_agree():
    planned, held_out = big_profile().split_by_sequence()
    table = split_half(planned, held_out.tokens, PLANNER)
    assert (table["load_correlation"] > 0.95).all()
    assert (table["coactivation_correlation"] > 0.9).all()
    assert (table["first"] / table["second"]).tolist() == pytest.approx([1, 1], abs=0.05)  # other plans, as good
    always_linear = split_half(planned, held_out.tokens, lambda part: PlacementMap.linear(part.model, TOPOLOGY))
    assert (always_linear["plan_agreement"] == 1).all()


def test_adjusted_rand_is_one_for_the_same_and_about_zero_by_chance():
    ranks = np.repeat(np.arange(4), 4)
    assert adjusted_rand(ranks, (ranks + 1) % 4) == 1
    rng = np.random.default_rng(0)
    assert abs(np.mean([adjusted_rand(ranks, rng.permutation(ranks)) for _ in range(200)])) < 0.03


def test_transfer_has_no_regret_at_home():
    planned, held_out = big_profile().split_by_sequence()
    table = transfer(planned, held_out, PLANNER, {"linear": PlacementMap.linear(planned.model, TOPOLOGY)})
    assert len(table) == 6
    home = table[table["planned_on"] == table["measured_on"]]
    assert (home["regret"] == 0).all()
    assert (table[table["planned_on"] == "linear"]["regret"] > 0).all()


def test_few_layers_are_studied_at_equal_distances():
    trace = make_trace(random_ids(0, 9, 60, 8, 2))
    part, layers = some_layers(Profile.from_tokens(make_spec(9, 8, 2), ["a", "b"], trace, {}), 3)
    assert layers == [0, 4, 8]
    assert part.model.layer_ids == (0, 4, 8)
    assert (part.tokens.topk_ids == trace.topk_ids[[0, 4, 8]]).all()


def test_picks_of_no_expert_reach_no_rank():
    ids = random_ids(0, 2, 400, 8, 2)
    ids[:, ::2, 1] = 255
    profile = Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], make_trace(ids), {})
    linear = PlacementMap.linear(profile.model, Topology.for_experts(8, 4))
    ranks = np.stack(list(serving_ranks(linear, profile.tokens)))
    assert (ranks == np.where(ids == 255, -1, ids // np.uint8(2)).astype(np.int8)).all()
    metrics = evaluate(linear, profile.tokens)
    table = bootstrap({"linear": linear}, profile.tokens).set_index("figure")
    for figure in FIGURES:
        assert table.loc[figure]["value"] == pytest.approx(getattr(metrics, figure).mean())


def test_too_little_to_halve_is_said():
    assert "too few to plan from parts" in recommend(curve_of([0.9])).sentence


@pytest.mark.parametrize("num_redundant", [0, 4])
def test_bootstrap_values_are_the_evaluators(num_redundant):
    profile = big_profile()
    topology = Topology.for_experts(16, 4, 2, num_redundant)
    maps = {"linear": PlacementMap.linear(profile.model, TOPOLOGY)}
    maps["plan"] = plan(profile, topology, options=Options(num_kicks=2, num_redundant=num_redundant))
    table = bootstrap(maps, profile.tokens).set_index(["map", "figure"])
    for name, placement in maps.items():
        metrics = evaluate(placement, profile.tokens)
        for figure in FIGURES:
            row = table.loc[(name, figure)]
            assert row["value"] == pytest.approx(getattr(metrics, figure).mean())
            assert row["low"] <= row["value"] <= row["high"]
        fans = fan_out_counts(placement, profile.tokens)
        assert fans.sum(axis=1).tolist() == [profile.num_tokens] * 2
        assert (fans * np.arange(fans.shape[1])).sum(axis=1) / profile.num_tokens == pytest.approx(metrics.fan_out)
    row = table.loc[("plan", "busiest_ingress")]
    assert row["over_plan"] == row["over_plan_low"] == row["over_plan_high"] == 0
    assert row["over_linear_low"] <= row["over_linear"] <= row["over_linear_high"]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 60 small samples, the 90% intervals hold the figure of all traffic in most."""
    whole = Profile.from_tokens(
        make_spec(1, 16, 4), ["a", "b"], make_trace(random_ids(5, 1, 60_000, 16, 4), num_sequences=1200), {}
    )
    linear = {"linear": PlacementMap.linear(whole.model, TOPOLOGY)}
    metrics = evaluate(linear["linear"], whole.tokens)
    truth = {figure: getattr(metrics, figure)[0] for figure in FIGURES}
    held = dict.fromkeys(FIGURES, 0)
    for start in range(60):
        mine = whole.tokens.where(whole.tokens.sequence_ids // 20 == start)
        for figure, row in bootstrap(linear, mine, 200, start, 0.9).set_index("figure").iterrows():
            held[figure] += row["low"] <= truth[figure] <= row["high"]
    assert min(held.values()) >= 45
