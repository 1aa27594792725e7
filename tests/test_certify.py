"""Proofs against trying every plan, and on recorded routing."""

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import traces as recorded
from placement import certify as certify_module
from placement.certify import certify, optimal_busiest_ingress, optimal_fan_out
from placement.columns import Columns, all_columns
from placement.layer_problem import LayerProblem, Objective
from placement.partition import NEVER, least_maximum, least_sum
from placement.solvers.load import load as load_only
from placement.solvers.partitioning import partitioning
from placement.solvers.search import ranks_of
from placement.topology import Topology
from profiler import CoterieError

FAR = 1e9
"""Seconds that no test needs."""


def problem_of(ids_TK, num_experts, num_ranks, load_cap):
    return LayerProblem.from_ids(ids_TK, num_experts, Topology.for_experts(num_experts, num_ranks), load_cap)


@st.composite
def problems(draw):
    num_experts = draw(st.sampled_from([6, 8]))
    num_ranks = draw(st.sampled_from([ranks for ranks in range(1, num_experts + 1) if num_experts % ranks == 0]))
    top_k = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.0, 1.0, 3.0]))
    scores = rng.gumbel(size=(draw(st.integers(1, 60)), num_experts)) + skew * rng.normal(size=num_experts)
    ids = np.argsort(-scores, axis=1)[:, :top_k].astype(np.uint8)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3]))] = 255
    return problem_of(ids, num_experts, num_ranks, draw(st.sampled_from([1.0, 1.1, 1.5, 8.0])))


def every_plan(num_experts, size):
    """All partitions of the experts into groups of the size."""

    def deal(left):
        if not left:
            yield []
            return
        for others in itertools.combinations(left[1:], size - 1):
            group = (left[0], *others)
            for rest in deal([expert for expert in left if expert not in group]):
                yield [group, *rest]

    yield from deal(list(range(num_experts)))


def slow_figures(problem, plan):
    """Tokens that reach each group of a plan and the load of each, token set by token set."""
    ingress, load = [], []
    for group in plan:
        hits = [len(set(group) & set(experts.tolist())) for experts in problem.sets]
        ingress.append(sum(weight for hit, weight in zip(hits, problem.weights, strict=True) if hit))
        load.append(sum(hit * weight for hit, weight in zip(hits, problem.weights, strict=True)))
    return ingress, load


def brute_force(problem, load_cap):
    """Least fan_out and least busiest_ingress by trying everything; None where no plan is within the cap."""
    figures = [slow_figures(problem, plan) for plan in every_plan(problem.num_experts, problem.slots_per_rank)]
    limit = load_cap * problem.expert_load.sum() / problem.num_ranks + 1e-6
    within = [ingress for ingress, load in figures if max(load) <= limit]
    if not within:
        return None
    total = problem.total_weight
    return min(sum(ingress) for ingress in within) / total, min(max(ingress) for ingress in within) / total


def linear_plan(problem):
    return np.arange(problem.num_experts) // problem.slots_per_rank


@settings(max_examples=60, deadline=None)
@given(problems())
def test_optima_are_those_of_brute_force(problem):
    best = brute_force(problem, problem.load_cap)
    fan_out = optimal_fan_out(problem, linear_plan(problem), FAR)
    busiest = optimal_busiest_ingress(problem, linear_plan(problem), FAR)
    if problem.num_ranks == 1:
        assert (fan_out.bound, busiest.bound) == pytest.approx(best)
    elif best is None:
        assert fan_out.rank_of_expert is None
        assert busiest.rank_of_expert is None
        assert f"hottest expert, {problem.expert_load.argmax()}," in busiest.message
    else:
        assert (fan_out.bound, busiest.bound) == pytest.approx(best)
        for optimum, pick in ((fan_out, sum), (busiest, max)):
            plan = [np.flatnonzero(optimum.rank_of_expert == rank) for rank in range(problem.num_ranks)]
            ingress, load = slow_figures(problem, [tuple(group.tolist()) for group in plan])
            assert pick(ingress) / problem.total_weight == pytest.approx(optimum.bound)
            assert max(load) <= problem.load_cap * np.mean(load) + 1e-6


