"""What is written for an engine means the plan, is read back as the plan, or is refused with the reason."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_spec
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import profiler.files
from placement.backends import BACKENDS
from placement.exporters import eplb, sglang, tensorrt_llm, vllm, vllm_ascend
from placement.exporters.checkpoint import permute_checkpoint
from placement.exporters.contract import PROVENANCE, ServedModel, write_export
from placement.foreign import read_any_map
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.spec import MoESpec

ENGINES = {
    "map.json": sglang.ENGINE,
    "map.yaml": tensorrt_llm.ENGINE,
    "plan.json": vllm.ENGINE,
    "ascend.json": vllm_ascend.ENGINE,
    "map.safetensors": eplb.ENGINE,
}


@st.composite
def full_maps(draw: st.DrawFn) -> PlacementMap:
    """Any map without empty slots: dense layers before and between, redundant experts, several nodes."""
    num_nodes, ranks_per_node = draw(st.sampled_from([(1, 2), (1, 4), (2, 2), (1, 3)]))
    num_ranks, num_experts = num_nodes * ranks_per_node, draw(st.sampled_from([12, 24]))
    extra = draw(st.integers(0, 2))
    layer_ids = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in layer_ids:
        ranks = rng.permutation(num_experts).reshape(num_ranks, -1)
        copies = [rng.permutation(np.setdiff1d(np.arange(num_experts), held))[:extra] for held in ranks]
        held = [rng.permutation(np.concatenate(pair)) for pair in zip(ranks, copies, strict=True)]
        rows.append(np.concatenate(held))
    spec = MoESpec("made/up", "olmoe", layer_ids, num_experts, 2, 1, 32, 16, "float32")
    topology = Topology(num_nodes, ranks_per_node, num_experts // num_ranks + extra)
    return PlacementMap(spec, topology, np.stack(rows), {"name": "any"})


@pytest.mark.parametrize("name", ENGINES)
@given(placement=full_maps(), dense_behind=st.integers(0, 3), num_mtp=st.integers(0, 1))
def test_every_export_is_read_back_as_the_same_map(tmp_path_factory, name, placement, dense_behind, num_mtp):
    layers = ServedModel(placement.model.layer_ids[-1] + 1 + dense_behind, num_mtp)
    path = tmp_path_factory.mktemp("export") / name
    exported = write_export(ENGINES[name], placement, path, layers)
    topology = placement.topology
    ranks = None if name in ("plan.json", "ascend.json") else topology.num_ranks
    again = read_any_map(path, placement.model, ranks, topology.num_nodes)
    assert (again.physical_to_logical_map == placement.physical_to_logical_map).all()
    assert again.model == placement.model
    assert again.topology == topology
    sidecar = json.loads((path.parent / (path.name + PROVENANCE)).read_text())
    assert sidecar["start"] == exported.start
    assert sidecar["checked_against"] == ENGINES[name].checked_against
    assert path.read_bytes() == exported.content
    assert write_export(ENGINES[name], placement, path, layers).content == exported.content  # same bytes again


def made_checkpoint(placement: PlacementMap, folder: Path) -> Path:
    """Weights that say whose they are: expert e and its router row hold e."""
    spec, tensors = placement.model, {}
    for layer in spec.layer_ids:
        gate = np.arange(spec.num_experts, dtype=np.float32)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = np.repeat(gate[:, None], 3, axis=1)
        for expert in range(spec.num_experts):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"] = np.full((2, 3), expert, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": spec.model_type, "num_hidden_layers": spec.layer_ids[-1] + 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@given(placement=full_maps())
def test_a_permuted_checkpoint_is_read_back_as_the_same_map(tmp_path_factory, placement):
    folder = tmp_path_factory.mktemp("export")
    original, planned = made_checkpoint(placement, folder / "original"), folder / "planned"
    spec, topology = placement.model, placement.topology
    if topology.num_slots > spec.num_experts:
        with pytest.raises(CoterieError, match="plan without redundant experts"):
            permute_checkpoint(original, planned, placement)
        assert [path.name for path in folder.iterdir()] == ["original"]
        return
    permute_checkpoint(original, planned, placement)
    again = read_any_map(planned, spec, topology.num_ranks, topology.num_nodes)
    assert (again.physical_to_logical_map == placement.physical_to_logical_map).all()
    assert (again.model, again.topology) == (spec, topology)
    tensors = load_file(planned / "model.safetensors")
    for layer, row in zip(
        spec.layer_ids, placement.physical_to_logical_map, strict=True
    ):  # linear placement is the plan
        assert (tensors[f"model.layers.{layer}.mlp.gate.weight"] == row[:, None]).all()
        for slot, expert in enumerate(row):
            assert (tensors[f"model.layers.{layer}.mlp.experts.{slot}.up_proj.weight"] == expert).all()
    permute_checkpoint(planned, folder / "back", placement, invert=True)
    back = load_file(folder / "back" / "model.safetensors")
    assert all((back[name] == tensor).all() for name, tensor in load_file(original / "model.safetensors").items())


@given(placement=full_maps())
def test_eplb_inverse_is_what_a_loop_finds(placement):
    log2phy, logcnt = eplb.inverse(placement.physical_to_logical_map, placement.model.num_experts)
    for layer, row in enumerate(placement.physical_to_logical_map.tolist()):
        for expert in range(placement.model.num_experts):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            assert logcnt[layer, expert] == len(slots)
            assert log2phy[layer, expert].tolist() == slots + [-1] * (log2phy.shape[2] - len(slots))
    assert log2phy.shape[2] == logcnt.max()


def some_map(**changes: object) -> PlacementMap:
    """Layers 1 and 3 of 5, 8 experts in reverse order, 4 ranks on 2 nodes, one copy a rank."""
    spec = replace(make_spec(2, 8, 2), layer_ids=(1, 3), name="org/model", **changes)
    rows = np.arange(8)[::-1].reshape(4, 2)
    rows = np.concatenate([rows, np.roll(rows, 1, axis=0)[:, :1]], axis=1).ravel()
    return PlacementMap(spec, Topology(2, 2, 3), np.stack([rows, rows]), {"name": "any"})


def test_sglang_has_a_row_for_every_hidden_layer():
    exported = sglang.export(some_map(), Path("/x/map.json"), ServedModel(5))
    value = json.loads(exported.content)
    assert list(value) == ["physical_to_logical_map"]  # any other key is a TypeError in SGLang
    rows = value["physical_to_logical_map"]
    dense = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert [rows[layer] == dense for layer in range(5)] == [True, False, True, False, True]
    assert rows[1] == rows[3] == some_map().physical_to_logical_map[0].tolist()
    moved = sglang.export(
        replace(some_map(), model=replace(some_map().model, name="unknown")), Path("/x"), ServedModel(5)
    )
    assert "--model-path MODEL " in moved.start
    assert "--model-path './my model' " in sglang.export(some_map(), Path("/x"), ServedModel(5, 0, "./my model")).start
    for words in ("--ep-size 4", "--nnodes 2", "--ep-num-redundant-experts 4", "--init-expert-location /x/map.json"):
        assert words in exported.start


def test_tensorrt_llm_has_rows_for_mtp_layers():
    value = yaml.safe_load(tensorrt_llm.export(some_map(), Path("/x/map.yaml"), ServedModel(5, 2)).content)
    assert set(value) == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert (value["num_slots"], value["layer_updates_per_iter"]) == (12, 0)
    assert list(value["initial_global_assignments"]) == [1, 3, 5, 6]
    # what its own code starts with: rank r from expert r * E // R on
    assert value["initial_global_assignments"][6] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 0]


def test_vllm_ascend_counts_moe_layers_from_0():
    value = json.loads(vllm_ascend.export(some_map(), Path("/x/map.json"), ServedModel()).content)
    assert value["moe_layer_count"] == 2
    assert [layer["layer_id"] for layer in value["layer_list"]] == [0, 1]
    assert value["layer_list"][0]["device_count"] == 4
    assert value["layer_list"][1]["device_list"][1] == {"device_id": 1, "device_expert": [5, 4, 7]}


def test_eplb_file_holds_three_tensors(tmp_path):
    write_export(eplb.ENGINE, some_map(), tmp_path / "map.safetensors", ServedModel())
    tensors = load_file(tmp_path / "map.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        "phy2log": ((2, 12), np.int64),
        "log2phy": ((2, 8, 2), np.int64),
        "logcnt": ((2, 8), np.int64),
    }


def test_the_plan_knows_its_hidden_layers():
    placement = some_map(num_hidden_layers=6)
    layers = ServedModel(placement.model.num_hidden_layers)
    assert len(json.loads(sglang.export(placement, Path("/x"), layers).content)["physical_to_logical_map"]) == 6


def test_the_page_has_every_engine_and_how_it_sends():
    """Rows such as | `a-b`, `-c` | chosen by | per rank, per expert | ...: a short name ends like the one before."""
    rows = {}
    for line in (Path(__file__).parents[1] / "docs" / "engines.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 6 or not any(mode in cells[3] for mode in ("per rank", "per expert", "to all")):
            continue
        names, first = re.findall(r"`([^`]+)`", cells[1]), ""
        for number, name in enumerate(names):
            first = first or name
            stem = next((known for known in BACKENDS if name[0] == "-" and known.endswith(name)
                         and first.startswith(known.removesuffix(name))), name)  # fmt: skip
            modes = cells[3].partition(";")[0].split(", ")
            rows[stem] = modes[number if len(modes) == len(names) else 0].replace(" ", "-")
    assert rows == {name: backend.sends for name, backend in BACKENDS.items()}


def empty_slots() -> PlacementMap:
    """8 experts on 3 ranks, the last slot of which is empty."""
    slots = np.array([[0, 1, 2, 3, 4, 5, 6, 7, -1]])
    return PlacementMap(make_spec(1, 8, 2), Topology.for_experts(8, 3), slots, {"name": "any"})


@pytest.mark.parametrize("name", ENGINES)
def test_empty_slots_are_refused(tmp_path, name):
    with pytest.raises(CoterieError, match="1 empty slots of 9.*--redundant-experts 1"):
        write_export(ENGINES[name], empty_slots(), tmp_path / name, ServedModel(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("map.json", ServedModel(), "give --num-hidden-layers"),
        ("map.json", ServedModel(3), "last MoE layer is 3; give at least 4"),
        ("map.yaml", ServedModel(0, 1), "needs the number of all hidden layers"),
        ("ascend.json", ServedModel(5, 2), "at most 1"),
    ],
)
def test_what_an_engine_cannot_take_is_refused(tmp_path, name, layers, message):
    with pytest.raises(CoterieError, match=message):
        write_export(ENGINES[name], some_map(), tmp_path / name, layers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_plans_for_several_hosts_say_that_each_reads_the_file(tmp_path, num_nodes):
    placement = PlacementMap.linear(make_spec(2, 8, 2), Topology.for_experts(8, 4, num_nodes))
    for engine in (sglang.ENGINE, vllm.ENGINE):
        exported = write_export(engine, placement, tmp_path / "map.json", ServedModel(2))
        assert any("copy it to the same path on each" in remark for remark in exported.remarks) == (num_nodes > 1)


def test_sglang_is_not_given_what_it_loads_in_file_order(tmp_path):
    placement = some_map(model_type="gpt_oss")
    with pytest.raises(CoterieError, match="model type gpt_oss: .* --to checkpoint") as refused:
        write_export(sglang.ENGINE, placement, tmp_path / "map.json", ServedModel(5))
    assert "\n" not in str(refused.value)
    with pytest.raises(CoterieError, match="model type gpt_oss"):  # which only the model's config says
        write_export(sglang.ENGINE, some_map(), tmp_path / "map.json", ServedModel(5, model_type="gpt_oss"))
    assert not list(tmp_path.iterdir())
    write_export(vllm.ENGINE, placement, tmp_path / "plan.json", ServedModel(5))  # only SGLang does so


def test_other_refusals(tmp_path):
    one_rank = PlacementMap.linear(make_spec(1, 8, 2), Topology(1, 1, 8))
    with pytest.raises(CoterieError, match="on 1 rank"):
        write_export(vllm_ascend.ENGINE, one_rank, tmp_path / "a.json", ServedModel())
    with pytest.raises(CoterieError, match="takes .json"):
        write_export(vllm_ascend.ENGINE, some_map(), tmp_path / "a.yaml", ServedModel())
    with pytest.raises(CoterieError, match="-1 hidden"):
        ServedModel(-1)
    with pytest.raises(CoterieError, match="holds one expert twice"):  # no engine has a use for it
        replace(some_map(), physical_to_logical_map=np.array([[0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]] * 2))


def test_a_full_disk_leaves_neither_file_and_an_older_export_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    write_export(sglang.ENGINE, some_map(), path, ServedModel(5))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = iter(range(100))

    def full(_descriptor):
        if next(calls) % 2 == 1:  # at the second file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(profiler.files.os, "fsync", full)
    for out in (path, tmp_path / "new" / "map.json"):
        with pytest.raises(CoterieError, match="No space left.*free some space"):
            write_export(sglang.ENGINE, some_map(), out, ServedModel(6))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert not list((tmp_path / "new").iterdir())


BROKEN = {
    "cut.yaml": ("num_slots: 12\ninitial_global_assignments: {1: [0, 1", "not YAML"),
    "list.yaml": ("[1, 2]", "not a load balancer configuration"),
    "pickled.yaml": ("!!python/object/apply:os.system ['false']", "not YAML"),
    "deep.yaml": ("[" * 100_000, "not YAML"),
    "more.yaml": ("num_slots: 12\ninitial_global_assignments: {}\nmore: 1", "not a load balancer configuration"),
    "layer.yaml": ("num_slots: 1\ninitial_global_assignments: {1: [0]}", "no layer 3"),
    "text.yaml": ("num_slots: 2\ninitial_global_assignments: {1: [a, b], 3: [a, b]}", "whole numbers"),
    "short.yaml": ("num_slots: 3\ninitial_global_assignments: {1: [0, 1], 3: [0, 1]}", "num_slots is 3"),
    "bomb.yaml": ("num_slots: 2\ninitial_global_assignments: {1: &a [1, 1], 3: [*a, *a]}", "3 must be a row of whole"),
    "negative.yaml": ("num_slots: 2\ninitial_global_assignments: {1: [0, -1]}", "each from 0"),
    "nested.json": ('{"physical_to_logical_map": [[[0, 1]], [[1, 0]]]}', "whole numbers"),
    "huge.json": ('{"physical_to_logical_map": [[0], [1], [0], [1%s]]}' % ("0" * 30), "no expert"),
    "none.json": ('{"layer_list": [], "moe_layer_count": 0}', "not an expert map"),
    "count.json": ('{"layer_list": [{"layer_id": 0}], "moe_layer_count": 2}', "must be moe_layer_count"),
    "devices.json": (
        '{"layer_list": [{"layer_id": 0, "device_count": 2, "device_list": []}], "moe_layer_count": 1}',
        "0 devices",
    ),
    "nan.json": ('{"physical_to_logical_map": [[0, NaN], [1, 0]]}', "whole numbers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_maps_are_one_line(tmp_path, name):
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(CoterieError, match=message):
        read_any_map(tmp_path / name, some_map().model, 4)


@pytest.mark.parametrize("shape", [(4, 10**12), (10**12, 4)])
def test_a_tensor_that_claims_any_size_is_refused_at_once(tmp_path, shape):
    import torch

    torch.save({"phy2log": torch.zeros(1, dtype=torch.int64).expand(shape)}, tmp_path / "map.pt")
    with pytest.raises(CoterieError, match="slots, 4 ranks with 8|must have a row for each"):
        read_any_map(tmp_path / "map.pt", make_spec(4, 8, 2), 4)


def test_sglang_tensors_are_read_too(tmp_path):
    import torch

    rows = json.loads(sglang.export(some_map(), Path("/x"), ServedModel(5)).content)["physical_to_logical_map"]
    for held in (torch.tensor(rows), rows):
        torch.save({"physical_to_logical_map": held}, tmp_path / "map.pt")
        again = read_any_map(tmp_path / "map.pt", some_map().model, 4, 2)
        assert (again.physical_to_logical_map == some_map().physical_to_logical_map).all()
    for ragged in (rows[0], [rows[0], rows[1][1:]], [["0"]], None):
        torch.save({"physical_to_logical_map": ragged}, tmp_path / "odd.pt")
        with pytest.raises(CoterieError, match="must be equally long rows of whole numbers"):
            read_any_map(tmp_path / "odd.pt", some_map().model, 4)
    for odd in (torch.tensor(3), torch.zeros(5, 12), torch.zeros(2, 2, 2, dtype=torch.int64)):
        torch.save({"physical_to_logical_map": odd}, tmp_path / "odd.pt")
        with pytest.raises(CoterieError, match=r"must be whole numbers \(layers, slots\)"):
            read_any_map(tmp_path / "odd.pt", some_map().model, 4)
    torch.save({"physical_to_logical_map": torch.tensor(rows), "more": 1}, tmp_path / "more.pt")
    with pytest.raises(CoterieError, match="neither"):
        read_any_map(tmp_path / "more.pt", some_map().model, 4)


def check_tensorrt_llm(text: bytes, ep_size: int, moe_layers: list[int], num_experts: int) -> None:
    """What TensorRT-LLM's MoeLoadBalancerConfig and its MoE layers ask of the file, as strict as can be."""
    value = yaml.safe_load(text)
    assert set(value) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}  # others are forbidden
    assert type(value["num_slots"]) is int
    assert value["num_slots"] % ep_size == 0
    assert value["num_slots"] >= num_experts
    assert value["layer_updates_per_iter"] == 0  # else it moves experts away from the plan
    for layer in moe_layers:
        row = value["initial_global_assignments"][layer]  # KeyError, as there
        assert isinstance(row, list)
        assert all(type(expert) is int for expert in row)
        assert len(row) == value["num_slots"]
        assert set(row) == set(range(num_experts))
    assert all(type(layer) is int for layer in value["initial_global_assignments"])


