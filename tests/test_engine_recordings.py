"""What engines record comes back as the trace or the counts that it was made from."""

import base64
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_spec, make_trace, random_ids, tiny_model, traces
from hypothesis import given
from hypothesis import strategies as st
from made_recordings import (
    DECODE,
    EXTEND,
    IDLE,
    encode_int32,
    encode_npy,
    fresh,
    imported,
    map_with_copies,
    megatron_lines,
    rows_of,
    same_counts,
    save_sglang,
    sglang_record,
    to_slots,
    with_dense_layer,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from profiler import CoterieError
from profiler.counts import count
from profiler.importers.arrays import read_arrays
from profiler.importers.known import Known, parse_layers
from profiler.importers.megatron import read_megatron
from profiler.importers.recording import _without_repeats, of_profile
from profiler.importers.sglang import read_sglang
from profiler.importers.tensorrt_llm import read_tensorrt_llm
from profiler.importers.vllm import read_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@given(
    traces(), st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from(["tensor", "slices", "data", "gathered"])
)
def test_sglang_tokens_come_back(folder, spec_and_trace, seed, num_ranks, how):
    """Physical ids of any map, passes over several ranks, whatever each of them saw."""
    spec, trace = spec_and_trace
    if how == "data" and len(set(rows_of(trace))) < trace.num_tokens:
        return  # tokens of two ranks that pick alike look like one that both saw, in models with so few ways to pick
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
    other = {"logical_count": torch.from_numpy(passes[::-1].copy()), "average_utilization_rate_over_window": 0.5}
    torch.save({**content, **other}, here / "b.pt")
    torch.save({**content, "rank": 1}, here / "c.pt")  # of another rank that wrote the same sums
    profile = imported(read_sglang([here / name for name in ("a.pt", "b.pt", "c.pt")], Known(top_k=4)), here)
    assert profile.provenance["records_of_the_same_tokens"] == 1
    assert profile.model.layer_ids == (1, 2, 3)
    assert profile.num_tokens == 180
    assert (profile.counts.load == 2 * count(make_trace(ids, num_domains=1), make_spec(3, 16, 4), 1).load).all()
    assert profile.provenance.get("ranks_that_counted_each_token", 1) == num_ranks
    assert "co-activation" in profile.provenance["cannot_tell"]


def test_counts_in_whole_blocks_are_no_copies(tmp_path):
    """As stat_approx has them under DeepEP."""
    passes = np.random.default_rng(0).integers(1, 5, (10, 2, 16)) * 128
    torch.save({"rank": 0, "logical_count": torch.from_numpy(passes)}, tmp_path / "a.pt")
    profile = imported(read_sglang([tmp_path / "a.pt"], Known(top_k=4)), tmp_path)
    assert "ranks_that_counted_each_token" not in profile.provenance
    assert (profile.counts.load[0] == passes.sum(axis=0)).all()


def test_what_engines_keep_of_earlier_requests_counts_once(tmp_path):
    """A system prompt that chats share, and a turn that holds the turn before."""
    rows = random_ids(0, 40, 12, 8, 2).astype(np.int64)  # (tokens, layers, K)
    system, first, second = rows[:10], rows[10:20], rows[20:30]
    chats = [(np.concatenate(parts), 5) for parts in ([system, first], [system, second], [system, first, rows[30:]])]
    lines = []
    for ids, decoded in chats:
        told = {"prompt_tokens": len(ids) - decoded, "completion_tokens": decoded + 1}
        told["routed_experts"] = base64.b64encode(ids.astype("<i4").tobytes()).decode()
        lines.append(json.dumps({"meta_info": told}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    profile = imported(read_sglang([tmp_path / "chats.jsonl"], Known(top_k=2, num_experts=8)), tmp_path)
    assert profile.num_tokens == 40
    assert profile.provenance["rows_of_a_shared_prompt"] == 30
    assert np.bincount(profile.tokens.sequence_ids).tolist() == [20, 10, 10]
    assert profile.tokens.phase.sum() == 15  # decoded


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


def test_tensorrt_llm_files_are_opened_once_a_reading(tmp_path, monkeypatch):
    """Not for each of their thousands of tensors; what is counted in blocks is all that was recorded."""
    ids, opened = random_ids(0, 2, 70, 16, 4), []
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 16, "num_experts_per_token": 4}))
    for rank in range(2):
        parts = {f"{step}_{layer}": ids[layer, 5 * (7 * rank + step) :][:5] for step in range(7) for layer in range(2)}
        picks = {key: np.ascontiguousarray(part).astype(np.int32) for key, part in parts.items()}
        save_file(picks, tmp_path / f"rank{rank}_raw.safetensors")
        counts = {key: np.bincount(part.ravel(), minlength=16) for key, part in picks.items()}
        save_file(counts, tmp_path / f"rank{rank}.safetensors")

    def counted(path, framework):
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("profiler.importers.tensorrt_llm.safe_open", counted)
    monkeypatch.setattr("profiler.importers.tensorrt_llm._ITERATIONS_TOGETHER", 3)
    assert imported(read_tensorrt_llm(tmp_path), tmp_path).num_tokens == 70
    assert max(opened.count(path) for path in opened) <= 5
    for rank in range(2):
        (tmp_path / f"rank{rank}_raw.safetensors").unlink()
    profile = imported(read_tensorrt_llm(tmp_path), tmp_path)
    assert (profile.counts.load[0] == [np.bincount(layer.ravel(), minlength=16) for layer in ids]).all()
    assert profile.num_tokens == 70


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


