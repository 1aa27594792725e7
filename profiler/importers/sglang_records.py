"""The .pt files of SGLang's expert distribution recorder, and what the records of several ranks say together.
Knows nothing of SGLang's responses, and builds no recording.

For `sglang.py`, which says what was checked against which version.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError
from profiler.files import read_pt
from profiler.importers.recording import experts_of_slots, narrow
from profiler.spec import MoESpec
from profiler.trace import DECODE, PREFILL, TokenTrace

_DECODE, _MIXED, _TARGET_VERIFY = 2, 3, 5  # of ForwardMode in srt/model_executor/forward_batch_info.py

Ids = npt.NDArray[np.int32]


def load_recording(path: Path) -> dict[str, Any]:
    """What a .pt file holds; its tensors stay on the disk until they are read.

    Raises:
        CoterieError: it cannot be read without running code, or is no object.
    """
    content = read_pt(path)
    if not isinstance(content, dict):
        raise CoterieError(
            f"{path}: holds a {type(content).__name__}, SGLang's recorder writes an object; record again"
        )
    return content


def kind_of(path: Path, content: dict[str, Any]) -> str:
    """`stat` (also stat_approx, which looks the same), `per_pass` or `per_token`.

    Raises:
        CoterieError: it is none of them, or holds no forward pass.
    """
    if "logical_count" in content:
        return "stat"
    records = content.get("records")
    if not isinstance(records, list) or "last_physical_to_logical_map" not in content:
        keys = ", ".join(sorted(map(str, content)))[:150]
        raise CoterieError(
            f"{path}: no recording of SGLang (it holds {keys or 'nothing'}); give a dump of its recorder"
        )
    if not records:
        raise CoterieError(f"{path}: holds 0 forward passes; send requests between start and dump")
    if not all(isinstance(record, dict) for record in records):
        raise CoterieError(f"{path}: its records are no objects; record again")
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def whole_numbers(path: Path, name: str, tensor: Any, ndim: int) -> npt.NDArray[Any]:
    """A tensor of a recording as an array.

    Raises:
        CoterieError: it is none of whole numbers, at least -1, with so many dimensions.
    """
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CoterieError(f"{path}: {name} is no plain tensor; record again")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CoterieError(f"{path}: {name} {tuple(tensor.shape)} is larger than what the file holds; record again")
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise CoterieError(f"{path}: {name} holds NaN, must be counts; the recording is broken, record again")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim != ndim:
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise CoterieError(f"{path}: {name} is {kind}, must be whole numbers with {ndim} dimensions; record again")
    if tensor.numel() == 0:
        raise CoterieError(f"{path}: {name} {tuple(tensor.shape)} is empty; record again")
    if int(tensor.min()) < -1:
        raise CoterieError(f"{path}: {name} holds {int(tensor.min())}, must be at least 0; record again")
    return tensor.numpy()


def require_alike(of_file: dict[Path, Any], what: str) -> None:
    """Check that files are of one model.

    Raises:
        CoterieError: two of them differ.
    """
    (first, expected), *others = of_file.items()
    for other, value in others:
        if value != expected:
            raise CoterieError(
                f"{other}: {what} {value}, {first.name} has {expected}: recordings of two models; import them apart"
            )


@dataclass(frozen=True)
class Record:
    """One rank's record of one forward pass. Its tensor stays on the disk until it is read."""

    path: Path
    logical_of_slot: npt.NDArray[np.int64]  # expert of each slot (layers, P)
    pass_id: int
    rank: int
    tensor: Any  # counts (layers, P), or ids (layers, T, columns)
    batch: bytes  # equal for records of the same tokens
    positions: Ids
    lengths: list[int] | None  # of the sequences' new tokens
    mode: int

    def logical_ids(self) -> Ids:
        """Int32 (layers, T, columns), -1 for none."""
        physical = whole_numbers(self.path, "topk_ids_of_layer", self.tensor, 3)
        if physical.shape[:2] != (len(self.logical_of_slot), len(self.positions)):
            raise CoterieError(
                f"{self.path}: topk_ids_of_layer {physical.shape} in pass {self.pass_id}, must be (layers, tokens, "
                f"top-k) for {len(self.logical_of_slot)} layers and {len(self.positions)} tokens; record again"
            )
        highest, slots = int(physical.max()), self.logical_of_slot.shape[1]
        if highest >= slots:
            raise CoterieError(f"{self.path}: slot {highest} in pass {self.pass_id}, the map has {slots} slots")
        return experts_of_slots(physical, self.logical_of_slot).astype(np.int32)

    def logical_counts(self) -> npt.NDArray[np.int64]:
        """Int64 (layers, E)."""
        physical = whole_numbers(self.path, "global_physical_count", self.tensor, 2)
        if physical.shape != self.logical_of_slot.shape or physical.min() < 0:
            raise CoterieError(
                f"{self.path}: global_physical_count {physical.shape} in pass {self.pass_id}, must be counts of "
                f"(layers, slots) = {self.logical_of_slot.shape}; record again"
            )
        counts = np.zeros((len(self.logical_of_slot), int(self.logical_of_slot.max()) + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(len(counts))[:, None], self.logical_of_slot), physical)
        return counts


