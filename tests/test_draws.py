"""Plans judged on sequences drawn anew."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_spec, make_trace
from hypothesis import given
from hypothesis import strategies as st

from placement.layer_problem import Draws, Objective
from placement.solvers import FEWEST_SEQUENCES, Options, layer_problems, objective_of
from placement.solvers.draws import MOST_PARTS, NUM_DRAWS, OF_ONE_FOLD, drawn_parts, mean_over_draws
from placement.topology import Topology
from profiler import Profile
from profiler.trace import TokenTrace


def slow_mean(draws: Draws, rank_of: np.ndarray, topology: Topology, objective: Objective) -> float:
    """Draw by draw and token by token."""
    values = []
    for times in draws.times:
        reached, load = np.zeros((2, topology.num_ranks))
        nodes, tokens = np.zeros(topology.num_nodes), 0.0
        for ids, sequence, weight in zip(draws.ids, draws.sequence, draws.weights, strict=True):
            counted = times[sequence] * weight
            tokens += counted
            ranks = [rank_of[expert] for expert in ids if expert < len(rank_of)]
            for rank in ranks:
                load[rank] += counted
            reached[list(set(ranks))] += counted
            nodes[list({rank // topology.ranks_per_node for rank in ranks})] += counted
        value = objective.ingress * reached.max() / tokens + objective.load * load.max() / load.mean()
        value += objective.fan_out * reached.sum() / tokens
        if topology.num_nodes > 1:
            value += objective.node_ingress * nodes.max() / tokens
        values.append(value)
    return float(np.mean(values))


@given(seed=st.integers(0, 10_000), nodes=st.sampled_from([1, 2]))
def test_the_mean_over_draws_is_that_of_counting_them(seed: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((30, 8)), axis=1)[:, :3].astype(np.uint8)
    ids[rng.random(ids.shape) < 0.1] = 255
    ids[0] = (0, 1, 2)
    times = rng.integers(0, 3, (4, 5)).astype(np.float64)
    times[:, 0] += 1
    sequence = np.append(0, rng.integers(0, 5, 29))
    draws = Draws(ids, sequence, rng.random(30) + 0.1, times)
    topology = Topology(nodes, 4 // nodes, 2)
    objective = Objective(ingress=rng.random(), node_ingress=rng.random(), load=rng.random(), fan_out=rng.random())
    rank_of = rng.permutation(8) // 2
    found = mean_over_draws(draws, rank_of, topology, objective)
    assert found == pytest.approx(slow_mean(draws, rank_of, topology, objective), rel=1e-12)


@pytest.mark.parametrize("num_sequences", [2, 50, 3 * MOST_PARTS + 7])
def test_draws_hold_as_many_sequences_and_now_and_then_those_of_one_fold(num_sequences: int) -> None:
    sequence_T = np.random.default_rng(0).permutation(np.repeat(np.arange(num_sequences), 2))
    fold_T = sequence_T % 2
    part_T, times = drawn_parts(sequence_T, fold_T, 3)
    num_parts = times.shape[1]
    assert num_parts in ({num_sequences} if num_sequences <= MOST_PARTS else {MOST_PARTS - 1, MOST_PARTS})
    assert times.shape == (NUM_DRAWS, num_parts)
    assert set(part_T.tolist()) == set(range(num_parts))
    fold_of_part = np.full(num_parts, -1)
    fold_of_part[part_T] = fold_T
    for draw, drawn in enumerate(times):
        if draw % OF_ONE_FOLD == 0:
            fold = draw // OF_ONE_FOLD % 2
            assert not drawn[fold_of_part != fold].any()
            assert drawn.sum() == (fold_of_part == fold).sum()
        else:
            assert drawn.sum() == num_parts
    again = drawn_parts(sequence_T, fold_T, 3)
    np.testing.assert_array_equal(times, again[1])


@pytest.mark.parametrize(("num_sequences", "counted"), [(2, 1.0), (23, 6 / 23), (600, 0.01)])
def test_the_fewer_sequences_the_more_counts_the_mean_rank(num_sequences: int, counted: float) -> None:
    trace = random_trace(num_sequences)
    profile = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {})
    topology = Topology.for_experts(8, 4)
    whole = objective_of(profile.model, topology, Options())
    (problem,) = layer_problems(profile, topology, Options())
    assert problem.objective.fan_out * 4 == pytest.approx(counted * problem.objective.ingress)
    assert problem.objective.fan_out * 4 + problem.objective.ingress == pytest.approx(whole.ingress)
    assert problem.objective.load == whole.load
    assert problem.num_folds == (1 if num_sequences < FEWEST_SEQUENCES else 4)
    assert problem.draws is not None
    assert problem.draws.times.shape == (NUM_DRAWS, num_sequences)


@pytest.mark.parametrize(
    "options", [Options(num_redundant=4), Options(worst_domain=True), Options(objective="fan-out")]
)
def test_plans_with_copies_for_the_worst_domain_or_of_sums_know_no_draws(options: Options) -> None:
    profile = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], random_trace(30), {})
    topology = Topology.for_experts(8, 4, 1, options.num_redundant)
    (problem,) = layer_problems(profile, topology, options)
    assert problem.draws is None
    assert problem.objective == objective_of(profile.model, topology, options)


def random_trace(num_sequences: int) -> TokenTrace:
    rng = np.random.default_rng(num_sequences)
    ids = np.argsort(rng.random((1, 4 * num_sequences, 8)), axis=2)[:, :, :2].astype(np.uint8)
    return replace(make_trace(ids), sequence_ids=np.repeat(np.arange(num_sequences), 4).astype(np.int32))
