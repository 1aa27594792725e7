"""What engines record comes back as the trace or the counts that it was made from, or is refused in one line."""

import base64
import errno
import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_spec, make_trace, random_ids, tiny_model, traces
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import profiler.files
from profiler import CoterieError, Profile, TokenTrace
from profiler.counts import count
from profiler.importers.arrays import read_arrays
from profiler.importers.known import Known, parse_layers
from profiler.importers.megatron import read_megatron
from profiler.importers.recording import of_profile, write_recording
from profiler.importers.sglang import read_sglang
from profiler.importers.tensorrt_llm import read_tensorrt_llm
from profiler.importers.vllm import read_vllm

EXTEND, DECODE, IDLE = 1, 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def fresh(folder: Path) -> Path:
    """An empty folder in it."""
    path = folder / str(len(list(folder.iterdir())))
    path.mkdir()
    return path


def imported(recording, folder: Path) -> Profile:
    write_recording(recording, folder / "out.profile")
    return Profile.load_from(folder / "out.profile")


def rows_of(trace: TokenTrace) -> list[bytes]:
    """What each token picked, whatever the order of tokens."""
    return sorted(trace.topk_ids[:, token].tobytes() for token in range(trace.num_tokens))


def same_counts(profile: Profile, trace: TokenTrace) -> bool:
    expected = count(replace(trace, domain_ids=np.zeros(trace.num_tokens, dtype=np.uint8)), profile.model, 1)
    return all((array == profile.counts.arrays()[name]).all() for name, array in expected.arrays().items())


# ------------------------------------------------------------------------------------- synthetic recordings


def map_with_copies(rng: np.random.Generator, num_hidden: int, num_experts: int, num_slots: int) -> np.ndarray:
    """Experts of slots, each at least once, (hidden layers, P)."""
    more = rng.integers(0, num_experts, (num_hidden, num_slots - num_experts))
    return rng.permuted(np.concatenate([np.tile(np.arange(num_experts), (num_hidden, 1)), more], axis=1), axis=1)


def to_slots(rng: np.random.Generator, ids_LTK: np.ndarray, slots_LP: np.ndarray) -> np.ndarray:
    """Any slot of each expert."""
    out = np.empty(ids_LTK.shape, dtype=np.int32)
    for place in np.ndindex(*ids_LTK.shape):
        out[place] = rng.choice(np.flatnonzero(slots_LP[place[0]] == ids_LTK[place]))
    return out


def sglang_record(pass_id, rank, physical_LTK, positions, mode=EXTEND, lengths=None, input_ids=None, num_slots=0):
    """As `_DetailAccumulator.append` keeps it: 8 columns, -1 where there is nothing."""
    num_tokens = len(positions)
    ids = np.full((physical_LTK.shape[0], num_tokens, 8), -1, dtype=np.int32)
    ids[:, : physical_LTK.shape[1], : physical_LTK.shape[2]] = physical_LTK
    counts = np.stack([np.bincount(row[row >= 0], minlength=num_slots) for row in ids]).astype(np.int32)
    return {
        "forward_pass_id": pass_id,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(num_tokens)) if input_ids is None else input_ids,
        "positions": list(positions),
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(ids),
        "misc_objects": [],
        "global_physical_count": torch.from_numpy(counts),
    }


def save_sglang(path: Path, records: list, slots_LP: np.ndarray) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(slots_LP)}, path)
    return path


def encode_int32(ids_TLK: np.ndarray) -> str:
    return base64.b64encode(ids_TLK.astype(np.int32).tobytes()).decode()


def encode_npy(ids_TLK: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids_TLK)
    return base64.b64encode(buffer.getvalue()).decode()


def with_dense_layer(ids_LTK: np.ndarray, filler: int) -> np.ndarray:
    """The MoE layers behind one dense layer, as engines that number all hidden layers record it."""
    return np.concatenate([np.full_like(ids_LTK[:1], filler), ids_LTK])


def megatron_lines(step: int, rank: int, ids_LTK: np.ndarray) -> str:
    lines = ""
    for layer, rows in enumerate(ids_LTK.tolist()):
        record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
        record |= {"num_tokens": len(rows), "topk": ids_LTK.shape[2], "top_indices": rows}
        lines += json.dumps(record) + "\n"
    return lines


# ----------------------------------------------------------------------------------------------- round trips