def read_map(path: Path, content: dict[str, Any]) -> npt.NDArray[np.int64]:
    """The expert of each slot, int64 (layers, P), as it was when the recording ended.

    Raises:
        CoterieError: an expert has no slot, or a slot none.
    """
    name = "last_physical_to_logical_map"
    map_LP = whole_numbers(path, name, content[name], 2).astype(np.int64)
    num_experts = int(map_LP.max()) + 1
    if map_LP.min() < 0 or num_experts > map_LP.shape[1] or any(len(np.unique(row)) < num_experts for row in map_LP):
        raise CoterieError(f"{path}: {name} leaves out some of {num_experts} experts; the file is broken, record again")
    return map_LP


def read_records(path: Path, content: dict[str, Any], map_LP: Any, kind: str) -> Iterator[Record]:
    """The records of one rank's file that have tokens.

    Raises:
        CoterieError: a record lacks something, or its parts do not fit each other.
    """
    tensor = "topk_ids_of_layer" if kind == "per_token" else "global_physical_count"
    for number, record in enumerate(content["records"]):
        try:
            pass_id, rank = int(record["forward_pass_id"]), int(record["rank"])
            batch, positions, lengths, mode = b"", np.empty(0, dtype=np.int32), None, 0
            if kind == "per_token":
                input_ids = _list_of_numbers(record["input_ids"]).astype(np.int64)
                positions, mode = _list_of_numbers(record["positions"]).astype(np.int32), int(record["forward_mode"])
                lengths = None if record["extend_seq_lens"] is None else [int(n) for n in record["extend_seq_lens"]]
                batch = hashlib.sha256(input_ids.tobytes() + b"|" + positions.tobytes()).digest()
                if positions.ndim == 2:  # three rows where positions have three axes (multimodal rotary)
                    positions = positions[0]
                if input_ids.shape != positions.shape or input_ids.ndim != 1:
                    raise ValueError(f"{input_ids.shape} input_ids and {positions.shape} positions")
                if lengths and min(lengths) < 0:
                    raise ValueError(f"extend_seq_lens holds {min(lengths)}")
            if kind != "per_token" or len(positions):  # idle ranks record passes without tokens
                yield Record(path, map_LP, pass_id, rank, record[tensor], batch, positions, lengths, mode)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CoterieError(
                f"{path}: record {number} is no {kind} record of SGLang ({type(error).__name__}: {error}); record again"
            ) from error


def _list_of_numbers(value: Any) -> npt.NDArray[Any]:
    array = np.array(value) if isinstance(value, list) else None
    if array is None or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError("input_ids and positions must be lists of whole numbers")
    return array


def merge_pass(records: list[Record]) -> tuple[list[tuple[Record, Ids]], int]:
    """The different tokens of one pass, each batch with one of its records, and how many records told nothing new."""
    by_batch: dict[bytes, list[Record]] = {}
    for record in records:
        by_batch.setdefault(record.batch, []).append(record)
    merged: list[tuple[Record, Ids]] = []
    copies = 0
    for same in by_batch.values():
        ids, of_same_tokens = merge_batch([record.logical_ids() for record in same])
        copies += of_same_tokens
        # Gathered batches: this rank has recorded the first rows of what another has recorded, not its own tokens.
        if any(_starts_alike(ids, other) for _, other in merged):
            copies += 1
        else:
            merged.append((same[0], ids))
    return merged, copies


