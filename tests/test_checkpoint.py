"""Permuted checkpoints: the same logits, the same bytes after going back, and nothing left behind by mistakes."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_constraints_cli import one_model_at_a_time
from tiny_models import CONFIGS, tiny_model

from placement.cli.exports import verify
from placement.constraints.config import FILE_NAME
from placement.exporters import checkpoint, shards
from placement.exporters.checkpoint import MAP_FILE, permute_checkpoint
from placement.exporters.permutation import Renumbering, find_edits
from placement.exporters.shards import Edit, Tensor, read_header, rewrite
from placement.exporters.verify import compare
from placement.foreign import read_any_map
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler import zoo
from profiler.documents import read_documents
from profiler.errors import CoterieError
from profiler.families import read_spec
from profiler.loading import load_model
from profiler.spec import MoESpec

PROVED = [
    "afmoe",
    "aria_text",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "gemma4_text",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "lfm2_moe",
    "llama4_text",
    "mimo_v2_flash",
    "minimax_m2",
    "mixtral",
    "muse_spark_text",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe_text",
    "step3p5",
]
"""Families that stand for every way to lay experts and routers out."""
REFUSED = {
    "doge": "experts are nowhere",
    "inkling_text": "a router of shape \\[9, 32\\]",
    "longcat_flash": "the plan is for 8 experts",
    "switch_transformers": "in 2 stacks of layers",
    "zaya": "no other; this family",
}
TRIED = [family for family in CONFIGS if family not in REFUSED] if os.environ.get("COTERIE_TEST_ENGINES") else PROVED


def any_plan(spec: MoESpec, seed: int = 0) -> PlacementMap:
    """A random permutation of each layer that keeps the router's groups together."""
    rng, size = np.random.default_rng(seed), spec.num_experts // spec.num_groups
    rows = [
        np.concatenate([group * size + rng.permutation(size) for group in rng.permutation(spec.num_groups)])
        for _ in spec.layer_ids
    ]
    return PlacementMap(spec, Topology(1, 2, spec.num_experts // 2), np.stack(rows), {"name": "any"})


def save_tiny(family: str, folder: Path) -> tuple[torch.nn.Module, PlacementMap]:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are all ones else, which look alike in any order
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, max_shard_size="30KB")
    return model, any_plan(read_spec(model, family))


def tensors_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, whatever its type."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        data = path.read_bytes()[header.data_start :]
        out |= {tensor.name: data[tensor.start : tensor.end] for tensor in header.tensors}
    return out


@pytest.mark.parametrize("family", TRIED)
def test_logits_are_those_of_the_original(tmp_path, family):
    model, placement = save_tiny(family, tmp_path / "original")
    before = {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    assert {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()} == before
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def load(name: str) -> torch.nn.Module:
        return type(model).from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    comparison = compare(lambda: load("original"), lambda: load("planned"), placement, tokens)
    assert comparison.agrees(1e-6)
    assert comparison.same_selection == 1
    assert tensors_of(tmp_path / "planned") != tensors_of(tmp_path / "original")
    permute_checkpoint(tmp_path / "planned", tmp_path / "back", placement, invert=True)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "original")
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(before)
    again = read_any_map(tmp_path / "planned", placement.model)
    assert (again.physical_to_logical_map == placement.physical_to_logical_map).all()


@pytest.mark.parametrize("family", REFUSED)
def test_layouts_that_are_not_known_are_refused(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "original")
    placement = any_plan(read_spec(model, family))
    with pytest.raises(CoterieError, match=REFUSED[family]):
        permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize(
    ("name", "shape", "is_by_expert"),
    [
        ("experts.gate_up_proj", (8, 4, 6), True),
        ("experts.mlp.w1", (8 * 4, 6), True),
        ("experts.scale", (8,), True),
        ("experts.post_expert_norm.weight", (24,), False),
        ("experts.post_expert_norm.weight", (8,), False),
        ("experts.pre_norms.weight", (8, 24), True),
        ("experts.scale", (1,), False),
        ("experts.scale", (), False),
        ("experts.scale", (24,), None),
        ("experts.scale", (7,), None),
    ],
)
def test_which_packed_tensors_are_by_expert(name, shape, is_by_expert):
    tensors = [
        Tensor(f"layers.0.mlp.{rest}", "F32", of_shape, 0, 0)
        for rest, of_shape in (("experts.down_proj", (8, 6, 4)), ("gate.weight", (8, 6)), (name, shape))
    ]
    order = (1, 0, *range(2, 8))
    if is_by_expert is None:
        with pytest.raises(CoterieError, match=re.escape(f"{name}: shape {list(shape)} is not by expert (8 of them)")):
            find_edits(tensors, {0: Renumbering(order, order)}, 8, 1)
    else:
        *_, edit = find_edits(tensors, {0: Renumbering(order, order)}, 8, 1)
        assert edit == (Edit(tensors[-1].name, 0, order) if is_by_expert else Edit(tensors[-1].name))


def test_a_wrong_checkpoint_does_not_agree(tmp_path):
    model, placement = save_tiny("olmoe", tmp_path / "original")
    permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    other = any_plan(placement.model, seed=1)

    def load(name: str) -> torch.nn.Module:
        return type(model).from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    tokens = torch.arange(40)[None]
    assert compare(lambda: load("original"), lambda: load("planned"), other, tokens).same_selection < 0.9
    path = next(path for path in (tmp_path / "planned").glob("*.safetensors") if ".gate.weight" in str(load_file(path)))
    arrays = load_file(path)
    name = next(name for name in arrays if name.endswith("mlp.gate.weight"))
    save_file({**arrays, name: np.ascontiguousarray(arrays[name][::-1])}, path, {"format": "pt"})
    assert not compare(lambda: load("original"), lambda: load("planned"), placement, tokens).agrees(1e-4)


def test_groups_are_kept_or_refused(tmp_path):
    _, placement = save_tiny("deepseek_v3", tmp_path / "original")
    assert placement.model.num_groups == 2
    rows = placement.physical_to_logical_map.copy()
    rows[1, [0, -1]] = rows[1, [-1, 0]]
    mixed = replace(placement, physical_to_logical_map=rows)
    for plan in (mixed, replace(mixed, model=replace(mixed.model, num_groups=1))):  # the config says it too
        with pytest.raises(CoterieError, match="layer 2: the plan mixes the router's 2 groups.*--preserve-groups"):
            permute_checkpoint(tmp_path / "original", tmp_path / "planned", plan)
    assert checkpoint._groups({"n_group": 8, "topk_group": 4}, 1) == 8
    assert checkpoint._groups({"n_group": 1, "topk_group": 1}, 1) == 1
    assert checkpoint._groups({"n_group": 8, "topk_group": 3, "topk_method": "greedy"}, 1) == 1


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    _, placement = save_tiny("qwen3_moe", tmp_path / "original")
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    (tmp_path / "original" / "pytorch_model.bin").write_text("old weights")
    (tmp_path / "original" / "sub").mkdir()
    (tmp_path / "planned").mkdir()  # an empty folder may be there
    done = []
    permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement, on_bytes=lambda *pair: done.append(pair))
    names = {path.name for path in (tmp_path / "planned").iterdir()}
    shards_ = {path.name for path in (tmp_path / "original").glob("*.safetensors")}
    assert len(shards_) > 3
    assert names == shards_ | {"config.json", "generation_config.json", "tokenizer.json", MAP_FILE, checkpoint.INDEX}
    assert done[-1][0] == done[-1][1]
    index = json.loads((tmp_path / "planned" / checkpoint.INDEX).read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / "planned" / file, "np") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)


