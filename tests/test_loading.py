"""Models load on one device or spread over several, and see the same tokens either way."""

import contextlib
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import CONFIGS

from profiler import CoterieError, zoo
from profiler.documents import Document, read_documents
from profiler.importers.known import Known
from profiler.loading import load_model, read_shape
from profiler.profile import Profile
from profiler.profiling import profile_model

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def folder(request, tmp_path_factory):
    """A tiny random model with the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(zoo.MODEL)
    tiny_model(request.param, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def spread(embeddings, first, second):
    """A map for a machine without accelerators: host memory and the disk."""
    rest = dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return {"model.embed_tokens": embeddings, "model.layers.0": first, "model.layers.1": second, **rest}


def test_a_model_that_lacks_weights_is_refused(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    with safe_open(broken / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CoterieError, match=r"lacks 1 of the model.s weights, such as model.norm.weight, .*; download"):
        load_model(str(broken), "cpu")


@pytest.mark.parametrize("device_map", ["auto", spread("cpu", "cpu", "disk"), spread("disk", "disk", "cpu")])
def test_a_spread_model_routes_as_one_on_a_single_device(folder, device_map, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    documents = read_documents([zoo.CALIBRATION])
    runs, sizes = tmp_path_factory.mktemp("runs"), {"max_tokens": 200, "batch_size": 2, "sequence_length": 32}
    profile_model(load_model(folder, "cpu"), documents, runs / "whole", **sizes)
    loaded = load_model(folder, device_map=device_map, dtype="float32")
    assert loaded.input_device == torch.device("cpu")
    offloaded = any(parameter.is_meta for parameter in loaded.model.parameters())
    assert offloaded == (device_map != "auto")
    profile_model(loaded, documents, runs / "spread", **sizes)
    expected, spread_out = (Profile.load_from(runs / name) for name in ("whole", "spread"))
    assert spread_out.model == expected.model
    assert np.array_equal(spread_out.tokens.topk_ids, expected.tokens.topk_ids)
    assert list(tmp_path.iterdir())
    del loaded
    gc.collect()
    assert not list(tmp_path.iterdir())  # offloaded weights go with the model


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, "float32"), ("auto", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
def test_dtypes(asked, expected):
    assert str(load_model(None, "cpu", dtype=asked).model.dtype) == f"torch.{expected}"


def test_the_cpu_is_known_by_its_number_too():
    assert load_model(None, "cpu:0").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"device_map": "everywhere"}, "device map 'everywhere': must be one of auto"),
        ({"device_map": {"model": "disk"}}, "cannot be loaded"),
        ({"dtype": "int3"}, "dtype 'int3': must be one of auto"),
        ({"device": "toaster"}, "device 'toaster': cannot be used"),
        ({"device": "meta"}, "device 'meta': holds no weights"),
    ],
)
def test_odd_options_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CoterieError, match=message):
        load_model(None, **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny random vision-language model with the embedded model's tokenizer."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLMoeConfig

    path = tmp_path_factory.mktemp("vision")
    tokenizer = AutoTokenizer.from_pretrained(zoo.MODEL)
    text = {**CONFIGS["qwen3_vl_moe_text"], "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    image = {"depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**image, "deepstack_visual_indexes": [0]})
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("decode_tokens", [0, 2])
def test_a_recording_keeps_no_graph(tmp_path, decode_tokens):
    """Of every pass it would take several times the memory."""
    loaded, graded = load_model(None), []
    loaded.model.register_forward_pre_hook(lambda *_: graded.append(torch.is_grad_enabled()))
    profile_model(
        loaded, read_documents([zoo.CALIBRATION]), tmp_path / "run", max_tokens=64, decode_tokens=decode_tokens
    )
    assert graded
    assert not any(graded)


def test_the_text_model_of_a_vision_language_model_is_recorded(vision, tmp_path):
    loaded = load_model(vision, "cpu")
    sizes = {"max_tokens": 100, "batch_size": 2, "sequence_length": 32}
    stored = profile_model(loaded, read_documents([zoo.CALIBRATION]), tmp_path / "run", decode_tokens=2, **sizes)
    assert (stored.model.layer_ids, stored.model.num_experts, stored.model.top_k) == ((0, 1), 8, 2)
    assert stored.num_tokens > 100
    assert read_shape(vision) == stored.model


def test_models_that_are_not_loaded_here_are_named(tmp_path):
    tiny_model("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(CoterieError, match=r"SwitchTransformersConfig is not loaded here; .*profiler\.Recorder"):
        load_model(str(tmp_path), "cpu", with_tokenizer=False)
    assert read_shape(str(tmp_path)).layer_ids == (1, 3)


def test_hidden_layers_are_those_of_the_model(tmp_path):
    """longcat_flash's config counts each of its layers twice."""
    tiny_model("longcat_flash").config.save_pretrained(tmp_path)
    known = Known.of_model(str(tmp_path))
    assert (known.num_hidden_layers, known.layer_ids) == (2, (0, 1))


