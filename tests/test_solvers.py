"""Every strategy on every scenario, and the search's closed forms against trying the swap."""

import importlib
import itertools

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import traces as recorded
from placement.compare import plan_and_compare
from placement.cost import evaluate
from placement.solvers import STRATEGIES, plan, search
from placement.solvers.contract import LayerProblem
from placement.topology import Topology
from profiler import CoterieError, Profile
from profiler.analysis import shuffled

search_module = importlib.import_module("placement.solvers.search")

SCENARIOS = {
    "structured": random_ids(0, 1, 400, 16, 4),
    "one token": random_ids(1, 1, 1, 16, 4),
    "top-1": random_ids(2, 1, 300, 16, 1),
    "every expert": np.tile(np.arange(16, dtype=np.uint8), (1, 20, 1)),
    "one set": np.tile(np.arange(4, dtype=np.uint8), (1, 50, 1)),
    "many experts": random_ids(3, 1, 200, 256, 8),
}


def problem_of(ids_LTK, num_experts, num_ranks, load_cap=1.1):
    return LayerProblem.from_ids(ids_LTK[0], num_experts, num_ranks, load_cap)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_parts_and_same_seed_same_plan(name, scenario, num_ranks):
    ids = SCENARIOS[scenario]
    problem = problem_of(ids, 256 if scenario == "many experts" else 16, num_ranks)
    plans = [STRATEGIES[name](problem, np.random.default_rng(7)) for _ in range(2)]
    assert (np.bincount(plans[0], minlength=num_ranks) == problem.slots_per_rank).all()
    assert (plans[0] == plans[1]).all()


@given(traces())
def test_merging_equal_sets_loses_nothing(case):
    spec, trace = case
    problem = LayerProblem.from_ids(trace.topk_ids[0], spec.num_experts, 2, 1.1)
    expected = {}
    for ids in trace.topk_ids[0].tolist():
        expected[tuple(sorted(ids))] = expected.get(tuple(sorted(ids)), 0) + 1
    assert dict(zip(map(tuple, problem.sets.tolist()), problem.weights.tolist(), strict=True)) == expected
    assert problem.sets.tolist() == sorted(problem.sets.tolist())
    picks = np.bincount(trace.topk_ids[0].ravel(), minlength=spec.num_experts)
    assert (problem.expert_load == picks).all()


def slow_objective(problem, rank_of, power):
    """Sum over ranks of ingress^power, token set by token set."""
    ingress = np.zeros(problem.num_ranks)
    for experts, weight in zip(problem.sets, problem.weights, strict=True):
        for rank in {int(rank_of[expert]) for expert in experts}:
            ingress[rank] += weight
    return float(((ingress / problem.weights.sum()) ** power).sum())


@given(traces(), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 4.0, 16.0]))
def test_descent_ends_where_no_swap_helps(case, seed, power):
    """The tallies stay right through all swaps: the value returned is the plan's, and no swap tried by hand is better."""
    spec, trace = case
    problem = LayerProblem.from_ids(trace.topk_ids[0], spec.num_experts, 4, 1.5)
    rank_of = np.random.default_rng(seed).permutation(spec.num_experts) // problem.slots_per_rank
    before = slow_objective(problem, rank_of, power)
    load = problem.expert_load
    limit = 1.3 * max(np.bincount(rank_of, load, minlength=4).max(), 1)
    members, first_member = search_module._members(problem)
    value = search_module._descend(problem.sets, problem.weights, members, first_member, rank_of, load, 4, limit, power)
    assert value == pytest.approx(slow_objective(problem, rank_of, power))
    assert value <= before * (1 + 1e-9)
    for a, b in itertools.combinations(range(spec.num_experts), 2):
        swapped = rank_of.copy()
        swapped[[a, b]] = rank_of[[b, a]]
        if np.bincount(swapped, load, minlength=4).max() <= limit:
            assert slow_objective(problem, swapped, power) >= value * (1 - 1e-9)


@pytest.mark.parametrize("load_cap", [1.0, 1.05, 1.2])
def test_search_keeps_the_load_cap_and_beats_load_only(load_cap):
    problem = problem_of(random_ids(5, 1, 2000, 32, 4), 32, 4, load_cap)
    found = search(problem, np.random.default_rng(0))
    balanced = STRATEGIES["load"](problem, np.random.default_rng(0))
    loads = [np.bincount(ranks, problem.expert_load, minlength=4) for ranks in (found, balanced)]
    assert loads[0].max() <= max(load_cap * loads[0].mean(), loads[1].max())
    if load_cap > 1.0:
        assert slow_objective(problem, found, 16.0) < slow_objective(problem, balanced, 16.0)