def test_passes_of_a_draft_model_neither_count_nor_part_sequences(tmp_path):
    slots = np.tile(np.arange(8), (2, 1))
    ids = random_ids(0, 2, 6, 8, 2).astype(np.int64)
    nothing = np.full((2, 5, 2), -1)
    records = [
        sglang_record(1, 0, ids[:, :5], range(5), EXTEND, [5], num_slots=8),
        sglang_record(2, 0, nothing, range(5), EXTEND, [5], input_ids=[1, 2, 3, 4, 9], num_slots=8),
        sglang_record(3, 0, ids[:, 5:], [5], DECODE, num_slots=8),
        sglang_record(4, 0, ids[:, :0], [], IDLE, num_slots=8),
    ]
    save_sglang(tmp_path / "one.pt", records, slots)
    profile = imported(read_sglang([tmp_path / "one.pt"]), tmp_path)
    assert profile.tokens.sequence_ids.tolist() == [0] * 6
    assert profile.provenance["passes_left_out"] == 1  # not the one without tokens


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


@given(st.integers(1, 10), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2), st.booleans())
def test_completions_keep_their_phases_also_where_they_are_equal(folder, prompt, decoded, say, greedy):
    """How many tokens were decoded is said by each choice, by all together, or only the prompt's length is known."""
    here, ids = fresh(folder), random_ids(0, 2, prompt + 30, 64, 4).transpose(1, 0, 2)
    starts = [prompt if greedy else prompt + 7 * place for place in range(len(decoded))]
    parts = [
        np.concatenate([ids[:prompt], ids[start : start + length]])
        for start, length in zip(starts, decoded, strict=True)
    ]
    choices = [{"routed_experts": encode_npy(part)} for part in parts]
    usage = {"prompt_tokens": prompt}
    if say == 1:
        usage["completion_tokens"] = sum(decoded) + len(decoded)
    if say == 2:
        usage = {}
        choices = [{**choice, "token_ids": [1] * (n + 1)} for choice, n in zip(choices, decoded, strict=True)]
    (here / "r.json").write_text(json.dumps({"choices": choices, "usage": usage}))
    profile = imported(read_vllm([here / "r.json"], Known(num_experts=64)), here)
    expected = np.concatenate([ids[:prompt], *(part[prompt:] for part in parts)]).transpose(1, 0, 2)
    assert (profile.tokens.topk_ids == expected).all()
    assert profile.tokens.phase.tolist() == [0] * prompt + [1] * sum(decoded)


def test_phases_of_a_list_of_prompts_are_not_guessed(tmp_path):
    """The response gives the sum of their lengths, 4 + 6 here, and each prompt's rows may be more."""
    ids = random_ids(0, 2, 40, 64, 4).transpose(1, 0, 2)
    choices = [{"routed_experts": encode_npy(part)} for part in (ids[:16], ids[16:])]
    usage = {"prompt_tokens": 10, "completion_tokens": 13 + 19}
    (tmp_path / "r.json").write_text(json.dumps({"choices": choices, "usage": usage}))
    profile = imported(read_vllm([tmp_path / "r.json"], Known(num_experts=64)), tmp_path)
    assert profile.num_tokens == 40
    assert not profile.tokens.phase.any()