@pytest.mark.parametrize("method", ["mxfp4", "fp8", None])
def test_weights_whose_kernels_pass_hooks_by_are_unpacked(method, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = tiny_model("gpt_oss")
    model.config.save_pretrained(tmp_path)
    if method:
        config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    given = []
    found = (model, {"missing_keys": set()})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **options: given.append(options) or found)
    load_model(str(tmp_path), "cpu", with_tokenizer=False)
    quantization = given[0].get("quantization_config")
    assert quantization.dequantize if method == "mxfp4" else quantization is None


def test_a_folder_goes_by_its_own_name_wherever_one_stands(tmp_path, monkeypatch):
    tiny_model("olmoe").save_pretrained(tmp_path / "models" / "tiny")
    (tmp_path / "mine").symlink_to(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "models" / "tiny")
    for path, name in ((".", "tiny"), ("../tiny/.", "tiny"), ("../../mine/", "mine")):
        assert load_model(path, "cpu", with_tokenizer=False).name == name
        assert read_shape(path).name == name


def test_a_model_that_is_larger_than_the_device_can_be_spread(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee more.")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(CoterieError, match=r"'cuda': lacks memory for the model \(.* GiB.\); .* --device-map auto"):
        load_model(None, "cuda")


def test_batches_can_be_iterated_again_and_from_the_middle():
    loaded = load_model(None, "cpu")
    batches = loaded.batches(read_documents([zoo.CALIBRATION]), 32, 4, 2_000)
    first, second = list(batches), list(batches)
    assert all(torch.equal(one.input_ids, two.input_ids) for one, two in zip(first, second, strict=True))
    assert batches.num_tokens == 2_000
    assert len(list(batches.start_at(5))) == batches.num_batches - 5
    assert list(batches.start_at(batches.num_batches)) == []


def test_tokenizers_that_are_not_the_models():
    loaded = load_model(None, "cpu")
    loaded.model.config.vocab_size = 20
    with pytest.raises(CoterieError, match=r"its tokenizer gives token \d+, the vocabulary has 20"):
        _ = loaded.batches([Document.of("a", "some text")], 32, 4).num_tokens
    with pytest.raises(CoterieError, match="must be at least 1"):
        loaded.batches([Document.of("a", "some text")], 0, 4)


def test_a_real_tokenizers_chat_template():
    loaded = load_model(None, "cpu")
    documents = [Document.of("a", CHAT)]
    with pytest.raises(CoterieError, match="no chat template"):
        next(iter(loaded.batches(documents, 32, 4)))
    loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (batch,) = loaded.batches(documents, 32, 4)
    assert loaded.tokenizer.decode(batch.input_ids[0]) == "<user>hi<assistant>ho"
    (batch,) = loaded.batches([Document.of("a", "yes")], 32, 4, as_chat=True)
    assert loaded.tokenizer.decode(batch.input_ids[0]) == "<user>yes"
    loaded.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(CoterieError, match=r"refuses it \(never\)"):
        next(iter(loaded.batches(documents, 32, 4)))


@pytest.mark.parametrize("model_type", ["own_moe", "olmoe"])
def test_code_in_a_model_folder_is_never_run(model_type, tmp_path, monkeypatch):
    """Neither asked for: transformers would ask on the terminal."""
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    config |= {"model_type": model_type, "auto_map": classes}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    (tmp_path / "model" / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'was-run')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    for load in (load_model, read_shape):
        with contextlib.suppress(CoterieError):
            load(str(tmp_path / "model"))
    assert not (tmp_path / "was-run").exists()
