"""Models that transformers itself loads expert-parallel, against one process: permutations, copies, shared batches, FSDP."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_runtime import copies_map, permutation_map
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from placement.runtime.engine import register
from placement.runtime.experts import Options
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import Meter
from profiler import CoterieError
from profiler.families import read_spec

FAMILIES = ("olmoe", "gpt_oss", "mixtral")
MAPS = {"permutation": permutation_map, "copies": copies_map}


def load(folder, **sizes):
    config = DistributedConfig(ep_implementation="coterie", **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)


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
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
                    out = full(model(input_ids=mine, use_cache=False).logits)
                    expected = reference(input_ids=mine, use_cache=False).logits
                found[f"{key}: logits"] = float((out - expected).abs().max())
                reference.zero_grad()
                for batch in used:
                    (reference(input_ids=batch, use_cache=False).logits.square().mean() / len(used)).backward()
                full(model(input_ids=mine, use_cache=False).logits).square().mean().backward()
                expected = dict(reference.named_parameters())
                for name, parameter in model.named_parameters():
                    if ".experts." in name or ".router." in name or ".gate." in name or "embed" in name:
                        got, right = full(parameter.grad), expected[name].grad
                        if ".experts." in name and map_name == "permutation":  # experts changed places
                            layer = int(name.split("layers.")[1].split(".")[0])
                            right = right[engine.placement.physical_to_logical_map[layer]]
                        found[f"{key}: {name}"] = float((got - right).abs().max() / right.abs().max().clamp(min=1e-6))
                engine.restore()
                for name, parameter in model.named_parameters():
                    if ".experts." in name:
                        found[f"{key}: restored {name}"] = float((full(parameter) - expected[name]).abs().max())
                with torch.no_grad():
                    out = full(model(input_ids=mine, use_cache=False).logits)
                    expected = reference(input_ids=mine, use_cache=False).logits
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