def test_tied_weights_and_links_to_a_cache_are_followed(tmp_path):
    """As the hub's client lays a snapshot out: links to blobs; the output layer is the embedding's, and not saved."""
    model = tiny_model("olmoe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "blobs")
    assert not any("lm_head" in name for name in load_file(tmp_path / "blobs" / "model.safetensors"))
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    placement = any_plan(read_spec(model, "olmoe"))
    permute_checkpoint(tmp_path / "snapshot", tmp_path / "planned", placement)
    assert not any(path.is_symlink() for path in (tmp_path / "planned").iterdir())

    def load(name: str) -> torch.nn.Module:
        return type(model).from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    comparison = compare(lambda: load("snapshot"), lambda: load("planned"), placement, torch.arange(3, 43)[None])
    assert comparison.agrees(1e-6)
    assert comparison.same_selection == 1


def test_mtp_layers_stay_as_they_are(tmp_path):
    _, placement = save_tiny("deepseek_v3", tmp_path / "original")
    shard = sorted((tmp_path / "original").glob("*.safetensors"))[0]
    drafts = {f"model.layers.3.mlp.experts.{expert}.up_proj.weight": np.full(2, expert) for expert in range(8)}
    drafts |= {f"mtp.layers.1.mlp.experts.{expert}.up_proj.weight": np.full(2, expert) for expert in range(8)}
    save_file({**load_file(shard), **drafts}, shard)
    (tmp_path / "original" / checkpoint.INDEX).unlink()
    permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    arrays = load_file(tmp_path / "planned" / shard.name)
    assert all((arrays[name] == drafts[name]).all() for name in drafts)


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-3])


