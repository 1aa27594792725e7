"""Predicted times have the right units and slopes, and links survive the disk."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import make_spec

from placement.placement_map import PlacementMap
from placement.timing import Workload, active_share, linear_costs, predicted_time, touching_share
from placement.topology import PRESETS, Links, Topology
from profiler import CoterieError

SPEC = replace(make_spec(1, 64, 4), hidden_size=4096, expert_size=1536, dtype="bfloat16")
SLOW = replace(
    PRESETS["h100"],
    name="slow",
    dispatch_startup=0.0,
    combine_startup=0.0,
    network_startup=0.0,
    expert_startup=0.0,
)
WORKLOAD = Workload(tokens_per_rank=4096)
TWO_NODES = Topology(2, 4, 8, SLOW)
ONE_NODE = Topology(1, 8, 8, SLOW)


def shares(topology, seed=0, spec=SPEC, num_tokens=500, num_layers=3):
    """Ingress of ranks and nodes and load of ranks of random picks: (L, R), (L, N), (L, R)."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(num_layers):
        weight = rng.random(spec.num_experts) * 3
        scores = rng.random((num_tokens, spec.num_experts)) + weight
        ranks = np.argsort(-scores, axis=1)[:, : spec.top_k] * topology.num_ranks // spec.num_experts
        served = (ranks[:, :, None] == np.arange(topology.num_ranks)).sum(axis=1)
        touched = served.reshape(num_tokens, topology.num_nodes, -1).any(axis=2)
        out.append(((served > 0).mean(axis=0), touched.mean(axis=0), served.mean(axis=0)))
    return tuple(np.stack(part) for part in zip(*out, strict=True))


def balanced(topology, spec=SPEC):
    return (
        np.full((1, topology.num_ranks), touching_share(spec, topology.num_ranks)),
        np.full((1, topology.num_nodes), touching_share(spec, topology.num_nodes)),
        np.full((1, topology.num_ranks), spec.top_k / topology.num_ranks),
    )