@settings(max_examples=20, deadline=None)
@given(problems())
def test_the_strategy_is_the_optimum(problem):
    """Of the tokens of all folds, for any objective; a cap that none keeps is the load-only plan's load."""
    folds = np.arange(len(problem.sets)) % 2
    given = replace(problem, folds=folds, objective=Objective(load=1.0))
    slots = partitioning(given, np.random.default_rng(0))
    plan = ranks_of(slots, problem)
    assert (slots == partitioning(given, np.random.default_rng(0))).all()
    load = np.bincount(plan, problem.expert_load, minlength=problem.num_ranks)
    balanced = np.bincount(ranks_of(load_only(problem, np.random.default_rng(0)), problem), problem.expert_load)
    assert load.max() <= max(problem.load_cap * load.mean(), balanced.max()) + 1e-6
    assert certify(problem, plan, FAR).busiest_ingress.optimal
    slots = partitioning(replace(given, objective=Objective(fan_out=1.0)), np.random.default_rng(0))
    assert certify(problem, ranks_of(slots, problem), FAR).fan_out.optimal


def test_what_the_strategy_refuses():
    ids = random_ids(3, 1, 50, 64, 2)[0]
    for problem, why in (
        (problem_of(ids, 64, 4, 1.1), "16 of 64 experts, which are too many"),
        (LayerProblem.from_ids(ids, 64, Topology(1, 16, 5), 1.1), "80 slots for 64 experts"),
        (replace(problem_of(ids, 64, 16, 1.1), num_groups=4), "no groups to preserve"),
    ):
        with pytest.raises(CoterieError, match=why):
            partitioning(problem, np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans(), st.booleans())
def test_no_bound_is_above_the_optimum(problem, enumerate_groups, in_time):
    """Whichever method is taken and however early it is stopped; the plan's own imbalance stands for a cap it breaks."""
    with pytest.MonkeyPatch.context() as patch:
        if not enumerate_groups:
            patch.setattr(certify_module, "MAX_MATCHED", 0)
            patch.setattr(certify_module, "can_enumerate", lambda _: False)
        certificate = certify(problem, linear_plan(problem), FAR if in_time else 0.0)
    fan_out, busiest = brute_force(problem, certificate.load_cap)
    assert certificate.load_cap >= problem.load_cap
    assert certificate.fan_out.bound <= fan_out + 1e-12
    assert certificate.busiest_ingress.bound <= busiest + 1e-12
    if enumerate_groups and in_time:
        assert (certificate.fan_out.bound, certificate.busiest_ingress.bound) == pytest.approx((fan_out, busiest))
    for bound in (certificate.fan_out, certificate.busiest_ingress):
        assert bound.gap >= 0
        assert bound.optimal == (bound.gap == 0)
    assert json.loads(json.dumps(certificate.to_json()))["fan_out"]["gap"] == certificate.fan_out.gap


@settings(max_examples=30, deadline=None)
@given(problems())
def test_matching_and_set_partitioning_agree_where_both_apply(problem):
    pairs = LayerProblem(
        problem.sets, problem.folds, problem.weights, problem.num_experts,
        Topology.for_experts(problem.num_experts, problem.num_experts // 2), problem.load_cap,
    )  # fmt: skip
    answers = []
    for limit in (0, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certify_module, "MAX_MATCHED", limit)
            found = (solve(pairs, linear_plan(pairs), FAR) for solve in (optimal_fan_out, optimal_busiest_ingress))
            answers.append([optimum.bound for optimum in found])
    assert answers[0] == answers[1]


def test_leaving_an_expert_out_is_never_the_cheaper_way():
    """Few tokens, so that groups cost little: the relaxation once left experts out and could prove 3.75 only."""
    ids = np.array([[0, 3, 4, 6], [0, 3, 4, 6], [3, 4, 6, 7], [3, 5, 6, 7]], dtype=np.uint8)
    problem = problem_of(ids, 8, 4, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_module, "MAX_MATCHED", 0)
        assert optimal_fan_out(problem, linear_plan(problem), FAR).bound == 4


@given(problems())
def test_ingress_of_groups_by_parts_and_by_counting(problem):
    columns = all_columns(problem, np.inf)
    assert (np.diff(columns.ingress) >= 0).all()
    loads = []
    for group, ingress in zip(columns.members.tolist(), columns.ingress.tolist(), strict=True):
        [expected], [load] = slow_figures(problem, [group])
        assert columns.ingress[columns.rows_of(np.array([group]))] == ingress == expected
        loads.append(load)
    limit = sorted(loads)[len(loads) // 2]
    assert len(all_columns(problem, limit)) == sum(load <= limit for load in loads)


def test_search_branches_where_the_relaxation_is_not_whole():
    """Three experts any two of which are cheap together: the relaxation takes half of each pair, no plan can."""
    sets = np.array([[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]], dtype=np.int32)
    problem = LayerProblem(
        sets, np.zeros(6, dtype=np.int64), np.full(6, 10.0), 6, Topology.for_experts(6, 3), load_cap=9.0
    )
    columns = all_columns(problem, np.inf)
    found = least_sum(columns, 3, None, time.perf_counter() + FAR)
    assert found.value == found.bound == 100  # 12 tokens' picks less 2 pairs together
    found = least_maximum(columns, 3, None, time.perf_counter() + FAR)
    assert found.value == found.bound == 40


def test_optimum_of_planted_groups():
    rng = np.random.default_rng(0)
    groups = rng.permutation(16).reshape(4, 4)
    ids = groups[rng.integers(0, 4, 400)].astype(np.uint8)
    optimum = optimal_busiest_ingress(problem_of(ids, 16, 4, 1.3), linear_plan(problem_of(ids, 16, 4, 1.3)))
    assert {tuple(np.flatnonzero(optimum.rank_of_expert == rank)) for rank in range(4)} == {
        tuple(sorted(group)) for group in groups.tolist()
    }
    certificate = certify(problem_of(ids, 16, 4, 1.3), optimum.rank_of_expert)
    assert certificate.fan_out.optimal
    assert certificate.busiest_ingress.optimal
    assert certificate.fan_out.value == 1.0
    assert "proved optimal" in certificate.statement


def test_large_layers_say_that_no_tight_bound_is_known():
    problem = problem_of(random_ids(3, 1, 500, 64, 8)[0], 64, 4, 1.2)
    certificate = certify(problem, linear_plan(problem))
    assert "no tight bound is known at this size (64 experts, 16 a rank)" in certificate.statement
    assert certificate.fan_out.method == "counting"


def test_time_that_ran_out_is_not_called_a_matter_of_size():
    problem = problem_of(random_ids(0, 1, 300, 16, 4)[0], 16, 4, 1.2)
    assert "time ran out" in certify(problem, linear_plan(problem), 0.0).statement


def test_a_cap_below_the_hottest_expert():
    ids = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]], dtype=np.uint8)
    for num_ranks in (2, 3):
        problem = problem_of(ids, 6, num_ranks, 1.1)
        for solve in (optimal_fan_out, optimal_busiest_ingress):
            optimum = solve(problem, linear_plan(problem))
            assert optimum.rank_of_expert is None
            assert optimum.bound == np.inf
            assert "hottest expert, 0, beside the coldest" in optimum.message