def check_vllm_ascend(text: bytes, ep_size: int, num_layers: int, num_experts: int) -> None:
    """What vllm-ascend's init_eplb_config takes for granted."""
    value = json.loads(text)
    assert set(value) == {"moe_layer_count", "layer_list"}
    assert value["moe_layer_count"] == len(value["layer_list"]) == num_layers
    for ordinal, layer in enumerate(value["layer_list"]):
        assert set(layer) == {"layer_id", "device_count", "device_list"}
        assert layer["layer_id"] == ordinal
        assert layer["device_count"] == len(layer["device_list"]) == ep_size
        held = [device["device_expert"] for device in layer["device_list"]]
        assert [device["device_id"] for device in layer["device_list"]] == list(range(ep_size))
        assert len({len(experts) for experts in held}) == 1
        assert all(len(set(experts)) == len(experts) for experts in held)
        assert {expert for experts in held for expert in experts} == set(range(num_experts))


@given(placement=full_maps(), num_mtp=st.integers(0, 2))
def test_files_keep_to_strict_schemas(placement, num_mtp):
    spec, ranks = placement.model, placement.topology.num_ranks
    total = spec.layer_ids[-1] + 2
    text = tensorrt_llm.export(placement, Path("/x.yaml"), ServedModel(total, num_mtp)).content
    layers = [*spec.layer_ids, *range(total, total + num_mtp)]
    check_tensorrt_llm(text, ranks, layers, spec.num_experts)
    text = vllm_ascend.export(placement, Path("/x.json"), ServedModel(total)).content
    check_vllm_ascend(text, ranks, spec.num_layers, spec.num_experts)


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["trap.pt", "trap.npy", "cut.pt", "cut.npy", "cut.safetensors", "nan.npy"])
def test_pickles_are_never_executed_and_cut_files_refused(tmp_path, name):
    import torch

    path, slots = tmp_path / name, some_map().physical_to_logical_map
    if name == "trap.pt":
        torch.save({"phy2log": Trap(tmp_path / "executed")}, path)
    elif name == "trap.npy":
        np.save(path, np.array([Trap(tmp_path / "executed")], dtype=object), allow_pickle=True)
    elif name == "nan.npy":
        np.save(path, np.full((2, 12), np.nan))
    else:
        if name == "cut.pt":
            torch.save({"phy2log": torch.from_numpy(slots)}, path)
        elif name == "cut.npy":
            np.save(path, slots)
        else:
            write_export(eplb.ENGINE, some_map(), path, ServedModel())
        path.write_bytes(path.read_bytes()[:-20])
    message = {"nan.npy": "whole numbers", "trap.pt": "holds code, not only tensors"}.get(
        name, "refused|cannot be read"
    )
    with pytest.raises(CoterieError, match=message):
        read_any_map(path, some_map().model, 4)
    assert not (tmp_path / "executed").exists()
