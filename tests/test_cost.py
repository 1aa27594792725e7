"""The evaluator against a walk over tokens, and what must hold for any map."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given
from hypothesis import strategies as st

from placement.choice import choose_ranks, first_load, ranks_of_experts
from placement.cost import evaluate, mixed_order
from placement.placement_map import PlacementMap
from placement.topology import Topology


def slow_choice(ids, copies, topology, load):
    """The rank of each pick of one token by the rule of `choice.py`, word for word; `load` is what ranks have served."""
    node_of = {rank: rank // topology.ranks_per_node for rank in range(topology.num_ranks)}
    chosen = {expert: copies[expert][0] for expert in ids if len(copies[expert]) == 1}
    visited = set(chosen.values())
    while left := [expert for expert in ids if not visited & set(copies[expert])]:
        covers = {rank: sum(rank in copies[expert] for expert in left) for expert in left for rank in copies[expert]}
        near = {node_of[rank] for rank in visited}
        best = min(covers, key=lambda rank: (-covers[rank], node_of[rank] not in near, load[rank]))
        ties = [
            rank
            for rank in covers
            if (covers[rank], node_of[rank] in near, load[rank]) == (covers[best], node_of[best] in near, load[best])
        ]
        best = next(rank for expert in left for rank in copies[expert] if rank in ties)
        chosen[next(expert for expert in left if best in copies[expert])] = best
        visited.add(best)
    for expert in ids:
        if expert not in chosen:
            ranks = [rank for rank in copies[expert] if rank in visited]
            chosen[expert] = min(ranks, key=lambda rank: load[rank])
    return [chosen[expert] for expert in ids]


def slow_evaluate(placement, trace):
    """Each metric by its definition, token by token."""
    topology = placement.topology
    num_ranks, slots_per_rank = topology.num_ranks, topology.slots_per_rank
    out = []
    for row, ids_TK in zip(placement.physical_to_logical_map.tolist(), trace.topk_ids.tolist(), strict=True):
        copies = {}
        for slot, expert in enumerate(row):
            if expert >= 0:
                copies.setdefault(expert, []).append(slot // slots_per_rank)
        load, served = [0] * num_ranks, []
        for ids in np.array(ids_TK)[mixed_order(len(ids_TK))].tolist():
            served.append(slow_choice([expert for expert in ids if expert != 255], copies, topology, load))
            for rank in served[-1]:
                load[rank] += 1
        nodes = [{rank // topology.ranks_per_node for rank in ranks} for ranks in served]
        pairs = [a == b for ranks in served for a, b in itertools.combinations(ranks, 2)]
        out.append(
            {
                "fan_out": sum(len(set(ranks)) for ranks in served) / len(ids_TK),
                "ingress": [sum(rank in ranks for ranks in served) / len(ids_TK) for rank in range(num_ranks)],
                "load": load,
                "intra_share": sum(pairs) / len(pairs) if pairs else math.nan,
                "node_fan_out": sum(map(len, nodes)) / len(ids_TK),
                "node_ingress": [
                    sum(v in reached for reached in nodes) / len(ids_TK) for v in range(topology.num_nodes)
                ],
            }
        )
    return out


@st.composite
def cases(draw):
    spec, trace = draw(traces())
    num_nodes, ranks_per_node = draw(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 2), (4, 1)]))
    topology = Topology(num_nodes, ranks_per_node, spec.num_experts // (num_nodes * ranks_per_node))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.stack([rng.permutation(spec.num_experts) for _ in range(spec.num_layers)])
    return PlacementMap(spec, topology, slots, {"name": "any"}), trace


@st.composite
def cases_with_copies(draw):
    placement, trace = draw(cases())
    spec, topology = placement.model, placement.topology
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    more = draw(st.integers(1, 3))
    rows = []
    for row in placement.physical_to_logical_map.reshape(spec.num_layers, topology.num_ranks, -1):
        ranks = []
        for held in row:
            others = rng.permutation(np.setdiff1d(np.arange(spec.num_experts), held))[:more]
            ranks.append(np.concatenate([held, others, np.full(more - len(others), -1)]))
        rows.append(np.concatenate(ranks))
    topology = Topology(topology.num_nodes, topology.ranks_per_node, topology.slots_per_rank + more)
    dropped = rng.random(trace.topk_ids.shape) < 0.1
    trace = replace(trace, topk_ids=np.where(dropped, np.uint8(255), trace.topk_ids))
    return PlacementMap(spec, topology, np.stack(rows), {"name": "any"}), trace


@given(cases_with_copies())
def test_copies_are_chosen_by_the_rule(case):
    placement, trace = case
    metrics = evaluate(placement, trace)
    for layer, expected in enumerate(slow_evaluate(placement, trace)):
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(metrics, name)[layer], value, err_msg=name)


@given(cases_with_copies())
def test_static_choice_per_source_rank(case):
    placement, trace = case
    topology, metrics = placement.topology, evaluate(placement, trace, "source")
    slots = placement.physical_to_logical_map[0]
    ingress, load = np.zeros(topology.num_ranks), np.zeros(topology.num_ranks)
    for source in range(topology.num_ranks):
        for ids in trace.topk_ids[0].tolist():
            ranks = []
            for expert in ids:
                if expert == 255:
                    continue
                holders = (np.flatnonzero(slots == expert) // topology.slots_per_rank).tolist()
                near = [
                    rank for rank in holders if rank // topology.ranks_per_node == source // topology.ranks_per_node
                ]
                candidates = [source] if source in holders else near or holders
                ranks.append(candidates[(source + expert) % len(candidates)])
            load += np.bincount(ranks, minlength=topology.num_ranks)
            ingress[list(set(ranks))] += 1
    np.testing.assert_allclose(metrics.ingress[0], ingress / trace.num_tokens / topology.num_ranks)
    np.testing.assert_allclose(metrics.load[0], load / topology.num_ranks)


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
def test_renaming_nodes_and_ranks_inside_them_changes_no_summary(case, random):
    placement, trace = case
    per_node = placement.topology.ranks_per_node
    nodes = [list(range(start, start + per_node)) for start in range(0, placement.topology.num_ranks, per_node)]
    for ranks in (*nodes, nodes):
        random.shuffle(ranks)
    order = [rank for ranks in nodes for rank in ranks]
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


def test_tokens_that_ranks_choose_for_apart():
    """With copies, every rank counts its own tokens only: the sum over sources of what each of them chooses."""
    spec, trace = make_spec(1, 8, 3), make_trace(random_ids(4, 1, 90, 8, 3))
    slots = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 4, 2]])
    placement = PlacementMap(spec, Topology(2, 2, 3), slots, {"name": "copies"})
    ranks_EX = ranks_of_experts(slots[0], 8, 3)
    batches = np.arange(90) % 7
    served = np.zeros(4)
    for batch in range(7):
        ids = trace.topk_ids[0, batches == batch].astype(np.int64)
        chosen = choose_ranks(ids, ranks_EX, 2, first_load(batch % 4, 4))
        assert all((ranks_EX[expert] == rank).any() for expert, rank in zip(ids.flat, chosen.flat, strict=True))
        served += np.bincount(chosen.flatten(), minlength=4)
    assert evaluate(placement, trace, "token", batches).load[0].tolist() == served.tolist()
    assert evaluate(placement, trace).load.sum() == served.sum()
