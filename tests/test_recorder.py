"""The recorder sees what the router chose, whatever the family and the kernel, and changes nothing."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from profiler import CoterieError, Recorder
from profiler.families import find_moe_layers, read_spec
from profiler.recorder import inputs_and_mask
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


@pytest.mark.parametrize("by_name", [True, False])
def test_padding_is_left_out(by_name):
    model = tiny_model("olmoe")
    input_ids = torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    with torch.no_grad(), Recorder(model) as recorder:
        recorder.domain_id = 1
        if by_name:
            model(input_ids=input_ids, attention_mask=mask)
        else:
            model(input_ids, mask)
    trace = recorder.trace()
    assert trace.sequence_ids.tolist() == [0] * 6 + [1] * 3
    assert set(trace.domain_ids.tolist()) == {1}


def test_masks_that_say_who_sees_whom_leave_nobody_out():
    inputs = torch.zeros(2, 3, dtype=torch.long)
    for mask in (None, torch.ones(2, 1, 3, 3), {"full_attention": torch.ones(2, 1, 3, 3)}):
        given, counted = inputs_and_mask((), {"input_ids": inputs, "attention_mask": mask})
        assert given is inputs
        assert counted.tolist() == [[True] * 3] * 2


@pytest.mark.parametrize(
    "mask",
    [
        {"sliding_attention": torch.tensor([[[[1, 0], [1, 1]]], [[[0, 0], [0, 1]]]]), "full_attention": None},
        {"chunked_attention": torch.ones(2, 1, 2, 2), "linear_attention": torch.tensor([[1, 1], [0, 1]])},
        {"sliding_attention": torch.zeros(2, 1, 2, 9), "full_attention": torch.tensor([[1, 1], [0, 1]])},
    ],
)
def test_masks_of_other_kinds_of_layers_leave_padding_out(mask):
    inputs = torch.zeros(2, 2, dtype=torch.long)
    counted = inputs_and_mask((), {"input_ids": inputs, "attention_mask": mask})[1]
    assert counted.tolist() == [[True, True], [False, True]]


def test_a_mask_of_one_row_is_every_rows():
    for mask in (torch.tensor([[0, 1, 1]]), torch.tensor([[[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]])):
        counted = inputs_and_mask((), {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": mask})[1]
        assert counted.tolist() == [[False, True, True]] * 2


def test_only_what_is_called_a_mask_is_one():
    """The second argument of bert's forward is a mask, of others it may be anything."""
    model, input_ids = tiny_model("olmoe"), torch.randint(3, 64, (2, 4))
    plain = model.forward
    with torch.no_grad(), Recorder(model) as recorder:
        model.forward = lambda input_ids, _types, attention_mask=None: plain(input_ids, attention_mask)
        model(input_ids, torch.zeros(2, 4, dtype=torch.long))
        model(input_ids, torch.zeros(2, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
        model.forward = lambda *args: plain(*args)
        model(input_ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert np.bincount(recorder.trace().sequence_ids).tolist() == [4, 4, 3, 4, 2, 4]


def test_sequences_packed_into_one_row_are_refused():
    model, input_ids = tiny_model("olmoe"), torch.randint(3, 64, (1, 7))
    with torch.no_grad(), Recorder(model) as recorder:
        model(input_ids, cu_seq_lens_q=None)
        with pytest.raises(CoterieError, match=r"packed into one row \(cu_seq_lens_q\).*run one sequence a row"):
            model(input_ids, cu_seq_lens_q=torch.tensor([0, 3, 7]))
    assert recorder.trace().num_tokens == 7


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_static_caches_are_recorded_as_growing_ones(family):
    """They get masks of who sees whom as long as the whole cache; gpt_oss one for each kind of layer."""
    model = tiny_model(family)
    prompt, mask = torch.randint(3, 64, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    mask[1, :3] = mask[2, :1] = 0
    traces = []
    for cache in ("static", "dynamic"):
        with Recorder(model) as recorder:
            inputs = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
            model.generate(prompt, cache_implementation=cache, **inputs)
        traces.append(recorder.trace())
    assert traces[0].num_tokens == 11 + 9
    for name, array in traces[0].arrays().items():
        assert (array == traces[1].arrays()[name]).all()


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


def test_decoding_after_a_paused_prefill_is_of_new_sequences():
    model = tiny_model("olmoe")
    texts, others, more = (torch.randint(3, 64, (2, length)) for length in (8, 8, 1))
    with torch.no_grad(), Recorder(model) as recorder:
        model(texts, use_cache=True)
        with recorder.paused():
            cache = model(others, use_cache=True).past_key_values
        for _ in range(2):
            model(more, past_key_values=cache)
    trace = recorder.trace()
    assert trace.phase.tolist() == [PREFILL] * 16 + [DECODE] * 4
    assert trace.sequence_ids.tolist() == [0] * 8 + [1] * 8 + [2, 3] * 2


def test_decoding_of_an_earlier_batch_is_not_filed_under_the_last_one():
    model = tiny_model("olmoe")
    with torch.no_grad(), Recorder(model) as recorder:
        cache = model(torch.randint(3, 64, (2, 8)), use_cache=True).past_key_values
        model(torch.randint(3, 64, (2, 5)), use_cache=True)
        model(torch.randint(3, 64, (2, 1)), past_key_values=cache)
    assert not set(recorder.trace().sequence_ids[-2:].tolist()) & {2, 3}


def test_what_runs_between_two_blocks_is_not_gone_on_with():
    model = tiny_model("olmoe")
    texts, more = torch.randint(3, 64, (2, 8)), torch.randint(3, 64, (2, 1))
    recorder = Recorder(model)
    with torch.no_grad():
        with recorder:
            model(texts, use_cache=True)
        cache = model(texts.flip(1), use_cache=True).past_key_values
        with recorder:
            model(more, past_key_values=cache)
    assert recorder.trace().sequence_ids[-2:].tolist() == [2, 3]


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


def test_weights_are_those_that_the_experts_apply():
    model = tiny_model("qwen3_moe")
    seen = []
    for layer in find_moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda _module, args: seen.append(args[2]))
    with torch.no_grad(), Recorder(model, weights=True) as recorder:
        model(input_ids=torch.randint(3, 64, (2, 8)))
    expected = torch.stack(seen).to(torch.float16).numpy()
    assert (recorder.trace().topk_weights == expected).all()


def test_weights_that_a_family_does_not_announce_are_asked_for_in_vain():
    model = tiny_model("llama4_text")
    with torch.no_grad(), Recorder(model, weights=True), pytest.raises(CoterieError, match="does not announce"):
        model(input_ids=torch.randint(3, 64, (1, 4)))


def test_tokens_go_where_they_are_sent():
    model, passes = tiny_model("olmoe"), []
    with torch.no_grad(), Recorder(model, on_tokens=passes.append) as recorder:
        for _ in range(3):
            model(input_ids=torch.randint(3, 64, (2, 4)))
    assert [trace.num_tokens for trace in passes] == [8, 8, 8]
    with pytest.raises(CoterieError, match="no token was recorded"):
        recorder.trace()


def test_warm_up_is_left_out():
    model = tiny_model("olmoe")
    with torch.no_grad(), Recorder(model) as recorder:
        with recorder.paused():
            model(input_ids=torch.zeros(4, 16, dtype=torch.long))
        model(input_ids=torch.randint(3, 64, (1, 5)))
    assert recorder.trace().num_tokens == 5
    assert set(recorder.trace().sequence_ids.tolist()) == {0}


def test_rows_that_have_ended_are_left_out():
    """`generate` goes on feeding a row after its end while others are not done."""
    model = tiny_model("olmoe")
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        first = model(input_ids=prompt[:1]).logits[0, -1].argmax()
    model.generation_config.eos_token_id = int(first)
    model.generation_config.pad_token_id = int(first)
    with Recorder(model) as recorder:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6)
    assert (out[0, 3:] == first).all()
    assert (out[1, 3:5] != first).all(), "the second row must go on for the test to mean something"
    trace = recorder.trace()
    decoded = trace.sequence_ids[trace.phase == DECODE]
    assert 0 not in decoded
    assert 1 in decoded


@pytest.mark.parametrize("whole", [True, False])
def test_ends_that_only_generate_is_told(whole):
    model = tiny_model("olmoe")
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        first = int(model(input_ids=prompt[:1]).logits[0, -1].argmax())
    for ends, decoded in ((None, [0, 1]), ([first], [1])):
        with Recorder(model if whole else model.model, ends=ends) as recorder:
            options = {"eos_token_id": first, "pad_token_id": first, "max_new_tokens": 6}
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        trace = recorder.trace()
        assert sorted(set(trace.sequence_ids[trace.phase == DECODE].tolist())) == decoded


def test_a_router_that_gives_no_numbers_is_named():
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.fill_(float("nan"))
    recorder = Recorder(model)
    with torch.no_grad(), recorder, pytest.raises(CoterieError, match=r"layers\.1\..*no finite numbers"):
        model(input_ids=torch.randint(3, 64, (1, 4)))
    with pytest.raises(CoterieError, match="no token was recorded"):
        recorder.trace()


def test_a_layer_that_never_runs_is_named():
    model = tiny_model("olmoe")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    message = r"layers\.1\..*announced nothing, expected top-2 of 4 tokens: .* torch\.compile \(record without it\)"
    with torch.no_grad(), Recorder(model), pytest.raises(CoterieError, match=message):
        model(input_ids=torch.randint(3, 64, (1, 4)))


def test_a_layer_that_runs_twice_in_a_pass_is_named():
    model = tiny_model("olmoe")
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    with torch.no_grad(), Recorder(model), pytest.raises(CoterieError, match=r"layers\.0\..* ran twice in one pass"):
        model(input_ids=torch.randint(3, 64, (1, 4)), use_cache=False)


def test_an_encoder_and_a_decoder_are_recorded_apart():
    model = tiny_model("switch_transformers")
    with pytest.raises(CoterieError, match="record model.encoder or model.decoder"):
        Recorder(model)
    with torch.no_grad(), Recorder(model.encoder) as recorder:
        model(input_ids=torch.randint(3, 64, (2, 6)), decoder_input_ids=torch.randint(3, 64, (2, 3)))
    assert recorder.trace().num_tokens == 12
