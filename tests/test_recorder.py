"""The recorder sees what the router chose, whatever the family and the kernel, and changes nothing."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from profiler import CoterieError, Recorder
from profiler.families import find_moe_layers, read_spec
from profiler.trace import DECODE, PREFILL


def true_selections(model, **inputs):
    """The ids that each layer's experts really ran on, taken where they run, without hooks; and the logits."""
    seen = []
    modules = [layer.experts for layer in find_moe_layers(model)]
    for experts in modules:

        def spy(hidden_states, ids, weights, run=experts.forward):
            seen.append(ids.clone())
            return run(hidden_states, ids, weights)

        experts.forward = spy
    with torch.no_grad():
        output = model(**inputs).logits
    for experts in modules:
        del experts.__dict__["forward"]
    return torch.stack(seen).numpy(), output


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_ids_are_the_models_own(family, implementation):
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    input_ids = torch.randint(3, 64, (2, 12))
    expected, plain = true_selections(model, input_ids=input_ids)
    with torch.no_grad(), Recorder(model) as recorder:
        recorded = model(input_ids=input_ids).logits
    trace = recorder.trace()
    assert (trace.topk_ids == expected).all()
    assert torch.equal(plain, recorded)
    assert len(set(trace.topk_ids.flatten().tolist())) > 2  # the routers really choose


def test_top_k_of_biased_router_logits_would_be_wrong():
    """Why selections are recorded and not recomputed: the bias and the groups change them."""
    model = tiny_model("deepseek_v3")
    block = model.model.layers[1].mlp
    logits = []
    block.gate.register_forward_hook(lambda _module, _args, output: logits.append(output))
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=torch.randint(3, 64, (4, 32)))
    scores = logits[0][0] if isinstance(logits[0], tuple) else logits[0]
    naive = np.sort(scores.reshape(-1, 8).topk(2).indices.numpy(), axis=1)
    assert (naive != np.sort(recorder.trace().topk_ids[0], axis=1)).any()


def test_spec_of_a_model_with_dense_layers():
    spec = read_spec(tiny_model("deepseek_v3"), "tiny")
    assert spec.layer_ids == (1, 2)
    assert (spec.num_experts, spec.top_k, spec.num_groups, spec.hidden_size, spec.expert_size) == (8, 2, 2, 32, 16)


def test_padding_is_left_out():
    model = tiny_model("olmoe")
    input_ids = torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    with torch.no_grad(), Recorder(model) as recorder:
        recorder.domain_id = 1
        model(input_ids=input_ids, attention_mask=mask)
    trace = recorder.trace()
    assert trace.sequence_ids.tolist() == [0] * 6 + [1] * 3
    assert set(trace.domain_ids.tolist()) == {1}


def test_decoding_is_told_from_prefill_and_goes_on_with_its_sequences():
    model = tiny_model("olmoe")
    prompt = torch.randint(3, 64, (2, 5))
    with Recorder(model) as recorder:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4)
    trace = recorder.trace()
    assert (trace.phase == PREFILL).sum() == 10
    assert (trace.phase == DECODE).sum() == 6  # the last new token is never run
    assert set(trace.sequence_ids.tolist()) == {0, 1}


def test_separate_passes_are_separate_sequences():
    model = tiny_model("olmoe")
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=torch.randint(3, 64, (2, 4)))
        model(input_ids=torch.randint(3, 64, (1, 3)))
    assert recorder.trace().sequence_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 3


def test_one_token_without_a_cache_is_a_sequence_of_its_own():
    model = tiny_model("olmoe")
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids=torch.randint(3, 64, (2, 4)))
        model(input_ids=torch.randint(3, 64, (2, 1)), attention_mask=torch.ones(2, 1))
    assert recorder.trace().sequence_ids.tolist() == [0] * 4 + [1] * 4 + [2, 3]
    assert not recorder.trace().phase.any()


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = tiny_model("olmoe")
    recorder = Recorder(model)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    with torch.no_grad():
        model(input_ids=torch.randint(3, 64, (1, 3)))
    with pytest.raises(CoterieError, match="no token was recorded"):
        recorder.trace()


def test_a_failed_pass_leaves_nothing():
    model = tiny_model("olmoe")
    with torch.no_grad(), Recorder(model) as recorder:
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10_000]]))
        model(input_ids=torch.tensor([[5]]))
    assert recorder.trace().num_tokens == 1


def test_dense_models_are_refused_by_name():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(CoterieError, match="LlamaForCausalLM has no MoE layers.*LlamaDecoderLayer"):
        Recorder(AutoModelForCausalLM.from_config(config))