@given(
    traces(), st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from(["tensor", "slices", "data", "gathered"])
)
def test_sglang_tokens_come_back(folder, spec_and_trace, seed, num_ranks, how):
    """Physical ids of any map, passes over several ranks, whatever each of them saw."""
    spec, trace = spec_and_trace
    rng, here = np.random.default_rng(seed), fresh(folder)
    ids = with_dense_layer(trace.topk_ids.astype(np.int64), 0)
    num_hidden, num_tokens, _ = ids.shape
    slots = map_with_copies(rng, num_hidden, spec.num_experts, spec.num_experts + 4)
    records = [[] for _ in range(num_ranks)]
    for pass_id, part in enumerate(np.array_split(np.arange(num_tokens), 3)):
        of_ranks = np.array_split(part, num_ranks)
        for rank in range(num_ranks):
            seen, batch = {
                "tensor": (part, part),
                "slices": (of_ranks[rank], part),
                "data": (of_ranks[rank], of_ranks[rank]),
                "gathered": (part[: len(of_ranks[rank])], of_ranks[rank]),
            }[how]
            physical = to_slots(rng, ids[:, seen], slots)
            physical[0] = -1  # dense
            positions = range(len(batch))
            options = {"input_ids": batch.tolist(), "lengths": [len(batch)], "num_slots": slots.shape[1]}
            records[rank].append(sglang_record(pass_id, rank, physical, positions, EXTEND, **options))
    for rank in range(num_ranks):
        save_sglang(here / f"expert_distribution_recorder_17.5_{rank}.pt", records[rank], slots)
    recording = read_sglang([here], Known(num_experts=spec.num_experts))
    profile = imported(recording, here)
    assert profile.model.layer_ids == tuple(layer + 1 for layer in spec.layer_ids)
    if how != "gathered":
        assert rows_of(profile.tokens) == rows_of(trace)
        assert same_counts(profile, trace)
    else:  # what every rank but the first recorded are the first one's tokens
        firsts = [np.array_split(part, num_ranks)[0] for part in np.array_split(np.arange(num_tokens), 3)]
        assert set(rows_of(profile.tokens)) <= set(rows_of(trace))
        assert profile.num_tokens >= sum(map(len, firsts))
    assert not profile.tokens.phase.any()


@given(traces(), st.integers(0, 2**32 - 1), st.booleans())
def test_sglang_passes_are_counted(folder, spec_and_trace, seed, same_tokens):
    spec, trace = spec_and_trace
    rng, here = np.random.default_rng(seed), fresh(folder)
    ids = with_dense_layer(trace.topk_ids.astype(np.int64), 0)
    slots = map_with_copies(rng, len(ids), spec.num_experts, spec.num_experts + 4)
    for rank in range(2):
        records = []
        for pass_id, part in enumerate(np.array_split(np.arange(trace.num_tokens), 2)):
            seen = part if same_tokens else np.array_split(part, 2)[rank]
            physical = to_slots(rng, ids[:, seen], slots)
            physical[0] = -1
            record = sglang_record(pass_id, rank, physical, range(len(seen)), num_slots=slots.shape[1])
            keys = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
            records.append({key: record[key] for key in keys})
        save_sglang(here / f"{rank}.pt", records, slots)
    load = count(replace(trace, domain_ids=trace.domain_ids * 0), spec, 1).load
    halves = [part for half in np.array_split(np.arange(trace.num_tokens), 2) for part in np.array_split(half, 2)]
    by_part = [
        np.array(
            [
                np.bincount(row, minlength=spec.num_experts)
                for row in trace.topk_ids[:, part].reshape(spec.num_layers, -1)
            ]
        )
        for part in halves
    ]
    chance = not same_tokens and any((one == other).all() for one, other in (by_part[:2], by_part[2:]))
    recording = read_sglang([here], Known(top_k=spec.top_k))
    if chance or "dummy_tokens_dropped" in recording.provenance:
        return
    profile = imported(recording, here)
    assert (profile.counts.load == load).all()
    assert profile.num_tokens == trace.num_tokens
    assert profile.tokens is None
    with pytest.raises(CoterieError, match="counts only.*per_token"):
        profile.require_tokens()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]))