def test_stages_of_a_pipeline_give_counts(tmp_path):
    """Each rank of TensorRT-LLM then has some of the layers; none of their tokens may vanish."""
    ids = random_ids(0, 4, 30, 16, 4)
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 16, "num_experts_per_token": 4}))
    for rank, layers in enumerate(([0, 1], [2, 3])):
        picks = {f"7_{layer}": np.ascontiguousarray(ids[layer]).astype(np.int32) for layer in layers}
        save_file(picks, tmp_path / f"rank{rank}_raw.safetensors")
        counts = {key: np.bincount(picked.ravel(), minlength=16) for key, picked in picks.items()}
        save_file(counts, tmp_path / f"rank{rank}.safetensors")
    profile = imported(read_tensorrt_llm(tmp_path), tmp_path)
    assert profile.tokens is None
    assert profile.num_tokens == 30
    assert (profile.counts.load == count(make_trace(ids, num_domains=1), make_spec(4, 16, 4), 1).load).all()
    assert "some layers only" in profile.provenance["raw_files"]


def test_micro_batches_that_a_layer_routes_alike_stay_apart(tmp_path):
    """Each token is a micro-batch; a layer that runs twice on some of them is not paired with their neighbours."""
    ids = np.array([[[0, 1], [2, 3], [0, 1]], [[4, 5], [4, 5], [6, 7]]])
    (tmp_path / "router_trace_rank0.jsonl").write_text(
        "".join(megatron_lines(0, 0, ids[:, token : token + 1]) for token in range(3))
    )
    profile = imported(read_megatron(tmp_path, Known(num_experts=8)), tmp_path)
    assert (profile.tokens.topk_ids == ids).all()
    twice = [megatron_lines(0, 0, ids[:, token : token + 1]) for token in (0, 1)]
    twice = [lines + lines.splitlines()[1] + "\n" for lines in twice]  # the second layer only
    ids[1, 0] = [2, 5]
    twice[0] = twice[0].replace("[[4, 5]]", "[[2, 5]]")
    (tmp_path / "router_trace_rank0.jsonl").write_text("".join(twice))
    profile = imported(read_megatron(tmp_path, Known(num_experts=8)), tmp_path)
    assert (profile.tokens.topk_ids == ids[:, :2]).all()


def test_a_step_that_lacks_a_layer_is_counted_once(tmp_path):
    ids = random_ids(0, 2, 8, 16, 4)
    for rank in range(3):
        whole = megatron_lines(0, rank, ids[:, rank : rank + 2])
        cut = megatron_lines(1, rank, ids).splitlines(keepends=True)[0]
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text(whole + cut)
    profile = imported(read_megatron(tmp_path, Known(num_experts=16)), tmp_path)
    assert profile.num_tokens == 6
    assert profile.provenance["incomplete_steps_left_out"] == 1


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 30), max_size=5))
def test_repeats_are_found_wherever_tokens_are_cut(rows, cuts):
    """A row stays if none of its neighbours is equal, or if it is none of the common ones (here: token 2 is not)."""
    kinds = random_ids(0, 2, 3, 64, 4)
    trace = make_trace(kinds[:, rows])
    common = np.sort(make_trace(kinds).row_hashes()[:2])
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = (trace.where(slice(start, stop)) for start, stop in itertools.pairwise(edges))
    kept = [trace.topk_ids for trace in _without_repeats(parts, common)]
    expected = [
        place
        for place, row in enumerate(rows)
        if row == 2 or row not in (rows[place - 1 : place] + rows[place + 1 : place + 2])
    ]
    assert (np.concatenate([kinds[:, :0], *kept], axis=1) == kinds[:, [rows[place] for place in expected]]).all()


@pytest.mark.parametrize("counts", [{"prompt_tokens": -23}, {"prompt_tokens": -20, "completion_tokens": 1}])
def test_negative_token_counts_are_passed_over(tmp_path, counts):
    ids = random_ids(0, 2, 20, 16, 4).transpose(1, 0, 2)
    meta = {"completion_tokens": 4, **counts, "routed_experts": encode_int32(ids)}
    (tmp_path / "r.jsonl").write_text(json.dumps({"meta_info": meta}))
    with pytest.raises(CoterieError, match="whose shape it does not say; give --model, or --num-hidden-layers"):
        read_sglang([tmp_path / "r.jsonl"], Known(top_k=4))
    known = Known(top_k=4, num_hidden_layers=2)
    assert imported(read_sglang([tmp_path / "r.jsonl"], known), tmp_path).num_tokens == 20


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
    for text in ("", "x", "5-3", "5-3,7", "1,1", "-1", "0-9999999999"):
        with pytest.raises(CoterieError, match="layers"):
            parse_layers(text)
