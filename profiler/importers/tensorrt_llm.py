"""What TensorRT-LLM records where EXPERT_STATISTIC_ITER_RANGE is set: counts by iteration and layer.
Knows no other engine, and no sequences: what a rank picks in an iteration counts as one.

Checked against `tensorrt_llm/_torch/expert_statistic.py` and `examples/wide_ep/ep_load_balancer/utils.py` of its
repository (1.x).  The folder (EXPERT_STATISTIC_PATH) has `meta_info.json` and `rank{r}.safetensors`, with counts under
`{iteration}_{layer}`; some versions add `rank{r}_raw.safetensors` with the picks of each token, int (T, K).  With
attention data parallelism each rank records its own tokens, else all ranks record the same.  Where its load balancer is
on, what is recorded are slots.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from profiler.errors import CoterieError
from profiler.files import read_json
from profiler.importers.known import Known
from profiler.importers.load_balancer import LoadBalancer
from profiler.importers.recording import (
    Recording,
    count_passes,
    experts_of_slots,
    in_rank_order,
    of_loads,
    one_sequence,
)
from profiler.spec import MoESpec
from profiler.trace import TokenTrace

TO_GET_TOKENS = "TensorRT-LLM counts only; record them with SGLang, vLLM or `coterie profile`"
"""What the profile tells whoever asks its counts for more than loads."""

_ITERATIONS_TOGETHER = 64

Key = tuple[int, int]  # iteration, layer
Files = Mapping[Path, Any]  # opened


def read_tensorrt_llm(
    folder: Path,
    known: Known | None = None,
    *,
    domain: str = "tensorrt-llm",
    load_balancer: Path | None = None,
    decode: bool = False,
) -> Recording:
    """Read one EXPERT_STATISTIC_PATH folder.

    Args:
        known: the model, as far as it is known; layers above its last one (MTP) are left out.
        load_balancer: the YAML file that TensorRT-LLM was given as `moe_config.load_balancer` while recording, if any.
        decode: the phase of all tokens, where they are recorded one by one.

    Raises:
        CoterieError: the folder is no such recording, a file of it is broken, or it does not fit `known`.
    """
    known = known or Known()
    if not folder.is_dir():
        raise CoterieError(f"{folder}: no such folder; give the EXPERT_STATISTIC_PATH of the recording")
    meta = read_json(folder / "meta_info.json", "TensorRT-LLM's meta_info", "give the EXPERT_STATISTIC_PATH folder")
    num_slots, top_k = meta.get("num_experts"), meta.get("num_experts_per_token")
    if type(num_slots) is not int or type(top_k) is not int or not 1 <= top_k <= num_slots:
        raise CoterieError(
            f"{folder / 'meta_info.json'}: num_experts {num_slots!r} and num_experts_per_token {top_k!r} must be whole "
            "numbers, the second at most the first; record again"
        )
    counts = in_rank_order(folder, r"rank(\d+)\.safetensors")
    raw = in_rank_order(folder, r"rank(\d+)_raw\.safetensors")
    if not counts:
        raise CoterieError(
            f"{folder}: holds no rank0.safetensors; the range of iterations was not reached, record longer"
        )
    keys = _keys(counts)
    all_layers = sorted({layer for of_rank in keys.values() for _, layer in of_rank})
    if not all_layers:
        raise CoterieError(f"{folder}: holds no counts; record while requests are served")
    last = known.layer_ids[-1] if known.layer_ids else all_layers[-1]
    layers = [layer for layer in all_layers if layer <= last]
    if not layers:
        raise CoterieError(
            f"{folder}: layers from {all_layers[0]} on are recorded, the model's last one is {last}; give the --model "
            "that was recorded"
        )
    expert_of_slot, num_experts = _assignments(load_balancer, layers, num_slots, known.num_experts, folder)
    model = known.to_spec(folder.name, layers, top_k, num_experts)
    provenance: dict[str, Any] = {"imported_from": [folder.name], "format": "tensorrt-llm"}
    if len(layers) < len(all_layers):
        provenance["layers_left_out"] = all_layers[len(layers) :]
    iterations = sorted({iteration for of_rank in keys.values() for iteration, _ in of_rank})
    load_LE, tokens, dummies, copies = np.zeros((len(layers), num_experts), dtype=np.int64), 0, 0, 0
    with _opened(counts) as files:
        for start in range(0, len(iterations), _ITERATIONS_TOGETHER):
            together = iterations[start : start + _ITERATIONS_TOGETHER]
            passes = np.zeros((len(together), len(layers), num_experts), dtype=np.int64)
            for number, iteration in enumerate(together):
                total_LP, same = _sum_of_ranks(files, keys, iteration, layers, num_slots)
                copies += same
                np.add.at(passes[number], (np.arange(len(layers))[:, None], expert_of_slot), total_LP)
            load, counted, dummy = count_passes(passes, top_k)
            load_LE, tokens, dummies = load_LE + load, tokens + counted, dummies + dummy
    if copies:
        provenance["records_of_the_same_tokens"] = copies
    if raw and set(_numbers(raw)) == set(_numbers(counts)) and _all_there(raw, counts, keys, layers):
        return _of_tokens(raw, model, expert_of_slot, iterations, domain, decode, provenance)
    if raw:
        provenance["raw_files"] = "passed over: they hold fewer tokens than were counted, or a rank's some layers only"
    if dummies:
        provenance["dummy_tokens_dropped"] = dummies
    return of_loads(model, domain, load_LE, tokens, provenance, TO_GET_TOKENS)


def _sum_of_ranks(
    files: Files, keys: Mapping[Path, set[Key]], iteration: int, layers: list[int], num_slots: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Counts of one iteration, (L, P), and how many ranks recorded the same tokens as another."""
    different: dict[bytes, npt.NDArray[np.int64]] = {}
    for path, its_keys in keys.items():
        slots_LP = np.zeros((len(layers), num_slots), dtype=np.int64)
        for place, layer in enumerate(layers):
            if (iteration, layer) in its_keys:
                slots_LP[place] = _read(files, path, (iteration, layer), (num_slots,))
        if slots_LP.min() < 0:
            raise CoterieError(f"{path}: a count of {slots_LP.min()} in iteration {iteration}; record again")
        different[slots_LP.tobytes()] = slots_LP
    return np.sum(list(different.values()), axis=0), len(keys) - len(different)


