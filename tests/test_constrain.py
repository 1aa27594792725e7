"""`constrain` on stock models: no-op where loose, the model's own weights, reversible, the auxiliary loss, refusals."""

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model
from test_constraints import random_map
from tiny_models import CONFIGS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from placement.constraints.config import load, save
from placement.constraints.constrain import Constraint, apply, balance_loss, constrain
from placement.constraints.lists import CollaboratorLists, collaborator_lists, device_aware_lists
from placement.constraints.pruning import limit_ranks
from placement.constraints.routers import RULES, find_routers
from placement.cost import evaluate
from profiler import CoterieError, Recorder
from profiler.families import read_spec
from profiler.profile import Profile

SUPPORTED = {
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "flex_olmo": {},
    "gpt_oss": {},
    "minimax": {},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
    "qwen3_vl_moe_text": {},
}
REFUSED = {
    "deepseek_v3": "by a sigmoid",
    "glm4_moe": "by a sigmoid",
    "dots1": "by a sigmoid",
    "minimax_m2": "by a sigmoid",
    "deepseek_v2": "group-limited",
    "switch_transformers": "expert-choice",
    "llama4_text": "by a sigmoid",
    "phimoe": "is not one that coterie knows",
}


def batch(seed=0, rows=3, length=11):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def loose(model):
    spec = read_spec(model, "tiny")
    return CollaboratorLists(spec, all_others(spec), {})


def all_others(spec):
    rows = [np.delete(np.arange(spec.num_experts), expert) for expert in range(spec.num_experts)]
    return np.stack([np.stack(rows)] * spec.num_layers)


def tight(model) -> list[Constraint]:
    spec = read_spec(model, "tiny")
    placement = random_map(spec, ranks=4)
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=batch())
    profile = Profile.from_tokens(spec, ["text"], recorder.trace(), {})
    return [
        collaborator_lists(profile, 2),
        device_aware_lists(profile, placement, 1),
        limit_ranks(placement, 1),
        limit_ranks(placement, 1, torch.rand(spec.num_layers, 8, 8).numpy()),
    ]


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_families(family):
    model = tiny_model(family, **SUPPORTED[family])
    before = model(input_ids=batch()).last_hidden_state if not hasattr(model, "lm_head") else model(batch()).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run():
        with Recorder(model, weights=True) as recorder:
            out = model(input_ids=batch())
        return out[0] if not hasattr(out, "logits") else out.logits, recorder.trace()

    free, free_trace = run()
    with constrain(model, loose(model)):
        same, same_trace = run()
    assert torch.equal(same, free)  # to the last bit: the same rule on the same selection
    assert (same_trace.topk_weights == free_trace.topk_weights).all()
    for constraint in tight(model):
        with constrain(model, constraint):
            other, trace = run()
        assert not torch.equal(other, free)
        spec = read_spec(model, "tiny")
        if not isinstance(constraint, CollaboratorLists):
            assert (evaluate(random_map(spec, ranks=4), trace).fan_out == 1).all()
        else:
            for layer, ids_TK in enumerate(trace.topk_ids):
                assert all(constraint.allowed[layer][ids[0]][ids].all() for ids in ids_TK)
    again, _ = run()
    assert torch.equal(again, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__ in RULES)


@pytest.mark.parametrize("family", REFUSED)
def test_other_routers_are_refused(family):
    model = tiny_model(family)
    spec = read_spec(model, "tiny")
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with (
        pytest.raises(CoterieError, match=REFUSED[family]),
        constrain(model, CollaboratorLists(spec, all_others(spec), {})),
    ):
        pytest.fail("the block must not be entered")
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_one_group_is_no_group_limit():
    model = tiny_model("deepseek_v2", n_group=1, topk_group=1)
    assert model.config.topk_method == "group_limited_greedy"
    with torch.no_grad():
        free = model(input_ids=batch()).logits
        with constrain(model, loose(model)):
            assert torch.equal(model(input_ids=batch()).logits, free)


def test_an_exception_restores_the_model():
    model = tiny_model("olmoe")
    with torch.no_grad():
        free = model(input_ids=batch()).logits
        constraint = tight(model)[0]

        def fail():
            with constrain(model, constraint):
                assert not torch.equal(model(input_ids=batch()).logits, free)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert torch.equal(model(input_ids=batch()).logits, free)


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_a_model_that_was_compiled_and_run_is_constrained(in_place):
    model, plain = tiny_model("olmoe"), tiny_model("olmoe")
    constraint, free = tight(plain)[2], plain(input_ids=batch()).logits
    with constrain(plain, constraint):
        expected = plain(input_ids=batch()).logits
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(input_ids=batch()).logits, free)
        with constrain(model, constraint):
            torch.testing.assert_close(compiled(input_ids=batch()).logits, expected)
        torch.testing.assert_close(compiled(input_ids=batch()).logits, free)


