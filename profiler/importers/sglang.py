"""What SGLang records: .pt files of its expert distribution recorder, and routed experts in its responses.
Knows no other engine, and opens no file itself.

Checked against the code of SGLang 0.5.6.post2 and 0.5.23: `srt/eplb/expert_distribution.py` writes the .pt files,
`srt/state_capturer/routed_experts.py` (0.5.23) fills the responses.  A .pt file is read with `weights_only`: plain
containers and tensors, nothing is unpickled.

- `stat`, `stat_approx`: counts by forward pass, layer and logical expert, already summed over all ranks; where several
  ranks process the same tokens, these count several times.
- `per_pass`, `per_token`: each rank writes a file of its own, with physical experts.  Ranks of one attention group
  record the same tokens (tensor parallelism) or a slice each (an all-to-all backend scatters the tokens over them);
  ranks of other attention groups record other tokens.  Without an all-to-all backend all groups' tokens are gathered
  before the router, and every rank records the first rows of the same gathered batch.  All four are told apart by what
  the records of one pass hold.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError
from profiler.importers.known import Known
from profiler.importers.recording import Recording, count_passes, find_files, of_loads
from profiler.importers.responses import EncodedIds, read_responses
from profiler.importers.sglang_records import (
    Record,
    Sequences,
    kind_of,
    load_recording,
    merge_pass,
    read_map,
    read_records,
    require_alike,
    to_trace,
    whole_numbers,
)
from profiler.spec import UNNAMED
from profiler.trace import TokenTrace

TO_GET_TOKENS = "record them with SGLang's --expert-distribution-recorder-mode per_token"
"""What the profile tells whoever asks its counts for more than loads."""

_BYPASSED = "or with --moe-runner-backend triton if SGLang routed inside its kernel"
_PASSES_TOGETHER = 64
_SURE_OF_COPIES = 32  # counts that chance does not give a common divisor
_BLOCK = 128  # rows of a block of DeepGEMM, to which DeepEP rounds counts up


def read_sglang(paths: Sequence[Path], known: Known | None = None, *, domain: str = "sglang") -> Recording:
    """Read recorder files of one server (all ranks, all dumps), or its JSON responses.

    Args:
        paths: .pt files, or .json and .jsonl files, or folders of them.
        known: the model; `top_k` has to be known for counts, and the shape of the layers for responses.

    Raises:
        CoterieError: a file cannot be read, is of another kind or model than the others, or does not fit `known`.
    """
    known = known or Known()
    files = find_files(paths, (".pt", ".json", ".jsonl"))
    if all(file.suffix != ".pt" for file in files):
        how = "start SGLang with --enable-return-routed-experts and send return_routed_experts with each request"
        return read_responses(files, known, domain, "sglang routed_experts", _decode, how)
    loaded = {file: load_recording(file) for file in files if file.suffix == ".pt"}
    kinds = {file: kind_of(file, content) for file, content in loaded.items()}
    if len(loaded) < len(files) or len(set(kinds.values())) > 1:
        odd = next(file for file in files if kinds.get(file) != kinds[next(iter(kinds))])
        raise CoterieError(f"{odd}: another kind of recording than {next(iter(kinds))}; import them apart")
    provenance: dict[str, Any] = {"imported_from": [file.name for file in files]}
    if "stat" in kinds.values():
        return _read_counts(loaded, known, domain, provenance)
    maps = {file: read_map(file, content) for file, content in loaded.items()}
    require_alike({file: (len(map_LP), int(map_LP.max()) + 1) for file, map_LP in maps.items()}, "(layers, experts)")
    records = [record for file in files for record in read_records(file, loaded.pop(file), maps[file], kinds[file])]
    records.sort(key=lambda record: (record.pass_id, record.rank))
    if "per_pass" in kinds.values():
        return _read_passes(records, known, domain, provenance)
    return _read_tokens(records, known, domain, provenance)


def _read_counts(loaded: dict[Path, Any], known: Known, domain: str, provenance: dict[str, Any]) -> Recording:
    top_k = known.require_top_k(str(next(iter(loaded))))
    passes = {
        file: whole_numbers(file, "logical_count", content["logical_count"], 3) for file, content in loaded.items()
    }
    for file, counts in passes.items():
        if counts.min() < 0:
            raise CoterieError(f"{file}: logical_count holds {counts.min()}, must be at least 0; record again")
    require_alike({file: counts.shape[1:] for file, counts in passes.items()}, "(layers, experts)")
    # Without full expert parallelism 0.5.23 has several ranks write the same sums, as pipeline stages do.
    different = {_digest(counts): file for file, counts in reversed(passes.items())}
    provenance["records_of_the_same_tokens"] = len(passes) - len(different)
    passes = {file: counts for file, counts in passes.items() if file in different.values()}
    copies = {file: _copies(counts) for file, counts in passes.items()}
    if max(copies.values()) > 1:
        provenance["ranks_that_counted_each_token"] = max(copies.values())
    parts = (
        counts[start : start + _PASSES_TOGETHER].astype(np.int64) // copies[file]
        for file, counts in passes.items()
        for start in range(0, len(counts), _PASSES_TOGETHER)
    )
    return _of_passes(parts, top_k, known, domain, {**provenance, "format": "sglang stat"})


def _copies(counts: npt.NDArray[Any]) -> int:
    """How often each token was counted: SGLang adds up the counts of all ranks, also of those with the same tokens.

    Not where DeepEP hands over counts that are rounded up to whole blocks, as stat_approx has them.
    """
    common, num_positive = 0, 0
    for start in range(0, len(counts), _PASSES_TOGETHER):
        part = counts[start : start + _PASSES_TOGETHER]
        positive = part[part > 0]
        common, num_positive = int(np.gcd.reduce(positive, initial=common)), num_positive + len(positive)
    return common if num_positive >= _SURE_OF_COPIES and common % _BLOCK else 1


def _digest(counts: npt.NDArray[Any]) -> bytes:
    digest = hashlib.sha256(str(counts.shape).encode())
    for start in range(0, len(counts), _PASSES_TOGETHER):
        digest.update(np.ascontiguousarray(counts[start : start + _PASSES_TOGETHER]).tobytes())
    return digest.digest()


def _of_passes(
    parts: Iterable[npt.NDArray[np.int64]], top_k: int, known: Known, domain: str, provenance: dict[str, Any]
) -> Recording:
    """A recording of counts by pass, in arrays of (passes, hidden layers, E)."""
    load_LE, num_tokens, dummies = np.zeros((1, 1), dtype=np.int64), 0, 0
    for part in parts:
        load, tokens, dummy = count_passes(part, top_k)
        load_LE, num_tokens, dummies = load_LE + load, num_tokens + tokens, dummies + dummy
    layer_ids = np.flatnonzero(load_LE.any(axis=1)).tolist()
    if not layer_ids:
        raise CoterieError(f"no token was counted besides warm-up: record while requests are served, {_BYPASSED}")
    if dummies:
        provenance["dummy_tokens_dropped"] = dummies
    model = known.to_spec(UNNAMED, layer_ids, top_k, load_LE.shape[1])
    sums = load_LE[layer_ids].sum(axis=1)
    if len(set(sums.tolist())) > 1:
        provenance["approximate"] = (
            f"layers count from {sums.min()} to {sums.max()} picks; stat_approx may round counts of each rank, expert "
            f"and pass up to a multiple of {_BLOCK}"
        )
    return of_loads(model, domain, load_LE[layer_ids], num_tokens, provenance, TO_GET_TOKENS)


def _read_passes(records: list[Record], known: Known, domain: str, provenance: dict[str, Any]) -> Recording:
    top_k = known.require_top_k(str(records[0].path))
    provenance |= {"format": "sglang per_pass", "records_of_the_same_tokens": 0}

    def passes() -> Iterator[npt.NDArray[np.int64]]:
        for _, group in itertools.groupby(records, key=lambda record: record.pass_id):
            counts = [record.logical_counts() for record in group]
            counts = [part for part in counts if part.any()]
            # Ranks that see the same tokens count the same; ranks that count their own experts or tokens differ.
            different = {part.tobytes(): part for part in counts}
            provenance["records_of_the_same_tokens"] += len(counts) - len(different)
            if different:
                yield np.sum(list(different.values()), axis=0)[None]

    return _of_passes(passes(), top_k, known, domain, provenance)


def _read_tokens(records: list[Record], known: Known, domain: str, provenance: dict[str, Any]) -> Recording:
    if not records:
        raise CoterieError("no token was recorded: send requests between start and dump")
    layers = np.zeros(len(records[0].logical_of_slot), dtype=np.bool_)
    top_ks: dict[Path, int] = {}
    for record in records:
        picked = record.logical_ids() >= 0
        layers |= picked.any(axis=(1, 2))
        top_ks[record.path] = max(top_ks.get(record.path, 0), int(picked.sum(axis=2).max(initial=0)))
    recorded = {path: top_k for path, top_k in top_ks.items() if top_k}  # a rank may have had no token of its own
    if not recorded:
        raise CoterieError(
            f"{records[0].path}: no token picked an expert; record while requests are served, {_BYPASSED}"
        )
    require_alike(recorded, "top-k")
    top_k = next(iter(recorded.values()))
    model = known.to_spec(UNNAMED, np.flatnonzero(layers).tolist(), top_k, int(records[0].logical_of_slot.max()) + 1)
    provenance |= {"format": "sglang per_token"}

    def traces() -> Iterator[TokenTrace]:
        sequences = Sequences()
        provenance["records_of_the_same_tokens"] = provenance["passes_left_out"] = 0
        for _, group in itertools.groupby(records, key=lambda record: record.pass_id):
            ids, batches = merge_pass(list(group))
            provenance["records_of_the_same_tokens"] += batches
            for record, ids_LTK in ids:
                of_model = ids_LTK[list(model.layer_ids)]
                if (of_model >= 0).any(axis=(1, 2)).all():
                    yield to_trace(record, of_model, model, sequences)
                elif ids_LTK.shape[1]:  # a draft model's, which is recorded beside, or one routed inside a kernel
                    provenance["passes_left_out"] += 1

    return Recording(model, (domain,), traces, None, provenance)


def _decode(encoded: EncodedIds, known: Known) -> npt.NDArray[np.int64]:
    """Ids (tokens, hidden layers, K) of one response: base64 of int32, without their shape."""
    data = encoded.decode()
    if len(data) % 4:
        raise CoterieError(f"{encoded.where}: {len(data)} bytes of routed_experts, must be whole int32; truncated?")
    flat = np.frombuffer(data, dtype="<i4").astype(np.int64)
    top_k = known.require_top_k(encoded.where)
    num_layers = known.num_hidden_layers
    if num_layers is None and encoded.num_tokens and len(flat) % (encoded.num_tokens * top_k) == 0:
        num_layers = len(flat) // (encoded.num_tokens * top_k)
    if not num_layers:
        raise CoterieError(
            f"{encoded.where}: {len(flat)} numbers, whose shape it does not say; give --model, or --num-hidden-layers"
        )
    if len(flat) % (num_layers * top_k):
        raise CoterieError(
            f"{encoded.where}: {len(flat)} numbers are no rows of {num_layers} layers x top-{top_k}; give the --model "
            "that was recorded"
        )
    return flat.reshape(-1, num_layers, top_k)