def drop_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def drop_a_shard_and_index(folder: Path) -> None:
    drop_a_shard(folder)
    (folder / checkpoint.INDEX).unlink()


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def garbage(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\x20\0\0\0\0\0\0\0" + b"x" * 40)


def another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))


def odd_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_group": "two"}))


def named_experts(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = {"ignore": ["model.layers.0.mlp.experts.3.up_proj"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "truncated"),
        (drop_a_shard, "1 of 8 shards are missing"),
        (drop_a_shard_and_index, "7 of 8 shards are there"),
        (no_weights, "no .safetensors files"),
        (no_config, "no such file"),
        (garbage, "not a safetensors file"),
        (another_model, "is a mixtral"),
        (odd_config, "n_group is 'two'"),
        (named_experts, "quantisation in its config.json names single experts"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_broken_checkpoints_leave_nothing(tmp_path, harm, message):
    _, placement = save_tiny("olmoe", tmp_path / "original")
    harm(tmp_path / "original")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CoterieError, match=message):
        permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["config.json", *checkpoint.QUANTIZATION_FILES])
def test_quantisation_that_names_single_experts_is_refused(tmp_path, file):
    _, placement = save_tiny("olmoe", tmp_path / "original")
    path = tmp_path / "original" / file
    config = json.loads(path.read_text()) if path.exists() else {}
    names = {
        r"+:.*experts\.3\..*": True,
        "lm_head.experts.[37]": True,
        r".*experts\.(?:3|7)\.up_proj": True,
        "model.layers.0.mlp.experts.0": True,
        r".*experts\.\d+\..*": False,
        r".*experts\.[0-9]+\..*": False,
        "model.layers.0.mlp.experts.*": False,
        "num_experts": False,
    }
    for number, (name, refused) in enumerate(names.items()):
        path.write_text(json.dumps({**config, "quantization_config": {"bits": 4, "dynamic": {name: 8}}}))
        out = tmp_path / str(number)
        if refused:
            with pytest.raises(CoterieError, match=f"in its {file} names single experts, .*; give the checkpoint"):
                permute_checkpoint(tmp_path / "original", out, placement)
        else:
            permute_checkpoint(tmp_path / "original", out, placement)
        assert out.exists() != refused


def test_a_full_disk_half_way_leaves_nothing(tmp_path, monkeypatch):
    _, placement = save_tiny("olmoe", tmp_path / "original")
    (tmp_path / ".planned.partial").mkdir()  # of a run that was killed
    calls = iter(range(100))

    def full(*arguments):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rewrite(*arguments)

    monkeypatch.setattr(checkpoint, "rewrite", full)
    with pytest.raises(CoterieError, match="No space left on device.*free some space"):
        permute_checkpoint(tmp_path / "original", tmp_path / "planned", placement)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_places_and_states_that_are_refused(tmp_path):
    _, placement = save_tiny("olmoe", tmp_path / "original")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "some").touch()
    source = tmp_path / "original"

    def refused(message, target="planned", source=source, plan=placement, **options):
        with pytest.raises(CoterieError, match=message):
            permute_checkpoint(source, tmp_path / target, plan, **options)

    refused("not an empty folder", "full")
    refused("not an empty folder", "original")
    refused("inside the checkpoint", "original/sub")
    refused("no writable folder", "full/some/planned")
    spec = placement.model
    redundant = np.concatenate([placement.physical_to_logical_map, placement.physical_to_logical_map], axis=1)
    refused("the other 8", plan=PlacementMap(spec, Topology(1, 2, 8), redundant, {"name": "x"}))
    refused("no layer 1", plan=PlacementMap.linear(replace(spec, layer_ids=(0,)), Topology(1, 2, 4)))
    refused(
        "layer 2: no experts",
        plan=PlacementMap.linear(replace(spec, layer_ids=(0, 1, 2), num_hidden_layers=0), Topology(1, 2, 4)),
    )
    refused("the plan is for 4", plan=PlacementMap.linear(replace(spec, num_experts=4), Topology(1, 2, 2)))
    refused("a row for each of 16", plan=PlacementMap.linear(replace(spec, num_experts=16), Topology(1, 2, 8)))
    refused("both 8", plan=replace(placement, model=replace(spec, hidden_size=8)))
    refused("has no coterie-placement.json", invert=True)
    (source / FILE_NAME).touch()
    refused(
        "in its constraint.safetensors would be old ones; move that file away, and constrain the exported model anew"
    )
    (source / FILE_NAME).unlink()
    permute_checkpoint(source, tmp_path / "planned", placement)
    refused("is permuted already", "again", tmp_path / "planned")
    refused("permuted by another plan", "again", tmp_path / "planned", any_plan(spec, seed=1), invert=True)
    larger = PlacementMap.linear(replace(spec, num_experts=16), Topology(1, 2, 8))
    refused("permuted by another plan", "again", tmp_path / "planned", larger, invert=True)


