"""Recordings that are broken, foreign or harmful are refused in one line, and nothing is left behind."""

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st
from made_recordings import (
    EXTEND,
    encode_int32,
    encode_npy,
    fresh,
    imported,
    megatron_lines,
    save_sglang,
    sglang_record,
)
from safetensors.numpy import save_file

import profiler.files
from profiler import CoterieError, Profile
from profiler.importers.known import Known
from profiler.importers.megatron import read_megatron
from profiler.importers.recording import write_recording
from profiler.importers.sglang import read_sglang
from profiler.importers.tensorrt_llm import read_tensorrt_llm
from profiler.importers.vllm import read_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


class Harmful:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_valid(engine: str, here: Path) -> tuple[Path, object]:
    """A recording of each engine, and the function that reads it."""
    ids = random_ids(0, 2, 30, 8, 2)
    known = Known(num_experts=8, top_k=2)
    slots = np.tile(np.arange(8), (2, 1))
    if engine in ("per_token", "per_pass"):
        record = sglang_record(1, 0, ids.astype(np.int64), range(30), EXTEND, [30], num_slots=8)
        if engine == "per_pass":
            record = {key: record[key] for key in ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")}
        path = save_sglang(here / "r.pt", [record], slots)
        return path, lambda: read_sglang([path], known)
    if engine == "stat":
        counts = np.stack([np.bincount(row.ravel(), minlength=8) for row in ids])[None].astype(np.int32)
        torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, here / "r.pt")
        return here / "r.pt", lambda: read_sglang([here / "r.pt"], known)
    if engine == "vllm":
        (here / "r.jsonl").write_text(json.dumps({"choices": [{"routed_experts": encode_npy(ids.transpose(1, 0, 2))}]}))
        return here / "r.jsonl", lambda: read_vllm([here / "r.jsonl"], known)
    if engine == "sglang":
        text = encode_int32(ids.transpose(1, 0, 2))
        (here / "r.json").write_text(json.dumps({"meta_info": {"routed_experts": text}}))
        return here / "r.json", lambda: read_sglang([here / "r.json"], replace(known, num_hidden_layers=2))
    if engine == "megatron":
        (here / "router_trace_rank0.jsonl").write_text(megatron_lines(0, 0, ids))
        return here / "router_trace_rank0.jsonl", lambda: read_megatron(here, known)
    (here / "meta_info.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 2}))
    counts = {f"0_{layer}": np.bincount(row.ravel(), minlength=8) for layer, row in enumerate(ids)}
    save_file(counts, here / "rank0.safetensors")
    if engine == "raw":
        save_file({f"0_{layer}": row.astype(np.int32) for layer, row in enumerate(ids)}, here / "rank0_raw.safetensors")
        return here / "rank0_raw.safetensors", lambda: read_tensorrt_llm(here, known)
    return here / "rank0.safetensors", lambda: read_tensorrt_llm(here, known)


ENGINES = ("stat", "per_pass", "per_token", "sglang", "vllm", "tensorrt-llm", "raw", "megatron")


@pytest.mark.parametrize("engine", ENGINES)
@given(st.data())
def test_malformed_files_are_one_line(folder, engine, data):
    """Bytes cut, changed or put in: a profile or one clear line, never anything else, and the source as it was."""
    here = fresh(folder)
    path, read = write_valid(engine, here)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "change", "insert", "replace"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "change":
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "insert":
        place = data.draw(st.integers(0, len(content)))
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content = bytearray(data.draw(st.binary(max_size=50)))
    path.write_bytes(content)
    before = {file.name: file.read_bytes() for file in here.iterdir()}
    message = ""
    try:
        write_recording(read(), here / "out.profile")
        Profile.load_from(here / "out.profile")
    except CoterieError as error:
        message = str(error)
    assert "\n" not in message
    assert {file.name: file.read_bytes() for file in here.iterdir() if file.name != "out.profile"} == before
    assert bool(message) != (here / "out.profile").exists()


JUNK = [None, True, "x", -1, 10**30, 0.5, float("nan"), [], {}, [1, "a"], [[1], [1, 2]], {"a": 1}, [[[]]]]
TENSORS = [torch.zeros(0), torch.full((2, 30, 8), float("nan")), torch.full((2, 8), 9), torch.tensor(3), torch.eye(2)]


def places(value, path=()):
    """Where anything is in nested containers."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from places(inner, (*path, key))


def put(value, path, junk):
    """With something else in one place."""
    if not path:
        return junk
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = put(value[path[0]], path[1:], junk)
    return changed


@pytest.mark.parametrize("engine", [*ENGINES, "meta"])
@given(st.data())
def test_contents_of_the_wrong_kind_are_one_line(folder, engine, data):
    """Well-formed files with something unfit in any place, or without it."""
    here = fresh(folder)
    path, read = write_valid("tensorrt-llm" if engine == "meta" else engine, here)
    path = here / "meta_info.json" if engine == "meta" else path
    if path.suffix == ".safetensors":
        name = data.draw(st.sampled_from(["0_0", "0_1", "x", "1_2_3", "-1_0"]))
        shape = data.draw(st.sampled_from([(), (0,), (8,), (7,), (30, 2), (2, 2, 2)]))
        dtype = data.draw(st.sampled_from([np.int64, np.uint8, np.float32, np.bool_]))
        save_file({name: np.full(shape, data.draw(st.integers(0, 9))).astype(dtype)}, path)
    else:
        lines = [torch.load(path)] if path.suffix == ".pt" else [json.loads(line) for line in path.open()]
        line = data.draw(st.integers(0, len(lines) - 1))
        junk = data.draw(st.sampled_from(JUNK + TENSORS if path.suffix == ".pt" else JUNK))
        lines[line] = put(lines[line], data.draw(st.sampled_from(list(places(lines[line])))), junk)
        if path.suffix == ".pt":
            torch.save(lines[0], path)
        else:
            path.write_text("\n".join(map(json.dumps, lines)))
    message = ""
    try:
        write_recording(read(), here / "out.profile")
        Profile.load_from(here / "out.profile")
    except CoterieError as error:
        message = str(error)
    assert "\n" not in message
    assert bool(message) != (here / "out.profile").exists()
    assert not list(here.glob("*.partial"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, engine):
    path, read = write_valid(engine, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(profiler.files.os, "fsync", full)
        with pytest.raises(CoterieError, match="No space left.*free some"):
            write_recording(read(), tmp_path / "out.profile")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    write_recording(read(), tmp_path / "out.profile")
    assert path.read_bytes() == before[path.name]


def test_an_unfinished_recording_of_that_name_is_kept(tmp_path):
    _, read = write_valid("stat", tmp_path)
    (tmp_path / "out.profile.partial").mkdir()
    (tmp_path / "out.profile.partial" / "checkpoint").write_text("hours of work")
    with pytest.raises(CoterieError, match="unfinished recording"):
        write_recording(read(), tmp_path / "out.profile")
    assert (tmp_path / "out.profile.partial" / "checkpoint").read_text() == "hours of work"


def test_an_existing_folder_is_not_replaced(tmp_path):
    _, read = write_valid("stat", tmp_path)
    for folder in (tmp_path / "a folder", tmp_path):  # the second is the recording's own
        folder.mkdir(exist_ok=True)
        (folder / "mine.txt").write_text("mine")
        with pytest.raises(CoterieError, match="is not a profile"):
            write_recording(read(), folder)
        assert (folder / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickles_are_refused_and_never_run(tmp_path, how):
    harmful = {"logical_count": Harmful(tmp_path / "was-run")}
    if how == "torch":
        torch.save(harmful, tmp_path / "r.pt")
    else:
        (tmp_path / "r.pt").write_bytes(pickle.dumps(harmful))
    with pytest.raises(CoterieError, match="refused"):
        read_sglang([tmp_path], Known(top_k=2))
    assert not (tmp_path / "was-run").exists()


def test_nan_counts_and_wrong_shapes_are_refused(tmp_path):
    def stat(counts, name="r.pt"):
        torch.save({"rank": 0, "logical_count": counts}, tmp_path / name)
        return read_sglang([tmp_path / name], Known(top_k=2))

    for counts, message in (
        (torch.full((2, 2, 8), float("nan")), "holds NaN"),
        (torch.ones(2, 2, 8), "must be whole numbers with 3 dimensions"),
        (torch.ones(2, 8, dtype=torch.int32), r"\(2, 8\), must be whole numbers with 3"),
        (torch.full((2, 2, 8), -1, dtype=torch.int32), "holds -1"),
        (torch.zeros(2, 2, 8, dtype=torch.int32), "no token was counted"),
        ([[1]], "is no plain tensor"),
    ):
        with pytest.raises(CoterieError, match=message):
            stat(counts)
    one = torch.zeros(1, 1, 8, dtype=torch.int32)
    one[0, 0, 3] = 7
    with pytest.raises(CoterieError, match="top_k 2 does not fit"):
        stat(one)
    with pytest.raises(CoterieError, match="give --top-k or --model"):
        read_sglang([tmp_path / "r.pt"])
    save_file({"0_0": np.full(8, np.nan)}, tmp_path / "rank0.safetensors")
    (tmp_path / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    with pytest.raises(CoterieError, match="with NaN"):
        read_tensorrt_llm(tmp_path)


def test_recordings_of_two_models_are_refused(tmp_path):
    for name, experts in (("a", 8), ("b", 16)):
        ids = random_ids(0, 2, 30, experts, 2)
        counts = np.stack([np.bincount(row.ravel(), minlength=experts) for row in ids])[None]
        torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, tmp_path / f"{name}-stat.pt")
        record = sglang_record(1, 0, ids.astype(np.int64), range(30), EXTEND, [30], num_slots=experts)
        save_sglang(tmp_path / f"{name}-token.pt", [record], np.tile(np.arange(experts), (2, 1)))
        layers = random_ids(0, experts // 4, 30, 8, 2).transpose(1, 0, 2)
        (tmp_path / f"{name}.json").write_text(json.dumps({"choices": [{"routed_experts": encode_npy(layers)}]}))
        (tmp_path / f"router_trace_rank{experts}.jsonl").write_text(megatron_lines(0, 0, ids[:, :, : experts // 8]))
    for kind in ("stat", "token"):
        with pytest.raises(CoterieError, match="recordings of two models"):
            read_sglang([tmp_path / f"{name}-{kind}.pt" for name in "ab"], Known(top_k=2))
    fewer = sglang_record(2, 1, random_ids(0, 2, 30, 8, 1).astype(np.int64), range(30), EXTEND, [30], num_slots=8)
    save_sglang(tmp_path / "c-token.pt", [fewer], np.tile(np.arange(8), (2, 1)))
    with pytest.raises(CoterieError, match="top-k 1, a-token.pt has 2: recordings of two models"):
        read_sglang([tmp_path / "a-token.pt", tmp_path / "c-token.pt"])
    with pytest.raises(CoterieError, match="responses of two models"):
        read_vllm([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(CoterieError, match="recordings of two models"):
        read_megatron(tmp_path)
    with pytest.raises(CoterieError, match="another kind of recording"):
        read_sglang([tmp_path / "a-stat.pt", tmp_path / "a-token.pt"], Known(top_k=2))
    with pytest.raises(CoterieError, match="8 experts are recorded, the model has 16"):
        read_sglang([tmp_path / "a-token.pt"], Known(num_experts=16))
    with pytest.raises(CoterieError, match="top-2 is recorded, the model has top-8"):
        read_sglang([tmp_path / "a-token.pt"], Known(top_k=8))


def test_ranks_with_other_layers_are_refused(tmp_path):
    ids = random_ids(0, 3, 30, 8, 2)
    (tmp_path / "router_trace_rank0.jsonl").write_text(megatron_lines(0, 0, ids))
    (tmp_path / "router_trace_rank1.jsonl").write_text(megatron_lines(0, 1, ids[:2]))
    with pytest.raises(CoterieError, match="rank1.jsonl: has 2 layers, all ranks together 3"):
        read_megatron(tmp_path)


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused_at_once(tmp_path):
    counts = torch.ones(1, dtype=torch.int32).expand(10**9, 1000, 1000)
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "r.pt")
    with pytest.raises(CoterieError, match="larger than what the file holds"):
        read_sglang([tmp_path / "r.pt"], Known(top_k=2))


def test_ids_outside_the_model_are_refused(tmp_path):
    ids = random_ids(0, 2, 30, 16, 2)
    record = sglang_record(7, 0, ids.astype(np.int64), range(30), EXTEND, [30], num_slots=16)
    save_sglang(tmp_path / "r.pt", [record], np.tile(np.arange(8), (2, 1)))
    with pytest.raises(CoterieError, match="slot 1. in pass 7, the map has 8 slots"):
        read_sglang([tmp_path / "r.pt"])
    (tmp_path / "r.json").write_text(json.dumps({"choices": [{"routed_experts": encode_npy(ids.transpose(1, 0, 2))}]}))
    with pytest.raises(CoterieError, match="expert 1., must be below 8"):
        read_vllm([tmp_path / "r.json"], Known(num_experts=8))
    (tmp_path / "router_trace_rank0.jsonl").write_text(megatron_lines(0, 0, ids))
    with pytest.raises(CoterieError, match="expert 1. is recorded, must be below num_experts"):
        read_megatron(tmp_path, Known(num_experts=8))
    (tmp_path / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 2}')
    save_file({"0_0": np.bincount(ids[0].ravel(), minlength=16)}, tmp_path / "rank0.safetensors")
    with pytest.raises(CoterieError, match="16 slots are recorded, the model has 8 experts.*--load-balancer"):
        read_tensorrt_llm(tmp_path, Known(num_experts=8))


def test_layers_behind_the_models_last_one_are_refused(tmp_path):
    ids = random_ids(0, 3, 30, 8, 2)
    (tmp_path / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    counts = {f"0_{layer + 3}": np.bincount(row.ravel(), minlength=8) for layer, row in enumerate(ids)}
    save_file(counts, tmp_path / "rank0.safetensors")
    rows = "".join(f"  {layer}: {list(range(8))}\n" for layer in range(6))
    (tmp_path / "balancer.yaml").write_text(f"num_slots: 8\ninitial_global_assignments:\n{rows}")
    with pytest.raises(
        CoterieError, match="layers from 3 on are recorded, the model's last one is 2; give the --model"
    ):
        read_tensorrt_llm(tmp_path, Known(layer_ids=(0, 1, 2)), load_balancer=tmp_path / "balancer.yaml")


def test_experts_that_moved_while_recording_are_noticed(tmp_path):
    slots = np.tile(np.repeat(np.arange(8), 2), (2, 1))
    physical = random_ids(0, 2, 30, 16, 4).astype(np.int64)  # of another map: some picks become one expert
    record = sglang_record(1, 0, physical, range(30), EXTEND, [30], num_slots=16)
    save_sglang(tmp_path / "r.pt", [record], slots)
    with pytest.raises(CoterieError, match="were experts moved while recording"):
        imported(read_sglang([tmp_path / "r.pt"]), tmp_path)
    assert not (tmp_path / "out.profile").exists()


def test_nothing_recorded_says_how_to_record(tmp_path):
    (tmp_path / "r.json").write_text('{"choices": [{"text": "hello"}]}')
    with pytest.raises(CoterieError, match="--enable-return-routed-experts"):
        read_vllm([tmp_path / "r.json"])
    with pytest.raises(CoterieError, match="no such file"):
        read_vllm([tmp_path / "nothing.json"])
    with pytest.raises(CoterieError, match=r"must be a .json or .jsonl"):
        read_vllm([Path(__file__)])
    with pytest.raises(CoterieError, match="router_trace_rank0"):
        read_megatron(tmp_path)
    with pytest.raises(CoterieError, match="meta_info"):
        read_tensorrt_llm(tmp_path)