def test_constraints_of_other_models_and_nesting_are_refused():
    model = tiny_model("olmoe")
    for other in (
        tiny_model("olmoe", num_experts=16, num_local_experts=16),
        tiny_model("olmoe", num_hidden_layers=3),
        tiny_model("mixtral"),
    ):
        with pytest.raises(CoterieError, match="the constraint is for"), constrain(model, loose(other)):
            pass
    with (
        constrain(model, tight(model)[0]),
        pytest.raises(CoterieError, match="constrained already"),
        constrain(model, loose(model)),
    ):
        pass
    with constrain(model, loose(model)):  # the refused one left nothing behind
        pass
    with constrain(model, None):
        assert not any(router.module._forward_hooks for router in find_routers(model))


SEEING = {"qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5_moe": "Qwen3_5Moe"}
"""Models that see, which keep what they know of their experts in the config of their text."""


def seeing_model(family):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_position_embeddings"), 16)
    eyes = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    text = {**CONFIGS[f"{family}_text"], "rope_parameters": rope}
    config = AutoConfig.for_model(family, text_config=text, vision_config=eyes)
    return getattr(transformers, f"{SEEING[family]}ForConditionalGeneration")._from_config(config).eval()


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", *SEEING])
def test_the_auxiliary_loss_follows_the_selection(family):
    model = seeing_model(family) if family in SEEING else tiny_model(family)
    settings = model if hasattr(model, "router_aux_loss_coef") else model.config.text_config
    settings.router_aux_loss_coef = 0.5
    ids, mask = batch(), torch.ones(3, 11, dtype=torch.long)
    mask[0, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "output_router_logits": True}
    free = model(**inputs)
    with constrain(model, loose(model)):
        same = model(**inputs)
    torch.testing.assert_close(same.aux_loss, free.aux_loss)
    torch.testing.assert_close(same.loss, free.loss)
    constraint = tight(model)[2]
    chosen = []
    with constrain(model, constraint):
        handles = [
            router.module.register_forward_hook(lambda _m, _a, out: chosen.append(out[2]))
            for router in find_routers(model)
        ]
        constrained = model(**inputs)
        language = model(**{**inputs, "output_router_logits": False}).loss
    for handle in handles:
        handle.remove()
    expected = slow_balance_loss(constrained.router_logits, chosen[:2], mask)
    torch.testing.assert_close(constrained.aux_loss, expected)
    torch.testing.assert_close(constrained.loss, language + 0.5 * expected)
    assert abs(float((constrained.aux_loss - free.aux_loss).detach())) > 1e-4
    gradient = torch.autograd.grad(constrained.loss, find_routers(model)[0].module.weight)[0]
    assert gradient.abs().sum() > 0
    assert float(balance_loss(constrained.router_logits, chosen[:2], None)) > 0


def slow_balance_loss(logits_LTE, ids_LTK, mask):
    keep = [token for token, kept in enumerate(mask.flatten().tolist()) if kept]
    experts, rows = logits_LTE[0].shape[1], len(keep) * len(logits_LTE)
    total = torch.zeros(())
    for expert in range(experts):
        picked = sum(expert in ids[token].tolist() for ids in ids_LTK for token in keep)
        probability = sum(logits[token].softmax(dim=0)[expert] for logits in logits_LTE for token in keep)
        total = total + picked / rows * probability / rows
    return experts * total


def test_saved_constraints_apply_to_loaded_models(tmp_path):
    model = tiny_model("qwen3_moe")
    constraint = tight(model)[3]
    model.save_pretrained(tmp_path)
    save(constraint, tmp_path / "constraint.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), constrain(model, constraint), constrain(loaded, load(tmp_path)):
        assert torch.equal(model(input_ids=batch()).logits, loaded(input_ids=batch()).logits)


def test_generation_is_constrained_too():
    model = tiny_model("olmoe")
    with constrain(model, tight(model)[2]), Recorder(model) as recorder:
        model.generate(input_ids=batch(), max_new_tokens=5, do_sample=False)
    assert (evaluate(random_map(recorder.spec, ranks=4), recorder.trace()).fan_out == 1).all()


def test_handles_of_apply_restore():
    model = tiny_model("olmoe")
    for handle in apply(model, tight(model)[0]):
        handle.remove()
    with torch.no_grad(), constrain(model, loose(model)):
        model(input_ids=batch())


def test_unknown_blocks_are_refused():
    class Odd(nn.Module):
        pass

    model = tiny_model("olmoe")
    model.model.layers[1].mlp.gate = Odd()
    with pytest.raises(CoterieError, match="layer 1: Odd is not one that coterie knows"):
        find_routers(model)