def test_verifying_holds_one_model_at_a_time(tmp_path, monkeypatch):
    slots = np.tile(np.arange(zoo.NUM_EXPERTS)[::-1], (4, 1))
    spec = read_spec(load_model(None, "cpu").model, zoo.NAME)
    permute_checkpoint(zoo.MODEL, tmp_path / "planned", PlacementMap(spec, Topology(1, 2, 32), slots, {"name": "x"}))
    one_model_at_a_time(monkeypatch)
    for data in (None, [str(zoo.HELD_OUT)]):
        verify(zoo.MODEL, tmp_path / "planned", data, num_tokens=20, device="cpu")


def test_verifying_takes_as_many_texts_as_it_needs(tmp_path, capsys):
    loaded = load_model(None, "cpu")
    spec = read_spec(loaded.model, zoo.NAME)
    permute_checkpoint(zoo.MODEL, tmp_path / "planned", PlacementMap.linear(spec, Topology(1, 2, 32)))
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"a few words of text {name}")
    held = loaded.batches(read_documents([str(tmp_path / "texts")]), 1000, 1).num_tokens
    one = loaded.batches(read_documents([str(tmp_path / "texts" / "one.txt")]), 1000, 1).num_tokens
    for asked, compared in ((one + 2, one + 2), (1000, held)):
        verify(zoo.MODEL, tmp_path / "planned", [str(tmp_path / "texts")], asked, device="cpu", as_json=True)
        assert json.loads(capsys.readouterr().out)["tokens"] == compared


@settings(max_examples=30)
@given(
    data=st.data(),
    outer=st.integers(1, 3),
    num_experts=st.integers(1, 6),
    inner=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 10**6]),
)
def test_rewriting_is_what_numpy_does(tmp_path_factory, data, outer, num_experts, inner, chunk):
    folder = tmp_path_factory.mktemp("shard")
    order = tuple(data.draw(st.permutations(range(num_experts))))
    rows = np.random.default_rng(0).normal(size=(outer, num_experts, inner)).astype(np.float16)
    ids = np.random.default_rng(1).integers(0, num_experts, (4, 2))
    same = np.arange(5, dtype=np.float32)
    save_file({"rows": rows, "ids": ids, "same": same}, folder / "a", {"format": "pt"})
    edits = {"rows": Edit("new", 1, order), "ids": Edit("ids", new_id=order), "same": Edit("same")}
    written = []
    names = [tensor.name for tensor in read_header(folder / "a").tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK", chunk)
        rewrite(folder / "a", folder / "b", [edits[name] for name in names], written.append)
    arrays = load_file(folder / "b")
    assert (arrays["new"] == rows[:, list(order)]).all()
    assert (arrays["ids"] == np.array(order)[ids]).all()
    assert (arrays["same"] == same).all()
    assert max(written) <= max(chunk, ids.nbytes)
    with safe_open(folder / "b", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        {"dtype": 32, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        [],
    ],
)
def test_headers_that_do_not_add_up_are_refused(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CoterieError, match="not a safetensors file"):
        read_header(tmp_path / "a")


def test_ids_and_rows_that_do_not_fit_are_refused(tmp_path):
    save_file({"ids": np.array([0, 1, 5])}, tmp_path / "a")
    with pytest.raises(CoterieError, match="ids: expert 5, must be below 3"):
        rewrite(tmp_path / "a", tmp_path / "b", [Edit("ids", new_id=(2, 0, 1))], lambda _: None)
    text = json.dumps({"half": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + bytes(3))
    with pytest.raises(CoterieError, match="are no whole bytes"):
        rewrite(tmp_path / "c", tmp_path / "d", [Edit("half", 0, (1, 0))], lambda _: None)


def test_memory_is_bounded(tmp_path):
    """A tensor of many chunks is copied without being held: peak Python memory stays near one chunk's size."""
    import tracemalloc

    rows = np.zeros((4, 16, 2**19), dtype=np.float16)  # 64 MiB
    save_file({"rows": rows}, tmp_path / "a")
    del rows
    tracemalloc.start()
    rewrite(tmp_path / "a", tmp_path / "b", [Edit("rows", 0, (3, 1, 2, 0))], lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * shards.CHUNK