def test_touching_share_is_that_of_random_picks():
    spec = make_spec(1, 32, 5)
    rng = np.random.default_rng(0)
    picks = np.argsort(rng.random((20_000, 32)), axis=1)[:, :5]
    for places in (1, 2, 4, 8, 32):
        measured = ((picks * places // 32) == 0).any(axis=1).mean()
        assert touching_share(spec, places) == pytest.approx(measured, abs=0.01)
    assert touching_share(make_spec(1, 8, 8), 4) == 1
    assert active_share(spec, 1) == pytest.approx(5 / 32)


def test_one_node_by_hand():
    """4,096 tokens on each of 8 ranks, all of them served by rank 0: 7 ranks' tokens come in."""
    ingress = np.array([[1.0] + [0.5] * 7])
    load = np.array([[1.0] + [3 / 7] * 7])
    time = predicted_time(ingress, np.ones((1, 1)), load, SPEC, ONE_NODE, Workload(4096, dispatch_width=1.0))
    rows = 7 * 4096
    assert time.dispatch[0] == pytest.approx(rows * 4096 / SLOW.rank_bandwidth)
    assert time.combine[0] == pytest.approx(2 * time.dispatch[0])
    products = 8 * 4096 * 6 * 4096 * 1536 / SLOW.flops
    activations = 8 * 4096 * (4 * 4096 + 6 * 1536) / SLOW.memory_bandwidth
    assert time.expert[0] == pytest.approx(products + activations)
    assert (time.total == time.dispatch + time.expert + time.combine).all()
    assert time.total.dtype == np.float64


@pytest.mark.parametrize("topology", [ONE_NODE, TWO_NODES])
def test_twice_the_bytes_take_as_long_as_half_the_bandwidth(topology):
    half = replace(SLOW, rank_bandwidth=SLOW.rank_bandwidth / 2, network_bandwidth=SLOW.network_bandwidth / 2)
    wide = replace(WORKLOAD, dispatch_width=2 * WORKLOAD.dispatch_width, combine_width=2 * WORKLOAD.combine_width)
    given = shares(topology)
    usual = predicted_time(*given, SPEC, topology, WORKLOAD)
    for other in (
        predicted_time(*given, SPEC, topology, wide),
        predicted_time(*given, SPEC, replace(topology, links=half), WORKLOAD),
    ):
        np.testing.assert_allclose(other.dispatch, 2 * usual.dispatch)
        np.testing.assert_allclose(other.combine, 2 * usual.combine)
        np.testing.assert_allclose(other.expert, usual.expert)


def test_startup_is_what_no_tokens_would_take():
    links = PRESETS["h100"]
    few = [
        predicted_time(*balanced(place), SPEC, replace(place, links=links), Workload(1))
        for place in (ONE_NODE, TWO_NODES)
    ]
    assert few[0].dispatch[0] == pytest.approx(links.dispatch_startup, rel=0.01)
    assert few[1].combine[0] == pytest.approx(links.combine_startup + links.network_startup, rel=0.01)


@pytest.mark.parametrize("mode", ["per-rank", "per-expert"])
@pytest.mark.parametrize("topology", [ONE_NODE, TWO_NODES])
def test_more_of_anything_is_never_faster(topology, mode):
    workload = replace(WORKLOAD, mode=mode)
    for seed in range(5):
        given = shares(topology, seed)
        usual = predicted_time(*given, SPEC, topology, workload).total
        for which in range(3):
            more = [part * 1.2 if place == which else part for place, part in enumerate(given)]
            assert (predicted_time(*more, SPEC, topology, workload).total >= usual).all()
        more = [part * 1.2 for part in given]
        assert (predicted_time(*more, SPEC, topology, workload).total > usual).all()
        assert (predicted_time(*given, SPEC, topology, replace(workload, tokens_per_rank=8192)).total > usual).all()


@pytest.mark.parametrize("mode", ["per-rank", "per-expert"])
def test_one_node_uses_no_network(mode):
    given, workload = shares(ONE_NODE), replace(WORKLOAD, mode=mode)
    slower = replace(ONE_NODE, links=replace(SLOW, network_bandwidth=1.0, network_startup=1.0))
    usual, other = (predicted_time(*given, SPEC, place, workload).total for place in (ONE_NODE, slower))
    assert (usual == other).all()


@pytest.mark.parametrize("mode", ["per-rank", "per-expert"])
def test_ranks_of_a_node_and_nodes_are_alike(mode):
    ingress, nodes, load = shares(TWO_NODES)
    workload = replace(WORKLOAD, mode=mode)
    usual = predicted_time(ingress, nodes, load, SPEC, TWO_NODES, workload).total
    within = np.array([2, 0, 3, 1, 5, 4, 7, 6])
    swapped = np.array([4, 5, 6, 7, 0, 1, 2, 3])
    assert (predicted_time(ingress[:, within], nodes, load[:, within], SPEC, TWO_NODES, workload).total == usual).all()
    other = predicted_time(ingress[:, swapped], nodes[:, ::-1], load[:, swapped], SPEC, TWO_NODES, workload)
    assert (other.total == usual).all()


def test_modes_agree_for_top_1():
    """On several nodes only where ranks of a node are alike: once per expert, each rank has its port for itself."""
    top_1 = replace(SPEC, top_k=1)
    even_in_nodes = np.array([[0.2] * 4 + [0.05] * 4])
    nodes = np.array([[0.8, 0.2]])
    for topology, given in (
        (ONE_NODE, shares(ONE_NODE, spec=top_1)),
        (TWO_NODES, (even_in_nodes, nodes, even_in_nodes)),
    ):
        rank, expert = (
            predicted_time(*given, top_1, topology, replace(WORKLOAD, mode=mode)) for mode in ("per-rank", "per-expert")
        )
        np.testing.assert_allclose(rank.dispatch, expert.dispatch)
        np.testing.assert_allclose(rank.total, expert.total)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("mode", ["per-rank", "per-expert"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_linear_costs_are_slopes(nodes, preset, mode, tokens):
    topology = Topology(nodes, 8 // nodes, 8, PRESETS[preset])
    workload = Workload(tokens, mode)
    costs = linear_costs(SPEC, topology, workload)
    at = balanced(topology)

    def slope(which, size):
        more = [part.copy() for part in at]
        more[which][0, 0] += size
        times = (predicted_time(*given, SPEC, topology, workload).total[0] for given in (more, at))
        return (next(times) - next(times)) / size

    mean_load = SPEC.top_k / topology.num_ranks
    assert costs.ingress == pytest.approx(slope(0, 1e-5), rel=1e-4, abs=1e-12)
    assert costs.node_ingress == pytest.approx(slope(1, 1e-5), rel=1e-4, abs=1e-12)
    assert costs.load == pytest.approx(slope(2, 1e-5 * mean_load) * mean_load, rel=1e-4, abs=1e-12)
    if mode == "per-expert":
        assert costs.ingress == costs.node_ingress == 0


def test_presets_are_complete():
    assert {"h100", "h800", "a100", "ethernet"} <= set(PRESETS)
    for name, links in PRESETS.items():
        assert links.name == name
        assert all(getattr(links, field.name) > 0 for field in fields(links) if field.name != "name")
        assert links.network_bandwidth < links.rank_bandwidth < links.memory_bandwidth
        assert Links.preset(name) is links
    with pytest.raises(CoterieError, match="links 'tpu'.*h100"):
        Links.preset("tpu")


def test_topologies_survive_json():
    for topology in (Topology(2, 4, 8), TWO_NODES):
        assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology
    assert Topology(2, 4, 8).to_json() == {"num_nodes": 2, "ranks_per_node": 4, "slots_per_rank": 8}


def test_maps_with_and_without_links_load(tmp_path):
    path = tmp_path / "plan.json"
    for topology in (Topology(1, 4, 16), Topology(1, 4, 16, PRESETS["h800"])):
        PlacementMap.linear(SPEC, topology).save(path)
        assert ("links" in json.loads(path.read_text())["topology"]) == (topology.links is not None)
        assert PlacementMap.load_from(path).topology == topology


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_bandwidth": 0}, "rank_bandwidth 0"),
        ({"flops": "fast"}, "flops 'fast'"),
        ({"dispatch_startup": -1.0}, "dispatch_startup -1.0.*0 or more"),
        ({"network_bandwidth": float("nan")}, "network_bandwidth nan"),
        ({"colour": 1}, "topology.links: must be an object with"),
    ],
)
def test_links_that_are_none_are_refused(change, message):
    value = TWO_NODES.to_json()
    value["links"] |= change
    with pytest.raises(CoterieError, match=message):
        Topology.from_json(value)


@pytest.mark.parametrize(
    ("spec", "topology", "message"),
    [
        (replace(SPEC, hidden_size=0), ONE_NODE, "hidden_size 0.*--hidden-size.*coterie import numpy"),
        (replace(SPEC, expert_size=0), ONE_NODE, "expert_size 0.*--expert-size.*coterie import numpy"),
        (replace(SPEC, dtype="mxfp4"), ONE_NODE, "dtype 'mxfp4'.*bfloat16"),
        (SPEC, Topology(1, 8, 8), "topology.links: not given"),
    ],
)
def test_what_is_not_known_is_said(spec, topology, message):
    for call in (
        lambda: predicted_time(*shares(ONE_NODE), spec, topology, WORKLOAD),
        lambda: linear_costs(spec, topology, WORKLOAD),
    ):
        with pytest.raises(CoterieError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_workloads_that_are_none_are_refused():
    for change, message in (
        ({"tokens_per_rank": 0}, "tokens_per_rank 0"),
        ({"mode": "once"}, "mode 'once'"),
        ({"combine_width": 0}, "combine_width 0"),
    ):
        with pytest.raises(CoterieError, match=message):
            replace(WORKLOAD, **change)


def test_recorded_errors_are_those_of_the_presets():
    pytest.importorskip("pandas", reason="reads parquet files: pip install '.[dev]'")
    from benchmarks.cost_model import FOLDER, measurements
    from benchmarks.record import RESULTS

    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER}: not there; COTERIE_HARDWARE names the folder with measured times")
    recorded = {tuple(row[:2]): row[2:] for row in json.loads((RESULTS / "cost_model.json").read_text())["rows"]}
    for measured, links in measurements():
        for kind, part, *figures in measured.errors(links):
            assert figures == pytest.approx(recorded[kind, part], rel=1e-6), (kind, part)