def merge_batch(parts: list[Ids]) -> tuple[Ids, int]:
    """One batch out of what several ranks recorded of it, in the order of ranks; and how many of them are copies.

    Pipeline stages record different layers.  In a stage ranks record all tokens, and then agree, or a slice each, in
    order, in the first rows of their arrays.
    """
    merged = np.full_like(parts[0], -1)
    stages: dict[bytes, list[Ids]] = {}
    for part in parts:
        stages.setdefault((part >= 0).any(axis=(1, 2)).tobytes(), []).append(part)
    copies = 0
    for stage in stages.values():
        layers = (stage[0] >= 0).any(axis=(1, 2))
        whole = next((part for part in stage if (part >= 0).any(axis=(0, 2)).all()), None)
        if whole is not None:
            copies += len(stage) - 1
            merged[layers] = whole[layers]
        else:
            slices = np.concatenate([part[:, (part >= 0).any(axis=(0, 2))] for part in stage], axis=1)
            slices = slices[:, : merged.shape[1]]
            merged[layers, : slices.shape[1]] = slices[layers]
    return merged, copies


def _starts_alike(first: Ids, second: Ids) -> bool:
    shorter = min(first.shape[1], second.shape[1])
    return first.shape[2] == second.shape[2] and bool((first[:, :shorter] == second[:, :shorter]).all())


class Sequences:
    """Numbers for sequences, which SGLang does not record: one goes on where a token has the position after its last.

    Where several could go on, they do in the order in which they last came: batches keep their order.
    """

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[tuple[int, int], list[int]] = {}  # by rank and position

    def number(self, rank: int, starts: list[int], lengths: list[int]) -> list[int]:
        """Of new tokens from these positions on."""
        numbers = [-1] * len(starts)
        wanted: dict[int, list[int]] = {}
        for place, start in enumerate(starts):
            wanted.setdefault(start, []).append(place)
        for start, places in wanted.items():
            waiting = self._waiting.pop((rank, start), []) if start else []
            going_on, left = waiting[-len(places) :], waiting[: -len(places)]
            if left:
                self._waiting[rank, start] = left
            for place, sequence in itertools.zip_longest(places, going_on, fillvalue=-1):
                numbers[place] = sequence
        for place, sequence in enumerate(numbers):
            if sequence < 0:
                numbers[place], self._next = self._next, self._next + 1
            self._waiting.setdefault((rank, starts[place] + lengths[place]), []).append(numbers[place])
        return numbers


def to_trace(record: Record, ids_LTW: Ids, model: MoESpec, sequences: Sequences) -> TokenTrace:
    """The tokens of one batch, of the model's MoE layers only, without those that picked no expert anywhere.

    Raises:
        CoterieError: a token picked an expert twice, as it seems where the map is not the one recorded with.
    """
    num_tokens = len(record.positions)
    lengths = [length for length in record.lengths or [] if length]
    if sum(lengths) != num_tokens and record.mode == _TARGET_VERIFY:
        breaks = np.flatnonzero(np.diff(record.positions) != 1) + 1
        lengths = np.diff(np.concatenate([[0], breaks, [num_tokens]])).tolist()
    elif sum(lengths) != num_tokens:  # decoding has no lengths: a token for each sequence
        lengths = [1] * num_tokens
    firsts = np.cumsum([0, *lengths[:-1]])
    numbers = sequences.number(record.rank, record.positions[firsts].tolist(), lengths)
    decoding = [record.mode in (_DECODE, _TARGET_VERIFY) or (record.mode == _MIXED and n == 1) for n in lengths]
    if (ids_LTW[:, :, model.top_k :] >= 0).any():
        raise CoterieError(f"{record.path}: pass {record.pass_id} has picks behind gaps; record again")
    picked: npt.NDArray[np.bool_] = np.any(ids_LTW >= 0, axis=(0, 2))
    trace = TokenTrace(
        topk_ids=narrow(ids_LTW[:, :, : model.top_k], model.num_experts),
        sequence_ids=np.repeat(np.array(numbers, dtype=np.int32), lengths),
        domain_ids=np.zeros(num_tokens, dtype=np.uint8),
        phase=np.repeat(np.where(decoding, DECODE, PREFILL).astype(np.uint8), lengths),
    ).where(picked)
    try:
        trace.require(model, 1)
    except CoterieError as error:
        raise CoterieError(
            f"{record.path}: pass {record.pass_id}: {error}; were experts moved while recording? SGLang keeps only the "
            "last map: record without --enable-eplb"
        ) from error
    return trace
