"""Constrained runs on ranks equal the constrained single process, and visit as few ranks as promised."""

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_constraints import random_map
from test_engine import load
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from placement.constraints.constrain import constrain
from placement.constraints.lists import collaborator_lists, device_aware_lists
from placement.constraints.pruning import limit_ranks
from placement.runtime.engine import register
from placement.runtime.experts import IMPLEMENTATIONS, Options, build_implementations, installed
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import Meter
from profiler.families import find_moe_layers, read_spec
from profiler.profile import Profile
from profiler.recorder import Recorder

FAMILIES = {
    "olmoe": {},
    "mixtral": {},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
}
TOKENS = (2, 9)


def constraints_of(model, placement):
    spec = placement.model
    ids = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(99))
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=ids)
    profile = Profile.from_tokens(spec, ["text"], recorder.trace(), {})
    similarity = torch.rand(spec.num_layers, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    return {
        "c2r": collaborator_lists(profile, 3),
        "aware": device_aware_lists(profile, placement, 3),
        "router": limit_ranks(placement, 1),
        "similarity": limit_ranks(placement, 1, similarity),
    }


def compare(rank, _device, _arguments):
    """Logits and gradients of every family and constraint, and the copies sent of a token."""
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    batches = [torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(seed)) for seed in range(num_ranks)]
    found, fan_out = {}, {}
    for family, overrides in FAMILIES.items():
        for copies in (0, 2):
            model = tiny_model(family, **overrides)
            spec = read_spec(model, "tiny")
            placement = random_map(spec, num_ranks, copies)
            layers, meter = find_moe_layers(model), Meter()
            placed = build_implementations(
                layers, placement, IMPLEMENTATIONS["coterie"], mesh["ep"], mesh["tp"], meter, Options()
            )
            for name, constraint in constraints_of(model, placement).items():
                key = f"{family}, {copies} copies, {name}"
                with constrain(model, constraint):
                    expected = model(input_ids=batches[rank], use_cache=False).logits
                    wanted = torch.autograd.grad(expected.square().mean(), model.lm_head.weight)[0]
                    meter.reset()
                    with installed(layers, placed):
                        out = model(input_ids=batches[rank], use_cache=False).logits
                    fan_out[key] = meter.rows_sent / (spec.num_layers * batches[rank].numel())
                    got = torch.autograd.grad(out.square().mean(), model.lm_head.weight)[0]
                found[f"{key}: logits"] = float((out - expected).detach().abs().max())
                found[f"{key}: gradient"] = float((got - wanted).abs().max())
    return {"found": found, "fan_out": fan_out}


@pytest.mark.parametrize("num_ranks", [2])
def test_constrained_runs_equal_one_process(num_ranks):
    for result in run_on_ranks(compare, num_ranks, {}):
        wrong = [f"{name} {value:.1e}" for name, value in result["found"].items() if not value < 1e-4]
        assert not wrong, "\n".join(wrong)
        assert len(result["found"]) == len(FAMILIES) * 2 * 4 * 2
        for name, ranks_visited in result["fan_out"].items():
            if name.endswith(("router", "similarity")):
                assert ranks_visited == 1, name


def in_the_engine(rank, _device, arguments):
    """The same inside transformers' own expert parallelism, which wraps routers too."""
    reference = AutoModelForCausalLM.from_pretrained(arguments["folder"], dtype=torch.float32)
    placement = random_map(read_spec(reference, "tiny"), 2)
    meter = Meter()
    register(placement, Options(), meter)
    model = load(arguments["folder"], tp_size=2, ep_size=2)
    ids = torch.randint(3, 64, TOKENS, generator=torch.Generator().manual_seed(0))
    difference = {}
    for name, constraint in constraints_of(reference, placement).items():
        with torch.no_grad(), constrain(reference, constraint):
            expected = reference(input_ids=ids, use_cache=False).logits
            free = model(input_ids=ids, use_cache=False).logits
            # A rank of a sharded model holds a part of the experts, so it does not know how many there are.
            with constrain(model, constraint):
                out = model(input_ids=ids, use_cache=False).logits
        full = out.full_tensor() if hasattr(out, "full_tensor") else out
        difference[name] = float((full - expected).abs().max())
        assert float((free - expected).abs().max()) > 1e-4
    return {"difference": difference}


def test_constrained_runs_in_transformers_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    tiny_model("olmoe", num_key_value_heads=4).save_pretrained(tmp_path)
    for result in run_on_ranks(in_the_engine, 2, {"folder": str(tmp_path)}):
        assert len(result["difference"]) == 4
        assert max(result["difference"].values()) < 1e-4, result
