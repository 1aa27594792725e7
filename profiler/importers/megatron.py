"""What Megatron-LM records with --moe-routing-trace-path: a JSON line for each step, layer and forward call.
Knows no other source, and writes no profile: `recording.py` does.

Checked against `megatron/core/transformer/moe/router_trace.py` of its repository (2026, schema with `block` and
`mtp_idx`).  Each rank writes `router_trace_rank{r}.jsonl`.  Tensor-parallel ranks record the same tokens, or a slice
each under sequence parallelism; other ranks record other tokens.  Layers are numbered within a pipeline stage, which
the files do not name: record with one stage.  Nothing says where sequences begin.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError
from profiler.importers.known import Known
from profiler.importers.recording import Recording, in_rank_order, one_sequence
from profiler.trace import TokenTrace

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Step:
    """What one rank recorded of one step: the calls of each layer, ids (T, K) each, in order."""

    number: int
    calls: dict[int, list[Ids]]
    num_mtp: int


def read_megatron(
    folder: Path, known: Known | None = None, *, domain: str = "megatron", decode: bool = False
) -> Recording:
    """Read the folder of one run, all of its ranks.

    Args:
        known: the model, as far as it is known; `layer_ids` are Megatron's numbers, from 0.
        decode: the phase of all tokens: Megatron does not say it.

    Raises:
        CoterieError: the folder is no such recording, a line of it is broken, or it does not fit `known`.
    """
    known = known or Known()
    if not folder.is_dir():
        raise CoterieError(f"{folder}: no such folder; give the --moe-routing-trace-path of the run")
    paths = in_rank_order(folder, r"router_trace_rank(\d+)\.jsonl")
    if not paths:
        raise CoterieError(f"{folder}: holds no router_trace_rank0.jsonl; give the --moe-routing-trace-path of the run")
    layers: set[int] = set()
    layers_of: dict[Path, set[int]] = {}
    top_k, highest, num_mtp, first = 0, -1, 0, ""
    for path in paths:
        for step in _steps(path):
            num_mtp += step.num_mtp
            layers |= step.calls.keys()
            layers_of.setdefault(path, set()).update(step.calls)
            for layer, calls in step.calls.items():
                for ids_TK in calls:
                    top_k, first = (top_k, first) if top_k else (ids_TK.shape[1], path.name)
                    if ids_TK.shape[1] != top_k:
                        raise CoterieError(
                            f"{path}: top-{ids_TK.shape[1]} in layer {layer}, top-{top_k} in {first}: recordings of "
                            "two models; import them apart"
                        )
                    highest = max(highest, int(ids_TK.max(initial=-1)))
    for path, own in layers_of.items():
        if own and own != layers:
            raise CoterieError(
                f"{path}: has {len(own)} layers, all ranks together {len(layers)}: recordings of two models, or of "
                "several pipeline stages; record one model with one stage"
            )
    if highest < 0:
        raise CoterieError(f"{folder}: no token is recorded; run Megatron with --cuda-graph-impl none")
    model = known.to_spec(folder.name, layers, top_k, None, highest)
    provenance: dict[str, Any] = {"imported_from": [path.name for path in paths], "format": "megatron"}
    provenance |= {"mtp_records_left_out": num_mtp} if num_mtp else {}
    if known.num_experts is None:
        provenance["num_experts_from"] = "the highest id"

    def traces() -> Iterator[TokenTrace]:
        # Emptied first: the tokens may be gone through again.
        provenance["records_of_the_same_tokens"] = provenance["incomplete_steps_left_out"] = 0
        sequence = 0
        for steps in _in_step(paths):
            seen: set[bytes] = set()
            incomplete = False
            for path, step in steps:
                calls = _calls(step, model.layer_ids)
                incomplete |= calls is None
                for ids_LTK in calls or []:
                    content = ids_LTK.tobytes()
                    if content in seen:
                        provenance["records_of_the_same_tokens"] += 1
                        continue
                    seen.add(content)
                    where = f"{path}: step {step.number}"
                    trace = one_sequence(ids_LTK, model, sequence, decode=decode, where=where)
                    sequence += 1
                    yield trace
            provenance["incomplete_steps_left_out"] += incomplete  # once, however many ranks

        if sequence == 0:
            raise CoterieError(
                f"{folder}: no step has all of its {model.num_layers} layers alike; record with one pipeline stage"
            )

    return Recording(model, (domain,), traces, None, provenance)


def _calls(step: _Step, layer_ids: tuple[int, ...]) -> list[Ids] | None:
    """The micro-batches of one step, (L, T, K) each; None if the layers do not agree in their number and tokens.

    With activation recomputation a layer runs twice on the same tokens, which gives two equal records.
    """
    layers = [step.calls.get(layer_id, []) for layer_id in layer_ids]
    if len({len(calls) for calls in layers}) > 1:  # only some layers run twice
        layers = [_different(calls) for calls in layers]
    if len({tuple(len(ids_TK) for ids_TK in calls) for calls in layers}) > 1:
        return None
    return _different([np.stack(parts) for parts in zip(*layers, strict=True) if len(parts[0])])


def _different(arrays: list[Ids]) -> list[Ids]:
    return list({ids.tobytes(): ids for ids in arrays}.values())


def _in_step(paths: list[Path]) -> Iterator[list[tuple[Path, _Step]]]:
    """The steps of all ranks together."""
    merged = heapq.merge(
        *(zip(itertools.repeat(path), _steps(path)) for path in paths), key=lambda pair: pair[1].number
    )
    for _, group in itertools.groupby(merged, key=lambda pair: pair[1].number):
        yield list(group)


def _steps(path: Path) -> Iterator[_Step]:
    """The steps of one rank's file, one in memory at a time."""
    number, num_mtp = -1, 0
    calls: dict[int, list[Ids]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                step, block, layer, ids_TK = _parse(line, f"{path} line {line_number}")
                if step != number:
                    if step < number:
                        raise CoterieError(
                            f"{path} line {line_number}: step {step} after step {number}: two runs in one file?"
                        )
                    if number >= 0:
                        yield _Step(number, calls, num_mtp)
                    number, calls, num_mtp = step, {}, 0
                if block == "mtp":
                    num_mtp += 1
                else:
                    calls.setdefault(layer, []).append(ids_TK)
    except (OSError, UnicodeDecodeError) as error:
        raise CoterieError(f"{path}: cannot be read ({error})") from error
    if number >= 0:
        yield _Step(number, calls, num_mtp)


def _parse(line: str, where: str) -> tuple[int, str, int, Ids]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{where}: truncated, or not JSON ({error}); remove the line or record again") from error
    try:
        step, block, layer, rows = (
            record["step"],
            record.get("block", "decoder"),
            record["layer"],
            record["top_indices"],
        )
        ids_TK = np.array(rows if rows else np.empty((0, record["topk"])))
        if type(step) is not int or type(layer) is not int or min(step, layer) < 0:
            raise ValueError(f"step {step!r} and layer {layer!r} must be whole numbers")
        if ids_TK.ndim != 2 or ids_TK.shape[1] == 0 or not (np.issubdtype(ids_TK.dtype, np.integer) or not rows):
            raise ValueError(f"top_indices is {ids_TK.dtype} {ids_TK.shape}, must be whole numbers (tokens, top-k)")
        if ids_TK.size and (ids_TK.max() > 65_534 or ids_TK.min() < -1):
            raise ValueError(f"expert {ids_TK.max() if ids_TK.max() > 65_534 else ids_TK.min()}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        kind = type(error).__name__
        raise CoterieError(f"{where}: no record of Megatron's router trace ({kind}: {error}); record again") from error
    return step, block, layer, ids_TK.astype(np.int32)
