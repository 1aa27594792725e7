"""Maps survive the disk and refuse what no engine could load."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_spec
from hypothesis import given
from hypothesis import strategies as st

from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler import CoterieError

SPEC, TOPOLOGY = make_spec(2, 8, 2), Topology(1, 4, 2)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]))
def test_round_trip(tmp_path_factory, seed, num_ranks):
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(8) * num_ranks // 8 for _ in range(2)])
    path = tmp_path_factory.mktemp("maps") / "plan.json"
    placement = PlacementMap.from_ranks(
        SPEC, Topology.for_experts(8, num_ranks), ranks, {"name": "any", "seed": 1}, "d"
    )
    placement.save(path)
    again = PlacementMap.load_from(path)
    assert (again.physical_to_logical_map == placement.physical_to_logical_map).all()
    assert (again.rank_of_expert == ranks).all()
    assert (again.model, again.topology, again.solver) == (placement.model, placement.topology, placement.solver)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_linear_is_file_order():
    assert (PlacementMap.linear(SPEC, TOPOLOGY).physical_to_logical_map == np.arange(8)).all()


def test_linear_needs_no_experts_that_divide():
    """60 on 8 ranks, whatever the topology has room for; more ranks than experts too."""
    for num_experts, num_ranks, sizes in ((9, 4, [3, 2, 2, 2]), (60, 8, [8] * 4 + [7] * 4), (3, 4, [1, 1, 1, 0])):
        linear = PlacementMap.linear(make_spec(2, num_experts, 2), Topology(1, num_ranks, num_experts))
        assert linear.topology.slots_per_rank == max(sizes)
        assert np.bincount(linear.rank_of_expert[1], minlength=num_ranks).tolist() == sizes
        assert (np.diff(linear.rank_of_expert) >= 0).all()


def test_a_rank_that_is_given_too_many_is_refused():
    with pytest.raises(CoterieError, match="rank 0 is given 8 experts and has 2 slots"):
        PlacementMap.from_ranks(SPEC, TOPOLOGY, np.zeros((2, 8), dtype=np.int64), {"name": "any"})


def test_slots_may_stand_empty_and_experts_may_be_copied():
    topology = Topology(1, 4, 3)
    row = [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1]
    empty = PlacementMap(SPEC, topology, np.array([row, row]), {})
    assert empty.slot_of_expert[0].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    copied = PlacementMap(SPEC, topology, np.array([[0, 1, 7, *row[3:]], row]), {})
    with pytest.raises(CoterieError, match="1 redundant experts"):
        _ = copied.slot_of_expert


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2, 3, 4, 5, 6, 7]], r"must be \(layers, slots\) = \(2, 8\)"),
        ([[0, 1, 2, 3, 4, 5, 6, 6]] * 2, "expert 7 has no slot"),
        ([[0, 1, 2, 3, 4, 5, 6, 8]] * 2, "expert 8, must be -1 or below 8"),
        ([[0, 1, 2, 3, 4, 5, 6, -2]] * 2, "expert -2, must be"),
    ],
)
def test_impossible_maps_are_refused(rows, message):
    with pytest.raises(CoterieError, match=message):
        PlacementMap(SPEC, TOPOLOGY, np.array(rows), {})


def test_two_copies_on_one_rank_are_refused():
    row = [0, 1, 0, 2, 3, -1, 4, 5, -1, 6, 7, -1]
    with pytest.raises(CoterieError, match="rank 0 holds one expert twice"):
        PlacementMap(SPEC, Topology(1, 4, 3), np.array([row, row]), {})


def edit(value, path, new):
    *parents, last = path
    for key in parents:
        value = value[key]
    if new is KeyError:
        del value[last]
    else:
        value[last] = new


@pytest.mark.parametrize(
    ("where", "new"),
    [
        (["schema_version"], 2),
        (["schema_version"], KeyError),
        (["model"], 7),
        (["model", "num_experts"], "8"),
        (["model", "num_experts"], True),
        (["model", "layer_ids"], [1, 0]),
        (["model", "surprise"], 1),
        (["topology", "num_nodes"], 0),
        (["topology", "slots_per_rank"], 2.0),
        (["topology"], []),
        (["layer_ids"], [0, 2]),
        (["physical_to_logical_map"], None),
        (["physical_to_logical_map"], []),
        (["physical_to_logical_map", 0], 5),
        (["physical_to_logical_map", 0], [0]),
        (["physical_to_logical_map", 0, 0], 0.5),
        (["physical_to_logical_map", 0, 0], 10**30),
        (["solver"], KeyError),
        (["solver"], "search"),
        (["metrics"], [1]),
        (["metrics"], {"search": {}}),
    ],
)
def test_edited_files_are_refused_in_one_line(tmp_path, where, new):
    path = tmp_path / "plan.json"
    PlacementMap.linear(SPEC, TOPOLOGY).save(path)
    value = json.loads(path.read_text())
    edit(value, where, new)
    path.write_text(json.dumps(value))
    with pytest.raises(CoterieError) as caught:
        PlacementMap.load_from(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": 1}', "[" * 100_000, "\x00"])
def test_files_that_are_no_map_are_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(CoterieError):
        PlacementMap.load_from(path)


def test_a_map_of_another_model_is_refused():
    with pytest.raises(CoterieError, match="the map is for made-up.*8 experts.*not for made-up.*16 experts"):
        PlacementMap.linear(SPEC, TOPOLOGY).require_model(make_spec(2, 16, 2))


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(CoterieError, match="cannot be written"):
        PlacementMap.linear(SPEC, TOPOLOGY).save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_what_a_recording_does_not_say_of_its_model_rules_nothing_out():
    known = replace(make_spec(2, 8, 2), hidden_size=32, expert_size=16)
    imported = replace(known, name="trace", model_type="unknown", hidden_size=0, expert_size=0)
    assert imported.routes_like(known)
    assert known.routes_like(imported)
    assert not replace(imported, top_k=3).routes_like(known)
    assert not replace(known, model_type="mixtral").routes_like(known)
    assert not replace(imported, hidden_size=64).routes_like(known)


def test_files_from_before_hidden_layers_were_recorded_are_read(tmp_path):
    from profiler.spec import MoESpec

    old = make_spec(2, 8, 2)
    assert "num_hidden_layers" not in old.to_json()  # nor do digests of old profiles change
    assert MoESpec.from_json(old.to_json()) == old
    known = replace(old, num_hidden_layers=3)
    assert MoESpec.from_json(known.to_json()) == known
    assert known.routes_like(old)
    with pytest.raises(CoterieError, match="must be above the last MoE layer"):
        replace(old, num_hidden_layers=1)
