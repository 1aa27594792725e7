"""What is recorded of every MoE family is what its experts really ran on, and every family is described by its weights.

The oracle knows nothing of routers: it overwrites one expert's output weights in a layer, runs that layer again on the
same input, and sees which tokens come out different.  Those are the tokens that the expert works on.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CONFIGS, tiny_model
from torch import nn
from transformers import AutoConfig
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from profiler import CoterieError, Recorder
from profiler.families import FAMILIES, find_moe_layers, packed_shape, read_spec

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"

EAGER_ONLY = ("dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash", "step3p5", "switch_transformers")
"""Families whose experts have one implementation, which `set_experts_implementation` leaves alone."""

CASES = [(family, "eager") for family in CONFIGS] + [(f, "grouped_mm") for f in CONFIGS if f not in EAGER_ONLY]

DENSE_FIRST = {"layer_ids": (1, 2)}
GROUPS = {"num_groups": 2}
SPECS = {
    "afmoe": DENSE_FIRST,
    "axk1": DENSE_FIRST | GROUPS,
    "axk2": DENSE_FIRST | GROUPS,
    "bailing_hybrid": GROUPS,
    "beam": DENSE_FIRST | GROUPS,
    "deepseek_ocr2_text": DENSE_FIRST | GROUPS,
    "deepseek_v2": DENSE_FIRST | GROUPS,
    "deepseek_v3": DENSE_FIRST | GROUPS,
    "deepseek_v32": DENSE_FIRST | GROUPS,
    "doge": {"num_experts": 16, "expert_size": 1},
    "dots1": DENSE_FIRST | GROUPS,
    "dots3_note_text": DENSE_FIRST | GROUPS,
    "ernie4_5_moe": DENSE_FIRST,
    "ernie4_5_vl_moe_text": DENSE_FIRST,
    "exaone_moe": DENSE_FIRST | GROUPS,
    "flint": {"layer_ids": (2,)},
    "glm4_moe": DENSE_FIRST | GROUPS,
    "glm4_moe_lite": DENSE_FIRST | GROUPS,
    "glm4v_moe_text": DENSE_FIRST | GROUPS,
    "glm5_next_text": DENSE_FIRST | GROUPS,
    "glm_moe_dsa": DENSE_FIRST | GROUPS,
    "hy_v3": DENSE_FIRST,
    "jamba": {"layer_ids": (1, 3)},
    "kimi_linear": DENSE_FIRST | GROUPS,
    "laguna": DENSE_FIRST,
    "lfm2_moe": DENSE_FIRST,
    "llama4_text": {"layer_ids": (1, 3)},
    "mimo_v2_flash": DENSE_FIRST | GROUPS,
    "mistral4": DENSE_FIRST | GROUPS,
    "mistral_large4_text": DENSE_FIRST | GROUPS,
    "muse_spark_text": {"hidden_size": 24},
    "nemotron_h": {"layer_ids": (1, 3), "hidden_size": 24} | GROUPS,
    "solar_open": GROUPS,
    "step3p5": DENSE_FIRST,
    "switch_transformers": {"layer_ids": (1, 3), "top_k": 1},
    "unlimited_ocr_text": DENSE_FIRST | GROUPS,
    "zaya": {"top_k": 1},
}
"""What differs from the fields of `test_spec`."""


def run(model, layers):
    """One forward pass: each layer's `Selection`, and each layer's block with the arguments that it got."""
    selections, blocks = {}, {}
    handles = []
    for layer in layers:
        experts = next(name for name, module in model.named_modules() if module is layer.experts)
        block = model.get_submodule(experts.rpartition(".")[0])

        def announce(module, args, kwargs, output, layer=layer):
            assert layer.layer_id not in selections, "a layer is called once in a forward pass"
            selections[layer.layer_id] = layer.read(args, kwargs, output)

        def keep(module, args, kwargs, layer=layer):
            blocks[layer.layer_id] = module, args, kwargs

        handles.append(layer.hooked.register_forward_hook(announce, with_kwargs=True))
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    input_ids = torch.randint(3, 64, (2, 12))
    decoder = {"decoder_input_ids": input_ids[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False, **decoder)
    for handle in handles:
        handle.remove()
    return selections, blocks


@contextmanager
def overwritten(experts, expert, num_experts):
    """Give one expert other output weights, which no other expert and no shared one uses."""
    weights = dict(experts.named_parameters())
    if f"expert_{expert}.wo.weight" in weights:  # a module for each expert
        weight = weights[f"expert_{expert}.wo.weight"]
    else:
        names = ("mlp.w2", "output_linear.weight", "up_embed.weight", "down_proj")
        packed = next(weights[name] for name in names if name in weights)
        weight = packed.view(num_experts, -1)[expert]
    with torch.no_grad():
        before = weight.clone()
        weight.normal_()
        yield
        weight.copy_(before)


def output_of(block, args, kwargs, num_tokens):
    with torch.no_grad():
        output = block(*args, **kwargs)
    return (output[0] if isinstance(output, tuple) else output).reshape(num_tokens, -1)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_recorded_experts_are_those_that_change_a_token(family, implementation):
    model = tiny_model(family)
    if family in EAGER_ONLY:
        assert not model._can_set_experts_implementation()
    else:
        model.set_experts_implementation(implementation)
    layers, spec = find_moe_layers(model), read_spec(model, family)
    selections, blocks = run(model, layers)
    for layer in layers:
        if family not in EAGER_ONLY:
            assert layer.experts.config._experts_implementation == implementation
        selection = selections[layer.layer_id]
        ids = selection.ids
        assert (ids.dtype, ids.ndim, ids.shape[-1]) == (torch.int64, 2, spec.top_k)
        assert set(ids.unique().tolist()) <= {-1, *range(spec.num_experts)}
        assert selection.weights is None or (
            selection.weights.shape == ids.shape and selection.weights.is_floating_point()
        )
        assert len(ids[ids >= 0].unique()) > spec.top_k  # the router really chooses
        block, args, kwargs = blocks[layer.layer_id]
        plain = output_of(block, args, kwargs, len(ids))
        for expert in range(spec.num_experts):
            with overwritten(layer.experts, expert, spec.num_experts):
                changed = (output_of(block, args, kwargs, len(ids)) != plain).any(dim=1)
            assert torch.equal(changed, (ids == expert).any(dim=1)), (layer.name, expert)


@pytest.mark.parametrize("family", CONFIGS)
def test_spec(family):
    expected = {
        "name": "tiny",
        "model_type": family,
        "layer_ids": (0, 1),
        "num_experts": 8,
        "top_k": 2,
        "num_groups": 1,
        "hidden_size": 32,
        "expert_size": 16,
        "dtype": "float32",
        # of the decoder layers as they are, which longcat_flash's config counts twice and others name otherwise
        "num_hidden_layers": {"dbrx": 2, "longcat_flash": 2, "nemotron_h": 4, "switch_transformers": 4}.get(
            family, CONFIGS[family].get("num_hidden_layers")
        ),
    }
    assert read_spec(tiny_model(family), "tiny").to_json() == expected | SPECS.get(family, {})


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "dbrx", "doge", "jetmoe", "llama4_text", "switch_transformers"])
def test_spec_of_weights_that_are_elsewhere(family):
    model = tiny_model(family)
    assert read_spec(model.to("meta"), "tiny") == read_spec(tiny_model(family), "tiny")


def test_zero_skipped_and_dropped_picks_are_no_expert():
    for family in ("longcat_flash", "switch_transformers", "zaya"):
        model = tiny_model(family)
        selections, _ = run(model, find_moe_layers(model))
        ids = torch.cat([selection.ids.flatten() for selection in selections.values()])
        assert ids.min() == -1, family


def test_recorded_weights_of_jetmoe_belong_to_their_experts():
    """The one family whose weights are recorded in another order than they are announced in."""
    model = tiny_model("jetmoe")
    layer = find_moe_layers(model)[0]
    logits = []
    layer.hooked.register_forward_hook(lambda _module, _args, output: logits.append(output[-1]))
    selection = run(model, [layer])[0][layer.layer_id]
    chosen = logits[0].gather(1, selection.ids)
    assert torch.equal(selection.weights, chosen.softmax(dim=1))


@pytest.mark.parametrize("family", ["longcat_flash", "llama4_text", "jetmoe", "doge", "nemotron_h", "gemma4_text"])
def test_recorder_keeps_what_the_layers_announce(family):
    model = tiny_model(family)
    with Recorder(model) as recorder:
        selections, _ = run(model, find_moe_layers(model))
    ids = torch.stack([selection.ids for selection in selections.values()])
    assert (recorder.trace().topk_ids == ids.numpy().astype("uint8")).all()  # no expert, -1, becomes all ones


def test_second_stack_is_numbered_on():
    """One layer in two of each stack of 4 has experts; the decoder's numbers start where the encoder's end."""
    sizes = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    layers = find_moe_layers(tiny_model("switch_transformers", **sizes))
    assert [layer.layer_id for layer in layers] == [1, 3, 5, 7]
    assert [layer.name.split(".")[0] for layer in layers] == ["encoder", "encoder", "decoder", "decoder"]


def test_documented_example_works(monkeypatch):
    """docs/families.md registers a made-up family; what it records is checked as for all others."""
    monkeypatch.setattr("profiler.families.FAMILIES", dict(FAMILIES))
    example = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(example[1], names)
    model, spec = names["model"], names["recorder"].spec
    assert (spec.model_type, spec.layer_ids, spec.num_experts, spec.top_k) == ("TinyModel", (0, 1), 8, 2)
    assert (spec.hidden_size, spec.expert_size, spec.num_groups, spec.dtype) == (32, 16, 1, "float32")
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad(), Recorder(model) as recorder:
        model(torch.randint(64, (2, 6)))
    for layer, hidden, ids in zip(model.layers, tuple(inputs), recorder.trace().topk_ids, strict=True):
        plain = output_of(layer, (hidden,), {}, 12)
        for expert in range(8):
            with overwritten(layer, expert, 8):
                changed = (output_of(layer, (hidden,), {}, 12) != plain).any(dim=1)
            assert changed.tolist() == (ids == expert).any(axis=1).tolist()


class Experts(nn.Module):
    """An experts module as transformers writes them, with weights of any shape."""

    def __init__(self, num_experts=4, top_k=2, down="down_proj"):
        super().__init__()
        self.top_k = top_k
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 6, 8))
        setattr(self, down, nn.Parameter(torch.zeros(num_experts, 8, 3)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


def test_sizes_of_experts_of_4_bits():
    """Two values a byte along the dimension that is summed over."""
    sizes = {"num_local_experts": 8, "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128}
    with torch.device("meta"):
        for dtype in ("fp4", "fp8"):
            config = AutoConfig.for_model("minimax_m2", **sizes)
            assert packed_shape(FP8Experts(config, expert_dtype=dtype)) == (8, 256, 128)
        assert packed_shape(Mxfp4GptOssExperts(AutoConfig.for_model("gpt_oss", **sizes))) == (8, 256, 128)


def test_weights_that_do_not_fit_each_other_are_refused():
    experts = Experts()
    experts.down_proj = nn.Parameter(torch.zeros(4, 7, 5))
    with pytest.raises(CoterieError, match="^Experts keeps its experts in a way.*register_family"):
        packed_shape(experts)


@pytest.mark.parametrize("other", [{"num_experts": 8}, {"top_k": 1}])
def test_layers_of_different_sizes_are_refused(other):
    with pytest.raises(CoterieError, match=r"tiny: .* are \(4, 8, 3, 2, 1\) in 0 and .* in 1: .* alike"):
        read_spec(nn.Sequential(Experts(), Experts(**other)), "tiny")


@pytest.mark.parametrize(
    ("wrapper", "first"),
    [
        ("Qwen3VLMoeForConditionalGeneration", "model.language_model.layers.0.mlp.experts"),
        ("Ernie4_5_VLMoeForConditionalGeneration", "model.language_model.layers.1.mlp.text_moe.experts"),
    ],
)
def test_text_model_inside_a_vision_language_model(wrapper, first):
    cls = getattr(transformers, wrapper)
    with torch.device("meta"):
        model = cls(cls.config_class())
    layers, text = find_moe_layers(model), model.config.get_text_config()
    assert layers[0].name == first
    assert layers[-1].layer_id == text.num_hidden_layers - 1
    assert read_spec(model, "full size").hidden_size == text.hidden_size


def test_nllb_moe_is_refused():
    """transformers 5.23 takes its mask for expert ids, so that only experts 0 and 1 ever run."""
    config = transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=8, encoder_sparse_step=2, decoder_sparse_step=2,
    )  # fmt: skip
    model = transformers.NllbMoeModel(config).eval()
    with pytest.raises(CoterieError, match="^NllbMoeModel has no MoE layers that coterie knows.*NllbMoeExperts"):
        find_moe_layers(model)
    ran = set()
    for name, module in model.named_modules():
        if re.search(r"expert_\d$", name):
            module.register_forward_hook(lambda _module, _args, _output, name=name: ran.add(name[-1]))
    input_ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        model(input_ids=input_ids, decoder_input_ids=input_ids)
    assert ran == {"0", "1"}


def test_two_sets_of_experts_in_a_layer_are_refused():
    with pytest.raises(CoterieError, match="0.first and 0.second are two sets of experts in one layer"):
        find_moe_layers(nn.Sequential(nn.ModuleDict({"first": Experts(), "second": Experts()})))


def test_unknown_layouts_and_models_point_to_register_family():
    with pytest.raises(CoterieError, match="^Experts keeps its experts in a way.*register_family"):
        read_spec(nn.Sequential(Experts(down="out")), "tiny")
    with pytest.raises(CoterieError, match="^Sequential has no MoE layers.*register_family.*seen: Sequential"):
        find_moe_layers(nn.Sequential(nn.Linear(2, 2)))


def test_document_lists_exactly_the_proved_families():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(family, implementation) for family, cell in rows for implementation in cell.split(", ")] == [
        (family, implementation)
        for family in sorted(CONFIGS)
        for implementation in ("eager", "grouped_mm")
        if (family, implementation) in CASES
    ]