def test_sglang_statistics_are_counted_once(folder, seed, num_ranks):
    """Unused rows of the buffer, dense layers, and tokens that several ranks have counted."""
    here = fresh(folder)
    ids = random_ids(seed, 3, 90, 16, 4)
    passes = np.zeros((10, 5, 16), dtype=np.int32)
    for number, part in enumerate(np.array_split(np.arange(90), 7)):
        for layer in range(3):
            passes[number, layer + 1] = np.bincount(ids[layer, part].ravel(), minlength=16) * num_ranks
    content = {"rank": 0, "logical_count": torch.from_numpy(passes), "average_utilization_rate_over_window": None}
    torch.save(content, here / "a.pt")
    torch.save({**content, "average_utilization_rate_over_window": 0.5}, here / "b.pt")
    profile = imported(read_sglang([here / "a.pt", here / "b.pt"], Known(top_k=4)), here)
    assert profile.model.layer_ids == (1, 2, 3)
    assert profile.num_tokens == 180
    assert (profile.counts.load == 2 * count(make_trace(ids, num_domains=1), make_spec(3, 16, 4), 1).load).all()
    assert profile.provenance.get("ranks_that_counted_each_token", 1) == num_ranks
    assert "co-activation" in profile.provenance["cannot_tell"]


@given(traces(), st.booleans(), st.booleans())
def test_responses_come_back(folder, spec_and_trace, vllm, one_file):
    spec, trace = spec_and_trace
    if spec.top_k == 1:
        return  # zeros of a dense layer look like expert 0
    here, responses = fresh(folder), []
    ids = with_dense_layer(trace.topk_ids, 0).transpose(1, 0, 2)
    for sequence in range(4):
        own = ids[trace.sequence_ids == sequence]
        usage = {"prompt_tokens": len(own) - len(own) // 3, "completion_tokens": len(own) // 3 + 1}
        if vllm:
            choice = {"index": 0, "routed_experts": encode_npy(own)}
            responses.append({"id": "x", "choices": [choice], "usage": usage})
        else:
            responses.append({"text": "...", "meta_info": {"id": "x", "routed_experts": encode_int32(own), **usage}})
    if one_file:
        (here / "responses.json").write_text(json.dumps(responses))
    else:
        (here / "responses.jsonl").write_text("\n".join(map(json.dumps, responses)) + "\n")
    known = Known(num_experts=spec.num_experts, top_k=spec.top_k)
    profile = imported((read_vllm if vllm else read_sglang)([here], known), here)
    assert profile.model.layer_ids == tuple(layer + 1 for layer in spec.layer_ids)
    assert (profile.tokens.topk_ids == trace.topk_ids).all()
    assert (profile.tokens.sequence_ids == trace.sequence_ids).all()
    assert profile.tokens.phase.sum() == sum((trace.sequence_ids == number).sum() // 3 for number in range(4))
    assert same_counts(profile, trace)


@given(traces(), st.booleans(), st.booleans(), st.booleans())
def test_tensorrt_llm_counts_come_back(folder, spec_and_trace, same_tokens, raw, balanced):
    spec, trace = spec_and_trace
    here, rng = fresh(folder), np.random.default_rng(0)
    num_slots = spec.num_experts + 4 if balanced else spec.num_experts
    slots = map_with_copies(rng, spec.num_layers, spec.num_experts, num_slots)
    physical = to_slots(rng, trace.topk_ids, slots) if balanced else trace.topk_ids.astype(np.int32)
    (here / "meta_info.json").write_text(json.dumps({"num_experts": num_slots, "num_experts_per_token": spec.top_k}))
    for rank in range(2):
        counts, picks = {}, {}
        for number, part in enumerate(np.array_split(np.arange(trace.num_tokens), 2)):
            seen = physical[:, part if same_tokens else np.array_split(part, 2)[rank]]
            for layer in range(spec.num_layers):
                picks[f"{50 + number}_{layer + 3}"] = np.ascontiguousarray(seen[layer])
                counts[f"{50 + number}_{layer + 3}"] = np.bincount(seen[layer].ravel(), minlength=num_slots)
        save_file(counts, here / f"rank{rank}.safetensors")
        if raw:
            save_file(picks, here / f"rank{rank}_raw.safetensors")
    yaml = {"num_slots": num_slots, "layer_updates_per_iter": 0}
    yaml["initial_global_assignments"] = {layer + 3: row.tolist() for layer, row in enumerate(slots)}
    balancer = here / "balancer.yaml"
    balancer.write_text(
        "\n".join(
            f"{key}: {json.dumps(value) if key != 'initial_global_assignments' else ''}"
            + ("".join(f"\n  {layer}: {row}" for layer, row in value.items()) if isinstance(value, dict) else "")
            for key, value in yaml.items()
        )
    )
    recording = read_tensorrt_llm(
        here, Known(num_experts=spec.num_experts), load_balancer=balancer if balanced else None
    )
    if "dummy_tokens_dropped" in recording.provenance:
        return
    profile = imported(recording, here)
    assert profile.model.layer_ids == tuple(layer + 3 for layer in spec.layer_ids)
    parts = [part for half in np.array_split(np.arange(trace.num_tokens), 2) for part in np.array_split(half, 2)]
    loads = [[np.bincount(row.ravel(), minlength=num_slots).tobytes() for row in physical[:, part]] for part in parts]
    if not same_tokens and (loads[0] == loads[1] or loads[2] == loads[3]):
        return  # by chance
    assert (profile.counts.load == count(replace(trace, domain_ids=trace.domain_ids * 0), spec, 1).load).all()
    assert profile.num_tokens == trace.num_tokens
    if raw:
        assert rows_of(profile.tokens) == rows_of(trace)


@given(traces(), st.booleans(), st.booleans())
def test_megatron_traces_come_back(folder, spec_and_trace, same_tokens, recomputed):
    spec, trace = spec_and_trace
    here = fresh(folder)
    for rank in range(2):
        lines = ""
        for step, part in enumerate(np.array_split(np.arange(trace.num_tokens), 3)):
            seen = trace.topk_ids[:, part if same_tokens else np.array_split(part, 2)[rank]]
            lines += megatron_lines(step, rank, seen) * (2 if recomputed else 1)
        lines += json.dumps({"step": 2, "block": "mtp", "mtp_idx": 0, "layer": 0, "topk": 1, "top_indices": [[0]]})
        (here / f"router_trace_rank{rank}.jsonl").write_text(lines + "\n")
    profile = imported(read_megatron(here, Known(num_experts=spec.num_experts), decode=True), here)
    assert profile.model.layer_ids == spec.layer_ids
    assert profile.provenance["mtp_records_left_out"] == 2
    assert profile.tokens.phase.all()
    if same_tokens:
        assert rows_of(profile.tokens) == rows_of(trace)
        assert same_counts(profile, trace)
    else:  # equal parts could be of the same tokens
        assert set(rows_of(profile.tokens)) == set(rows_of(trace))


# --------------------------------------------------------------------------------------------------- details


def test_sglang_sequences_go_on_while_decoding(tmp_path):
    """Two prompts, three steps of decoding in batch order, a third prompt of the same length in between."""
    slots = np.tile(np.arange(8), (2, 1))
    ids = random_ids(0, 2, 20, 8, 2).astype(np.int64)
    records = [
        sglang_record(1, 0, ids[:, :7], [0, 1, 2, 0, 1, 2, 3], EXTEND, [3, 4], num_slots=8),
        sglang_record(2, 0, ids[:, 7:9], [3, 4], DECODE, num_slots=8),
        sglang_record(3, 0, ids[:, 9:14], [0, 1, 2, 3, 4], EXTEND, [5], num_slots=8),
        sglang_record(4, 0, ids[:, 14:17], [4, 5, 5], DECODE, num_slots=8),
        sglang_record(5, 0, ids[:, 17:20], [5, 6, 6], DECODE, num_slots=8),
        sglang_record(6, 0, ids[:, :0], [], IDLE, num_slots=8),
    ]
    save_sglang(tmp_path / "one.pt", records, slots)
    profile = imported(read_sglang([tmp_path / "one.pt"]), tmp_path)
    expected = [0, 0, 0, 1, 1, 1, 1, 0, 1, 2, 2, 2, 2, 2, 0, 1, 2, 0, 1, 2]
    assert profile.tokens.sequence_ids.tolist() == expected
    assert profile.tokens.phase.tolist() == [0] * 7 + [1] * 2 + [0] * 5 + [1] * 6
    assert (profile.tokens.topk_ids == ids).all()


def test_warm_up_rows_are_dropped_and_counted_but_not_first_tokens(tmp_path):
    spec = make_spec(12, 64, 8)
    ids = random_ids(1, 12, 500, 64, 8)
    ids[:, 100:140] = ids[:, 100:101]  # padding
    ids[:, ::25] = ids[:, :1]  # each text begins alike
    np.savez(tmp_path / "a.npz", topk_ids=ids.transpose(1, 0, 2), sequence_ids=np.arange(500) // 25)
    profile = imported(of_profile(read_arrays(tmp_path / "a.npz", Known(num_experts=64))), tmp_path)
    dropped = profile.provenance["dummy_tokens_dropped"]
    assert dropped == 40 - 2  # first tokens inside the padding stay
    assert profile.num_tokens == 500 - dropped
    assert profile.model.num_experts == spec.num_experts


def test_all_warm_up_is_refused(tmp_path):
    ids = np.tile(random_ids(1, 12, 1, 64, 8), (1, 50, 1))
    np.save(tmp_path / "a.npy", ids.transpose(1, 0, 2))
    with pytest.raises(CoterieError, match="all 50 tokens are warm-up"):
        imported(of_profile(read_arrays(tmp_path / "a.npy")), tmp_path)
    assert not (tmp_path / "out.profile").exists()


def test_dummy_passes_of_statistics_are_dropped(tmp_path):
    ids = random_ids(0, 5, 40, 16, 4)
    passes = np.zeros((3, 5, 16), dtype=np.int32)
    for layer in range(5):
        passes[0, layer] = np.bincount(ids[layer].ravel(), minlength=16)
        passes[1, layer, [1, 3, 5, 9]] = 160
        passes[2, layer, [1, 3, 5, 9]] = 1  # one token may be a real one
    torch.save({"rank": 0, "logical_count": torch.from_numpy(passes)}, tmp_path / "a.pt")
    profile = imported(read_sglang([tmp_path / "a.pt"], Known(top_k=4)), tmp_path)
    assert (profile.num_tokens, profile.provenance["dummy_tokens_dropped"]) == (41, 160)


def test_completions_of_one_prompt_count_it_once(tmp_path):
    ids = random_ids(0, 2, 30, 256, 4).transpose(1, 0, 2)
    ids[3, 1, 2] = 255  # an expert of its own in vLLM's eight bits
    second = np.concatenate([ids[:20], ids[25:]])
    choices = [{"routed_experts": encode_npy(part.astype(np.uint8)), "token_ids": [1] * 6} for part in (ids, second)]
    (tmp_path / "r.json").write_text(json.dumps({"choices": choices, "usage": {"completion_tokens": 12}}))
    profile = imported(read_vllm([tmp_path / "r.json"], Known(num_experts=256)), tmp_path)
    assert profile.num_tokens == 35
    assert profile.tokens.phase.sum() == 10
    assert (profile.tokens.topk_ids[:, 3] == ids[3]).all()
    assert set(profile.tokens.sequence_ids.tolist()) == {0}


def test_the_model_says_the_shape(tmp_path):
    """A config folder gives layers, sizes and top-k, and another model's recording does not fit it."""
    model = tiny_model("deepseek_v3")
    model.config.save_pretrained(tmp_path / "model")
    known = Known.of_model(str(tmp_path / "model"))
    assert known.num_hidden_layers == model.config.num_hidden_layers
    assert None not in (known.layer_ids, known.num_experts, known.top_k, known.hidden_size)
    hidden = np.zeros((20, known.num_hidden_layers, known.top_k), dtype=np.int32)
    ids = random_ids(0, len(known.layer_ids), 20, known.num_experts, known.top_k)
    hidden[:, list(known.layer_ids)] = ids.transpose(1, 0, 2)
    (tmp_path / "r.jsonl").write_text(json.dumps({"meta_info": {"routed_experts": encode_int32(hidden)}}))
    profile = imported(read_sglang([tmp_path / "r.jsonl"], known), tmp_path)
    assert (profile.tokens.topk_ids == ids).all()
    assert profile.model.model_type == "deepseek_v3"
    assert profile.model.num_groups == known.num_groups
    with pytest.raises(CoterieError, match="numbers are no rows of"):
        read_sglang([tmp_path / "r.jsonl"], replace(known, num_hidden_layers=7, top_k=11))
    with pytest.raises(CoterieError, match="layer .* is recorded, and is no MoE layer"):
        read_sglang([tmp_path / "r.jsonl"], replace(known, layer_ids=known.layer_ids[:-1]))


def test_layers_are_parsed():
    assert parse_layers("3-5,9") == (3, 4, 5, 9)
    for text in ("", "x", "5-3", "1,1", "-1", "0-9999999999"):
        with pytest.raises(CoterieError, match="layers"):
            parse_layers(text)


# ------------------------------------------------------------------------------------------------- bad input


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
        ([[1]], "is no tensor"),
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