def test_search_finds_the_optimum_of_a_small_layer():
    """16 experts on 2 ranks: all 6,435 equal partitions can be tried."""
    problem = problem_of(random_ids(9, 1, 150, 16, 2), 16, 2, 2.0)
    found = search(problem, np.random.default_rng(0))
    best = min(
        slow_objective(problem, np.isin(np.arange(16), [0, *part]).astype(int), 16.0)
        for part in itertools.combinations(range(1, 16), 7)
    )
    assert slow_objective(problem, found, 16.0) == pytest.approx(best, rel=0.02)


def test_comparison_measures_on_unseen_sequences(profile):
    placement = plan_and_compare(profile, Topology.for_experts(16, 4))
    _, held_out = profile.split_by_sequence()
    assert list(placement.metrics) == list(STRATEGIES)
    assert placement.profile_digest == profile.digest
    assert placement.metrics["search"]["held_out"] == evaluate(placement, held_out.tokens).summary()
    figures = {name: value["held_out"]["busiest_ingress"]["mean"] for name, value in placement.metrics.items()}
    assert figures["search"] < min(figures["linear"], figures["load"], figures["random"])


def test_same_seed_same_map_another_seed_another(profile):
    maps = [plan(profile, Topology.for_experts(16, 4), "random", seed=seed) for seed in (0, 0, 1)]
    assert (maps[0].physical_to_logical_map == maps[1].physical_to_logical_map).all()
    assert (maps[0].physical_to_logical_map != maps[2].physical_to_logical_map).any()


def test_what_planning_refuses(profile):
    with pytest.raises(CoterieError, match="3 ranks cannot share 16 experts.*1, 2, 4, 8, 16"):
        Topology.for_experts(16, 3)
    with pytest.raises(CoterieError, match="3 nodes cannot share 4 ranks"):
        Topology.for_experts(16, 4, 3)
    with pytest.raises(CoterieError, match="load cap 0.9"):
        plan(profile, Topology.for_experts(16, 4), load_cap=0.9)
    with pytest.raises(CoterieError, match="'best': must be one of"):
        plan(profile, Topology.for_experts(16, 4), "best")
    with pytest.raises(CoterieError, match="8 slots for 16 experts"):
        plan(profile, Topology(1, 4, 2))
    other = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], make_trace(random_ids(0, 1, 20, 8, 2)), {})
    with pytest.raises(CoterieError, match="held-out one of"):
        plan_and_compare(profile, Topology.for_experts(16, 4), held_out=other)


@given(traces(), st.integers(0, 1000))
def test_shuffling_keeps_loads_and_sets(case, seed):
    spec, trace = case
    dealt = shuffled(trace, seed)
    for before, after in zip(trace.topk_ids, dealt.topk_ids, strict=True):
        picks = [np.bincount(ids.ravel(), minlength=spec.num_experts) for ids in (before, after)]
        assert (picks[0] == picks[1]).all()
        assert all(len(set(ids)) == spec.top_k for ids in after.tolist())


@pytest.mark.skipif(not recorded.FOLDER.is_dir(), reason="no recorded traces; set COTERIE_TRACES")
@pytest.mark.parametrize(
    ("name", "num_ranks", "floor"),
    [
        ("gpt-oss-20b", 4, 0.593),
        ("gpt-oss-20b", 8, 0.418),
        ("deepseek-v2-lite", 4, 0.659),
        ("deepseek-v2-lite", 8, 0.485),
        ("deepseek-v2-lite", 16, 0.359),
    ],
)
def test_search_beats_a_plain_swap_search_on_recorded_routing(name, num_ranks, floor):
    """What a 30-line swap search reached on these sequences: held-out busiest_ingress, mean of every sixth layer."""
    planned, unseen = recorded.load(name, every_nth_layer=6).split_by_sequence()
    placement = plan(planned, Topology.for_experts(planned.model.num_experts, num_ranks))
    assert evaluate(placement, unseen.tokens).busiest_ingress.mean() < floor
