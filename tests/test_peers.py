"""Strategies that others published: every one on every shape of problem, and each at what it is meant for."""

import importlib
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import traces as recorded
from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import equal_sizes, intra_weight, with_best_swaps, with_equal_sizes
from placement.topology import Topology
from profiler import CoterieError

COLLABORATION = ("occult", "metis", "spectral", "quadratic", "hypergraph")
PEERS = ("linear", "random", "load", *COLLABORATION)

UNCONNECTED = random_ids(2, 1, 60, 16, 3)
UNCONNECTED[0, ::2, 1:] = 255
UNCONNECTED[0, ::10] = 255
HOT = np.sort(random_ids(4, 1, 200, 16, 3) // 2, axis=2)

SCENARIOS = {  # ids, experts, topology
    "one slot each": (random_ids(0, 1, 400, 16, 4), 16, Topology(1, 4, 4)),
    "one rank": (random_ids(0, 1, 100, 16, 4), 16, Topology(1, 1, 16)),
    "one rank with room": (random_ids(0, 1, 100, 16, 4), 16, Topology(1, 1, 20)),
    "a rank for each": (random_ids(0, 1, 100, 16, 4), 16, Topology(1, 16, 1)),
    "60 experts on 8 ranks": (random_ids(1, 1, 300, 60, 4), 60, Topology(1, 8, 8)),
    "more ranks than experts": (random_ids(1, 1, 50, 6, 2), 6, Topology(2, 4, 2)),
    "16 free slots": (random_ids(0, 1, 400, 16, 4), 16, Topology(1, 8, 4)),
    "more slots a rank than experts": (random_ids(0, 1, 90, 6, 2), 6, Topology(1, 2, 9)),
    "two nodes": (random_ids(3, 1, 300, 32, 4), 32, Topology(2, 4, 6)),
    "top-1": (random_ids(3, 1, 300, 16, 1), 16, Topology(1, 4, 4)),
    "every expert": (np.tile(np.arange(16, dtype=np.uint8), (1, 20, 1)), 16, Topology(1, 4, 5)),
    "experts never picked": (random_ids(5, 1, 200, 8, 3), 16, Topology(1, 4, 5)),
    "one token": (random_ids(1, 1, 1, 16, 4), 16, Topology(1, 4, 4)),
    "picks of no expert": (UNCONNECTED, 16, Topology(1, 4, 6)),
    "no pick at all": (np.full((1, 5, 4), 255, dtype=np.uint8), 16, Topology(1, 4, 5)),
}


def strategy(name):
    if name == "hypergraph":
        pytest.importorskip("mtkahypar")
    return getattr(importlib.import_module(f"placement.solvers.{name}"), name)


def problem_of(ids_LTK, num_experts, topology, **fields):
    folds = np.arange(ids_LTK.shape[1]) % 3 % 2
    problem = LayerProblem.from_ids(ids_LTK[0], num_experts, topology, 1.1, folds_T=folds)
    return LayerProblem(**{**{name: getattr(problem, name) for name in problem.__dataclass_fields__}, **fields})


def problem_of_loads(loads, topology, **fields):
    """Each expert on its own, as often as told."""
    ids = np.repeat(np.arange(len(loads), dtype=np.uint8), loads)[None, :, None]
    return problem_of(ids, len(loads), topology, **fields)


def on_ranks(slots, topology):
    """The experts of each rank, ascending."""
    return [sorted(row[row >= 0].tolist()) for row in slots.reshape(topology.num_ranks, -1)]


def rank_of_expert(slots, topology):
    out = np.full(slots.max() + 1, -1)
    out[slots[slots >= 0]] = np.flatnonzero(slots >= 0) // topology.slots_per_rank
    return out


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", PEERS)
def test_every_expert_is_placed_and_none_twice_on_a_rank(name, scenario):
    ids, num_experts, topology = SCENARIOS[scenario]
    spare = topology.num_slots - num_experts
    for num_redundant in sorted({0, min(1, spare), spare // 2, spare}):
        problem = problem_of(ids, num_experts, topology, num_redundant=num_redundant)
        plans = [strategy(name)(problem, np.random.default_rng(7)) for _ in range(2)]
        assert plans[0].tobytes() == plans[1].tobytes()
        assert plans[0].dtype == np.int64
        assert plans[0].shape == (topology.num_slots,)
        assert plans[0].min() >= -1
        held = on_ranks(plans[0], topology)
        assert set().union(*held) == set(range(num_experts))
        assert all(len(set(experts)) == len(experts) for experts in held)
        # All copies are made that fit: no rank can use more slots than there are experts.
        useful = topology.num_ranks * min(topology.slots_per_rank, num_experts)
        assert sum(map(len, held)) == min(num_experts + num_redundant, useful)
        if num_redundant == 0 and name != "load":  # which may leave any slot empty
            assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize("name", PEERS)
def test_many_experts_on_many_ranks(name):
    topology = Topology(4, 8, 9)
    problem = problem_of(random_ids(6, 1, 2000, 256, 8), 256, topology, num_redundant=32, num_groups=8)
    held = on_ranks(strategy(name)(problem, np.random.default_rng(0)), topology)
    assert [len(set(experts)) for experts in held] == [9] * 32
    assert set().union(*held) == set(range(256))


@pytest.mark.parametrize("name", COLLABORATION)
def test_layers_planned_at_once_are_planned_alike(name):
    """Libraries keep seeds and threads of their own."""
    place = strategy(name)
    problems = [problem_of(random_ids(seed, 1, 800, 32, 4), 32, Topology(1, 8, 4)) for seed in range(6)]
    one_by_one = [place(problem, np.random.default_rng(0)).tolist() for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda problem: place(problem, np.random.default_rng(0)).tolist(), problems))
    assert one_by_one == at_once


@pytest.mark.parametrize("name", COLLABORATION)
def test_experts_picked_together_share_a_rank(name):
    """Four groups of experts, dealt over the file; one pick in five strays."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.arange(16) % 4)
    scores = rng.gumbel(size=(1, 3000, 16)) + 4.0 * (rng.integers(0, 4, (1, 3000, 1)) == group)
    topology = Topology(1, 4, 4)
    problem = problem_of(np.argsort(-scores, axis=2)[..., :3].astype(np.uint8), 16, topology)
    found = rank_of_expert(strategy(name)(problem, rng), topology)
    assert len(set(zip(found.tolist(), group.tolist(), strict=True))) == 4


@pytest.mark.parametrize("name", COLLABORATION)
def test_collaboration_is_far_above_random(name):
    topology = Topology(1, 8, 4)
    problem = problem_of(random_ids(11, 1, 3000, 32, 4), 32, topology)
    intra = {
        which: intra_weight(
            rank_of_expert(strategy(which)(problem, np.random.default_rng(0)), topology), problem.coactivation
        )
        for which in (name, "random")
    }
    assert intra[name] > 1.5 * intra["random"]


def test_linear_starts_again_where_there_are_redundant_experts():
    topology = Topology(1, 4, 3)
    problem = problem_of(random_ids(0, 1, 9, 8, 2), 8, topology, num_redundant=4)
    assert strategy("linear")(problem, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4, 5, 0, 6, 7, 1, 2, 3]
    problem = problem_of(random_ids(0, 1, 9, 10, 2), 10, topology)
    slots = strategy("linear")(problem, np.random.default_rng(0))
    assert slots.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, 8, 9, -1]


def test_random_copies_are_of_distinct_experts():
    problem = problem_of(random_ids(0, 1, 9, 16, 2), 16, Topology(1, 4, 7), num_redundant=12)
    slots = strategy("random")(problem, np.random.default_rng(0))
    assert sorted(np.bincount(slots)) == [1] * 4 + [2] * 12


def test_eplb_as_published():
    """The example of EPLB's description: 12 experts in 4 groups, 16 slots on 8 ranks of 2 nodes, two layers."""
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    expected = [
        [[5, 6], [5, 7], [4, 8], [3, 4], [9, 10], [2, 10], [0, 1], [1, 11]],
        [[7, 10], [6, 8], [6, 11], [8, 9], [2, 4], [1, 5], [0, 5], [1, 3]],
    ]
    topology = Topology(2, 4, 2)
    for layer in range(2):
        problem = problem_of_loads(loads[layer], topology, num_redundant=4, num_groups=4)
        assert on_ranks(strategy("load")(problem, np.random.default_rng(0)), topology) == expected[layer]


def test_eplb_by_hand():
    """Global policy: copies go to 12 (6 each), then 7 (3.5 each); then ranks fill to
    6; 6; 5 + 3.5; 6 + 3.5; 6 + 1."""
    topology = Topology(1, 3, 2)
    problem = problem_of_loads([1, 12, 7, 5], topology, num_redundant=2, num_groups=2)
    assert on_ranks(strategy("load")(problem, np.random.default_rng(0)), topology) == [[1, 2], [0, 1], [2, 3]]


def test_eplb_makes_room_rather_than_put_two_copies_on_a_rank():
    """20 goes to rank 0, then 8, 3 and 2.5 fill rank 1; a copy of 2 goes to rank 0, and so must the other, unless one
    of 8, 3 and 2.5 takes its place there: 2.5 adds least."""
    packed = importlib.import_module("placement.solvers.load")._packed
    parts = packed(np.array([0, 1, 2, 3, 4, 4]), np.array([20, 8, 3, 2.5, 2, 2]), 2, 3)
    assert [sorted(part) for part in parts] == [[0, 3, 4], [1, 2, 4]]


@given(st.lists(st.integers(0, 40), min_size=3, max_size=8))
def test_load_without_copies_keeps_grahams_bound(loads):
    """With a slot for everything on each rank: at most 4/3 - 1/(3R) of the least possible."""
    topology = Topology(1, 3, len(loads))
    held = on_ranks(strategy("load")(problem_of_loads([*loads[:-1], loads[-1] + 1], topology), None), topology)
    loads = np.array([*loads[:-1], loads[-1] + 1])
    best = min(np.bincount(ranks, loads, minlength=3).max() for ranks in itertools.product(range(3), repeat=len(loads)))
    assert max(loads[experts].sum() for experts in held) <= best * (4 / 3 - 1 / 9) + 1e-9


@given(st.lists(st.integers(0, 30), min_size=4, max_size=12), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_load_places_any_loads_with_any_copies(loads, num_ranks, seed):
    """Also where heaviest first corners itself and a copy has to be made room for."""
    slots_per_rank = -(-len(loads) // num_ranks) + seed % 3
    topology = Topology(1, num_ranks, slots_per_rank)
    num_redundant = min(topology.num_slots, num_ranks * len(loads)) - len(loads)
    problem = problem_of_loads([1, *loads[1:]], topology, num_redundant=num_redundant)
    held = on_ranks(strategy("load")(problem, None), topology)
    assert all(len(set(experts)) == len(experts) for experts in held)
    assert sum(map(len, held)) == len(loads) + num_redundant


def test_copies_by_hand():
    """Loads 8, 4, 3, 1 on ranks (0, 1), (2, 3): 0 is copied to rank 1; then each copy has 4 and 1 goes there too."""
    topology = Topology(1, 2, 4)
    slots = slots_of_ranks(np.array([0, 0, 1, 1]), topology)
    for num_redundant, expected in [(0, [[0, 1], [2, 3]]), (1, [[0, 1], [0, 2, 3]]), (2, [[0, 1], [0, 1, 2, 3]])]:
        problem = problem_of_loads([8, 4, 3, 1], topology, num_redundant=num_redundant)
        assert on_ranks(with_copies(slots, problem), topology) == expected


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_repair_makes_sizes_equal_and_swaps_end_where_none_helps(num_experts, num_ranks, seed):
    rng = np.random.default_rng(seed)
    coactivation = np.triu(rng.integers(0, 9, (num_experts, num_experts)), 1).astype(float)
    coactivation += coactivation.T
    equal = with_equal_sizes(rng.integers(0, num_ranks, num_experts), coactivation, num_ranks)
    sizes = np.bincount(equal, minlength=num_ranks)
    assert sorted(sizes) == sorted(equal_sizes(num_experts, num_ranks))
    assert (with_equal_sizes(equal, coactivation, num_ranks) == equal).all()
    swapped = with_best_swaps(equal, coactivation, num_ranks)
    assert (np.bincount(swapped, minlength=num_ranks) == sizes).all()
    value = intra_weight(swapped, coactivation)
    assert value >= intra_weight(equal, coactivation)
    for a, b in itertools.combinations(range(num_experts), 2):
        other = swapped.copy()
        other[[a, b]] = swapped[[b, a]]
        together = sum(
            coactivation[i, j] for i, j in itertools.combinations(range(num_experts), 2) if other[i] == other[j]
        )
        assert together <= value


def test_hypergraph_says_what_to_install(monkeypatch):
    module = importlib.import_module("placement.solvers.hypergraph")
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    with pytest.raises(CoterieError, match=r"pip install 'coterie\[hypergraph\]'"):
        module._library.__wrapped__()


@pytest.fixture(scope="module")
def halves():
    if not recorded.FOLDER.is_dir():
        pytest.skip("no recorded traces; set COTERIE_TRACES")
    return recorded.load("gpt-oss-20b", every_nth_layer=6).split_by_sequence()


@pytest.mark.parametrize(
    ("name", "fan_out", "busiest_ingress", "imbalance_ratio"),
    [
        ("load", 3.45, 0.48, 1.10),
        ("occult", 2.88, 0.57, 2.09),
        ("metis", 2.65, 0.54, 2.01),
        ("spectral", 2.73, 0.54, 1.79),
        ("quadratic", 2.65, 0.54, 2.01),
        ("hypergraph", 2.65, 0.54, 2.01),
    ],
)
def test_peers_are_as_strong_as_known_on_recorded_routing(halves, name, fan_out, busiest_ingress, imbalance_ratio):
    """gpt-oss-20b on 8 ranks, sequences that were not planned on, mean of every sixth layer: at most these."""
    planned, unseen = (part.require_tokens().topk_ids for part in halves)
    topology = Topology(1, 8, 4)
    figures = []
    for layer in range(len(planned)):
        problem = LayerProblem.from_ids(planned[layer], 32, topology, 1.1)
        rank_of = rank_of_expert(strategy(name)(problem, np.random.default_rng(0)), topology)
        served = (rank_of[unseen[layer]][:, :, None] == np.arange(8)).sum(axis=1)
        ingress, load = (served > 0).mean(axis=0), served.sum(axis=0)
        figures.append((ingress.sum(), ingress.max(), load.max() / load.mean()))
    assert (np.mean(figures, axis=0) <= (fan_out, busiest_ingress, imbalance_ratio)).all()


def test_metis_is_not_asked_for_more_parts_than_there_are_experts(capfd):
    """It would complain on stdout, in the middle of a table or of JSON."""
    problem = LayerProblem.from_ids(random_ids(0, 1, 50, 4, 2)[0], 4, Topology(1, 12, 1), 1.1, num_redundant=8)
    slots = importlib.import_module("placement.solvers.metis").metis(problem, np.random.default_rng(0))
    assert set(slots.tolist()) == {0, 1, 2, 3}
    assert capfd.readouterr().out == ""