def test_what_is_refused():
    ids = np.array([[0, 1]], dtype=np.uint8)
    problem = problem_of(ids, 4, 2, 1.1)
    with pytest.raises(CoterieError, match="2 of 4 experts on each of 2 ranks"):
        certify(problem, [0, 0, 0, 1])
    with pytest.raises(CoterieError, match="6 slots for 4 experts"):
        certify(LayerProblem.from_ids(ids, 4, Topology(1, 2, 3), 1.1), [0, 0, 1, 1])
    with pytest.raises(CoterieError, match="proofs count tokens"):
        certify(LayerProblem.from_ids(ids, 4, Topology(1, 2, 2), 1.1, weights_T=np.array([0.5])), [0, 0, 1, 1])


def test_columns_of_no_partition():
    problem = problem_of(np.array([[0, 1]], dtype=np.uint8), 4, 2, 9.0)
    every = all_columns(problem, np.inf)
    rows = every.rows_of(np.array([[0, 1], [0, 2]]))
    columns = Columns(every.members[rows], every.ingress[rows], every.expert_load)
    assert least_maximum(columns, 2, None, time.perf_counter() + FAR) == (None, NEVER, NEVER)


needs_traces = pytest.mark.skipif(not recorded.FOLDER.is_dir(), reason="no recorded traces; set COTERIE_TRACES")


@needs_traces
@pytest.mark.parametrize(("num_ranks", "fan_out"), [(2, 1.268), (4, 1.522)])
def test_known_optima_of_llama_moe(num_ranks, fan_out):
    from benchmarks.certificates import pairs_problem

    problems = [
        pairs_problem(counts, num_ranks) for counts in np.load(recorded.FOLDER / "llama-moe-coactivation.npz")["base"]
    ]
    optima = [optimal_fan_out(problem, linear_plan(problem), FAR).bound for problem in problems]
    assert np.mean(optima) == pytest.approx(fan_out, abs=5e-4)


@needs_traces
def test_a_layer_of_gpt_oss_is_proved_optimal():
    ids = recorded.load("gpt-oss-20b", every_nth_layer=12).split_by_sequence()[0].require_tokens().topk_ids[1]
    problem = problem_of(ids, 32, 8, 1.1)
    optimum = optimal_busiest_ingress(problem, linear_plan(problem), FAR)
    certificate = certify(problem, optimum.rank_of_expert, FAR)
    assert certificate.busiest_ingress.optimal
    assert certificate.busiest_ingress.method == "set partitioning"