def _numbers(paths: list[Path]) -> list[str]:
    return [re.sub(r"\D", "", path.name) for path in paths]


@contextlib.contextmanager
def _opened(paths: list[Path]) -> Iterator[Files]:
    """Each file opened once: its header names thousands of tensors."""
    with contextlib.ExitStack() as stack:
        files = {}
        for path in paths:
            with _named(path):
                files[path] = stack.enter_context(safe_open(path, framework="numpy"))
        yield files


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What goes wrong with a file is told in one line."""
    try:
        yield
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise CoterieError(f"{path}: truncated, or no file of TensorRT-LLM ({error}); record again") from error


def _keys(paths: list[Path]) -> dict[Path, set[Key]]:
    keys = {}
    with _opened(paths) as files:
        for path, file in files.items():
            matches = [re.fullmatch(r"(\d{1,9})_(\d{1,9})", name) for name in file.keys()]  # noqa: SIM118 (no mapping)
            if not all(matches):
                raise CoterieError(
                    f"{path}: holds other than <iteration>_<layer>; give a folder that TensorRT-LLM has written"
                )
            keys[path] = {(int(match[1]), int(match[2])) for match in matches if match}
    return keys


def _read(files: Files, path: Path, key: Key, shape: tuple[int | None, ...]) -> npt.NDArray[np.int64]:
    """One tensor, whose dimensions are as given where they are not None."""
    name = f"{key[0]}_{key[1]}"
    with _named(path):
        array: npt.NDArray[Any] = files[path].get_tensor(name)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not np.issubdtype(array.dtype, np.integer) or not fits:
        nan = " with NaN" if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any() else ""
        wanted = " x ".join("tokens" if size is None else str(size) for size in shape)
        raise CoterieError(
            f"{path}: {name} is {array.dtype} {array.shape}{nan}, must be whole numbers ({wanted}); two models?"
        )
    return array.astype(np.int64)


def _assignments(
    path: Path | None, layers: list[int], num_slots: int, known_experts: int | None, folder: Path
) -> tuple[npt.NDArray[np.int64], int]:
    """The expert of each slot, (L, P), and E."""
    if path is None:
        if known_experts is not None and known_experts < num_slots:
            raise CoterieError(
                f"{folder}: {num_slots} slots are recorded, the model has {known_experts} experts: the load balancer "
                "was on; give its YAML file with --load-balancer"
            )
        return np.tile(np.arange(num_slots), (len(layers), 1)), num_slots
    balancer = LoadBalancer.read(path)
    table = np.array(balancer.rows(path, layers))
    if balancer.num_slots != num_slots:
        raise CoterieError(f"{path}: {balancer.num_slots} slots, {num_slots} are recorded; give the one recorded with")
    if balancer.moves:
        raise CoterieError(f"{path}: layer_updates_per_iter moved experts while recording; record with 0")
    return table.astype(np.int64), int(table.max()) + 1


def _all_there(raw: list[Path], counts: list[Path], keys: Mapping[Path, set[Key]], layers: list[int]) -> bool:
    """Whether the raw files hold as many picks as were counted: of a layer that runs in chunks they keep the last.

    And whether each has all layers of its iterations, which a stage of pipeline parallelism has not.
    """
    of_raw = _keys(raw)
    with _opened([*raw, *counts]) as files:
        for path, counted in zip(raw, counts, strict=True):
            wanted = {(iteration, layer) for iteration, other in keys[counted] if other in layers for layer in layers}
            if of_raw[path] != keys[counted] or not wanted <= keys[counted]:
                return False
            for key in keys[counted]:
                if _read(files, path, key, (None, None)).size != _read(files, counted, key, (None,)).sum():
                    return False
    return True


def _of_tokens(
    raw: list[Path],
    model: MoESpec,
    expert_of_slot: npt.NDArray[np.int64],
    iterations: list[int],
    domain: str,
    decode: bool,
    provenance: dict[str, Any],
) -> Recording:
    keys = _keys(raw)

    def slots_of(files: Files, path: Path, iteration: int) -> npt.NDArray[np.int64]:
        parts = [_read(files, path, (iteration, layer), (None, model.top_k)) for layer in model.layer_ids]
        if len({part.shape for part in parts}) > 1:
            raise CoterieError(f"{path}: layers of iteration {iteration} have unlike numbers of tokens")
        slots = np.stack(parts)
        if slots.max(initial=0) >= expert_of_slot.shape[1]:
            raise CoterieError(
                f"{path}: expert {slots.max()} in iteration {iteration}, must be below {expert_of_slot.shape[1]}"
            )
        return slots

    def traces() -> Iterator[TokenTrace]:
        sequence = 0
        with _opened(raw) as files:
            for iteration in iterations:
                seen: set[bytes] = set()
                for path in raw:
                    if not all((iteration, layer) in keys[path] for layer in model.layer_ids):
                        continue
                    slots = slots_of(files, path, iteration)
                    if slots.shape[1] == 0 or slots.tobytes() in seen:
                        continue
                    seen.add(slots.tobytes())
                    ids = experts_of_slots(slots, expert_of_slot)
                    where = f"{path}: iteration {iteration}"
                    trace = one_sequence(ids, model, sequence, decode=decode, where=where)
                    sequence += 1
                    yield trace

    return Recording(model, (domain,), traces, None, {**provenance, "format": "tensorrt-llm raw"})
