"""Models that transformers itself loads expert-parallel, against one process: permutations, copies, shared batches, FSDP."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_runtime import copies_map, permutation_map
from transformers import AutoModelForCausalLM, Step3p7TextModel
from transformers.distributed import DistributedConfig

from placement.runtime.engine import register
from placement.runtime.experts import Options
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import Meter
from profiler import CoterieError
from profiler.families import read_spec

FAMILIES = ("olmoe", "gpt_oss", "mixtral", "step3p5")
MAPS = {"permutation": permutation_map, "copies": copies_map}


def load(folder, **sizes):
    config = DistributedConfig(ep_implementation="coterie", **sizes)
    return auto(folder).from_pretrained(folder, dtype=torch.float32, distributed_config=config)


def auto(folder):
    return Step3p7TextModel if str(folder).endswith("step3p5") else AutoModelForCausalLM


def outputs(model, input_ids):
    """Logits, or a few values of the states of a model without a head: of all, a square is what the last norm makes."""
    out = full(model(input_ids=input_ids, use_cache=False)[0])
    return out[..., :3] if isinstance(model, Step3p7TextModel) else out


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(rank, _device, arguments):
    """Logits, and gradients of routers and experts, of every family, map and way to lay out the ranks."""
    num_ranks = dist.get_world_size()
    layouts = {
        "shared batch": {"tp_size": num_ranks, "ep_size": num_ranks},
        "data parallel": {"tp_size": 1, "fsdp_size": num_ranks, "ep_size": num_ranks},
    }
    if num_ranks == 4:
        layouts["both"] = {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}
        layouts["two groups"] = {"tp_size": 1, "fsdp_size": 4, "ep_size": 2}
    found = {}
    for family in FAMILIES:
        folder = f"{arguments['folder']}/{family}"
        reference = auto(folder).from_pretrained(folder, dtype=torch.float32)
        spec = read_spec(reference, "tiny")
        batches = [
            torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(num_ranks)
        ]
        for layout, sizes in layouts.items():
            group_size, sharing = sizes["ep_size"], sizes["tp_size"]
            for map_name, make_map in MAPS.items():
                key = f"{family}, {layout}, {map_name}"
                engine = register(make_map(spec, group_size, seed=7), Options(), Meter())
                model = load(folder, **sizes)
                mine = batches[rank // sharing]
                used = batches[: num_ranks // sharing]
                with torch.no_grad():
                    out = outputs(model, mine)
                    expected = outputs(reference, mine)
                found[f"{key}: logits"] = float((out - expected).abs().max())
                reference.zero_grad()
                for batch in used:
                    (outputs(reference, batch).square().mean() / len(used)).backward()
                outputs(model, mine).square().mean().backward()
                expected = dict(reference.named_parameters())
                for name, parameter in model.named_parameters():
                    if ".experts." in name or ".router." in name or ".gate." in name or "embed" in name:
                        got, right = full(parameter.grad), expected[name].grad
                        if ".experts." in name and map_name == "permutation":  # experts changed places
                            layer = spec.layer_ids.index(int(name.split("layers.")[1].split(".")[0]))
                            right = right[engine.placement.physical_to_logical_map[layer]]
                        found[f"{key}: {name}"] = float((got - right).abs().max() / right.abs().max().clamp(min=1e-6))
                engine.restore()
                for name, parameter in model.named_parameters():
                    if ".experts." in name:
                        found[f"{key}: restored {name}"] = float((full(parameter) - expected[name]).abs().max())
                with torch.no_grad():
                    out = outputs(model, mine)
                    expected = outputs(reference, mine)
                found[f"{key}: logits again"] = float((out - expected).abs().max())
    return {"found": found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family, num_key_value_heads=4).save_pretrained(path / family)
    return path


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_models_equal_one_process(folder, num_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for result in run_on_ranks(compare, num_ranks, {"folder": str(folder)}):
        found = result["found"]
        assert len(found) > 100
        wrong = [f"{name} {value:.1e}" for name, value in found.items() if not value < 1e-4]
        assert not wrong, "\n".join(wrong)


def save_and_load(rank, _device, arguments):
    """Weights read between backward pass and step, and others written: with experts in their places, by names of files."""
    num_ranks, found = dist.get_world_size(), {}
    batches = [torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(num_ranks)]
    layouts = {"shared batch": {"tp_size": num_ranks, "ep_size": num_ranks}}
    layouts["two copies"] = {"tp_size": 1, "fsdp_size": num_ranks, "ep_size": max(2, num_ranks // 2)}
    for layout, sizes in layouts.items():
        for map_name, make_map in MAPS.items():
            reference = AutoModelForCausalLM.from_pretrained(f"{arguments['folder']}/olmoe", dtype=torch.float32)
            register(make_map(read_spec(reference, "tiny"), sizes["ep_size"], seed=7))
            model = load(f"{arguments['folder']}/olmoe", **sizes)
            used = batches[: num_ranks // sizes["tp_size"]]
            mine = used[rank // sizes["tp_size"]]
            steps = {one: torch.optim.SGD(one.parameters(), lr=1.0) for one in (reference, model)}
            for batch in used:
                (outputs(reference, batch).square().mean() / len(used)).backward()
            outputs(model, mine).square().mean().backward()
            key = f"{layout}, {map_name}"
            found[f"{key}: saved"] = largest_difference(model, reference)
            for step in steps.values():
                step.step()
            found[f"{key}: trained"] = largest_difference(model, reference)
            with torch.no_grad():
                found[f"{key}: logits"] = float((outputs(model, mine) - outputs(reference, mine)).abs().max())
                for one in (model, reference):
                    one.load_state_dict({name: value * 1.5 for name, value in one.state_dict().items()})
                found[f"{key}: loaded"] = largest_difference(model, reference)
                found[f"{key}: logits again"] = float((outputs(model, mine) - outputs(reference, mine)).abs().max())
    return {"found": found}


def largest_difference(model, reference):
    held = reference.state_dict()
    return max(float((full(value) - held[name]).abs().max()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_weights_are_saved_and_loaded_by_name(folder, num_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for result in run_on_ranks(save_and_load, num_ranks, {"folder": str(folder)}):
        assert len(result["found"]) == 20
        assert max(result["found"].values()) < 1e-4, result["found"]


def load_twice(_rank, _device, arguments):
    """Two models loaded one after the other under one map: how far each is from one process."""
    found = []
    for family in ("olmoe", "step3p5"):  # the second has no config in its experts
        folder = f"{arguments['folder']}/{family}"
        reference = auto(folder).from_pretrained(folder, dtype=torch.float32)
        register(permutation_map(read_spec(reference, "tiny"), 2, seed=3))
        for _ in range(2):
            model, ids = load(folder, tp_size=1, fsdp_size=2, ep_size=2), torch.arange(3, 12)[None]
            with torch.no_grad():
                found.append(float((outputs(model, ids) - outputs(reference, ids)).abs().max()))
    return {"found": found}


def test_models_are_loaded_one_after_the_other(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for result in run_on_ranks(load_twice, 2, {"folder": str(folder)}):
        assert len(result["found"]) == 4
        assert max(result["found"]) < 1e-5


def wrong_map(_rank, _device, arguments):
    """A map for other layers, for other ranks, and for another model: what each is told."""
    said = []
    spec = read_spec(tiny_model("olmoe", num_key_value_heads=4), "tiny")
    sizes = {"tp_size": 2, "ep_size": 2}
    for change, ranks in (({"layer_ids": (0,)}, 2), ({}, 4), ({"hidden_size": 48}, 2)):
        register(permutation_map(replace(spec, **change), ranks, seed=1))
        try:
            model = load(f"{arguments['folder']}/olmoe", **sizes)
            model(input_ids=torch.tensor([[5, 6]]))
        except CoterieError as error:
            said.append(str(error))
    return {"said": said}


def test_maps_that_do_not_fit_are_refused(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for result in run_on_ranks(wrong_map, 2, {"folder": str(folder)}):
        layers, ranks, sizes = result["said"]
        assert "the map has 1 MoE layers, the model" in layers
        assert "the map is for 4 ranks, this run has 2" in ranks
        assert "the map is for (experts, hidden size, expert size) (8, 48, 16), this model has (8, 32, 16)" in sizes
