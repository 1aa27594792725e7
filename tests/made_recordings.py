"""Recordings as engines write them, made of known traces; and what came back of them."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from profiler import Profile, TokenTrace
from profiler.counts import count
from profiler.importers.recording import write_recording

EXTEND, DECODE, IDLE = 1, 2, 4


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
