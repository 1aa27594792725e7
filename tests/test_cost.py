"""The evaluator against a walk over tokens, and what must hold for any map."""

import itertools
import math

import numpy as np
import pytest
from conftest import make_spec, make_trace, traces
from hypothesis import given
from hypothesis import strategies as st

from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.topology import Topology


def slow_evaluate(placement, trace):
    """Each metric by its definition, token by token."""
    num_ranks, slots_per_rank = placement.topology.num_ranks, placement.topology.slots_per_rank
    out = []
    for row, ids_TK in zip(placement.physical_to_logical_map.tolist(), trace.topk_ids.tolist(), strict=True):
        rank_of = {expert: slot // slots_per_rank for slot, expert in enumerate(row)}
        visited = [{rank_of[expert] for expert in ids} for ids in ids_TK]
        load = [sum(rank_of[expert] == rank for ids in ids_TK for expert in ids) for rank in range(num_ranks)]
        pairs = [rank_of[a] == rank_of[b] for ids in ids_TK for a, b in itertools.combinations(ids, 2)]
        out.append(
            {
                "fan_out": sum(map(len, visited)) / len(ids_TK),
                "ingress": [sum(rank in ranks for ranks in visited) / len(ids_TK) for rank in range(num_ranks)],
                "load": load,
                "intra_share": sum(pairs) / len(pairs) if pairs else math.nan,
            }
        )
    return out


@st.composite
def cases(draw):
    spec, trace = draw(traces())
    topology = Topology.for_experts(spec.num_experts, draw(st.sampled_from([1, 2, 4])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.stack([rng.permutation(spec.num_experts) for _ in range(spec.num_layers)])
    return PlacementMap(spec, topology, slots, {"name": "any"}), trace


@given(cases())
def test_agrees_with_the_definitions(case):
    placement, trace = case
    metrics = evaluate(placement, trace)
    for layer, expected in enumerate(slow_evaluate(placement, trace)):
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(metrics, name)[layer], value, err_msg=name)


@given(cases())
def test_bounds(case):
    placement, trace = case
    metrics, model, num_ranks = evaluate(placement, trace), placement.model, placement.topology.num_ranks
    fewest = math.ceil(model.top_k * num_ranks / model.num_experts)
    assert (metrics.fan_out >= fewest - 1e-9).all()
    assert (metrics.fan_out <= min(model.top_k, num_ranks) + 1e-9).all()
    np.testing.assert_allclose(metrics.ingress.sum(axis=1), metrics.fan_out)
    assert (metrics.load.sum(axis=1) == model.top_k * trace.num_tokens).all()
    assert (metrics.imbalance_ratio >= 1).all()


@given(cases(), st.randoms())
def test_renaming_ranks_changes_no_summary(case, random):
    placement, trace = case
    order = list(range(placement.topology.num_ranks))
    random.shuffle(order)
    slots = placement.physical_to_logical_map.reshape(placement.model.num_layers, placement.topology.num_ranks, -1)
    renamed = PlacementMap(
        placement.model, placement.topology, slots[:, order].reshape(placement.physical_to_logical_map.shape), {}
    )
    first, second = evaluate(placement, trace).summary(), evaluate(renamed, trace).summary()
    for name, figures in first.items():
        assert second[name]["mean"] == pytest.approx(figures["mean"], nan_ok=True)


def test_worked_example():
    """Two tokens, four experts, two ranks: one token stays on a rank, the other visits both."""
    spec, topology = make_spec(1, 4, 2), Topology(1, 2, 2)
    trace = make_trace(np.array([[[0, 1], [1, 2]]], dtype=np.uint8), num_sequences=1)
    metrics = evaluate(PlacementMap.linear(spec, topology), trace)
    assert metrics.fan_out.tolist() == [1.5]
    assert metrics.ingress.tolist() == [[1.0, 0.5]]
    assert metrics.load.tolist() == [[3, 1]]
    assert metrics.imbalance_ratio.tolist() == [1.5]
    assert metrics.intra_share.tolist() == [0.5]


def test_top_one_models_have_no_pairs():
    spec = make_spec(1, 4, 1)
    trace = make_trace(np.zeros((1, 8, 1), dtype=np.uint8))
    summary = evaluate(PlacementMap.linear(spec, Topology(1, 2, 2)), trace).summary()
    assert summary["intra_share"] == {"mean": None, "worst": None}
    assert summary["fan_out"]["mean"] == 1.0
