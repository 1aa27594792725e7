"""Permuted checkpoints: a model's experts in another order, so that linear placement in any engine becomes the plan.

Knows no engine and no torch: which tensors change is in `permutation.py`, how they are rewritten in `shards.py`.
The source is only read. The copy is built beside its place under another name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from placement.exporters.permutation import find_edits, renumberings
from placement.exporters.shards import read_header, rewrite
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError
from profiler.files import behind_link, read_json, require_writable_parent, sync, write_json

MAP_FILE = "coterie-placement.json"
"""In a permuted checkpoint: the plan that it was permuted by."""
INDEX = "model.safetensors.index.json"
"""Which shard holds each tensor, where there are several."""

CONSTRAINT = "constraint.safetensors"
"""`FILE_NAME` of `placement.constraints.config`, which imports torch; reading a map here does not."""
OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".partial"}
"""Endings of files that hold weights in the old order and stay behind."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The one folder of a tokenizer."""
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, GPTQ and AWQ may say what config.json does not."""
SINGLE_EXPERT = re.compile(r'experts[^\w"]{0,6}(?!0-9\])\d')
"""A number behind the word, plain or in a pattern as JSON has it (`experts\\\\.[37]`); `[0-9]` means all of them."""


def permute_checkpoint(
    source: Path,
    target: Path,
    placement: PlacementMap,
    *,
    invert: bool = False,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Rewrite a checkpoint shard by shard; memory is bounded by `shards.CHUNK`.

    Args:
        source: folder with config.json and safetensors files.
        target: folder to make; it may exist if it is empty.
        invert: restore the original of a checkpoint that was permuted by this map.
        on_bytes: called with the bytes written and those in all.

    Raises:
        CoterieError: the source is no such checkpoint, not of the plan's model, permuted already (or by another plan)
            or has a constraint, the plan is no permutation, or the target is not empty or cannot be written.
    """
    _require_new(target, source)
    config = read_text_config(source)
    _require_state(source, placement, invert)
    _require_model(source, config, placement)
    files = _shards(source)
    headers = [read_header(source / file) for file in files]
    num_hidden = placement.model.num_hidden_layers or whole_number(config, "num_hidden_layers", "num_layers")
    layers = renumberings(placement, _groups(config, placement.model.num_groups), invert=invert)
    tensors = [tensor for header in headers for tensor in header.tensors]
    edits = find_edits(tensors, layers, placement.model.num_experts, num_hidden)
    rest = iter(edits)
    edits_of_file = [list(islice(rest, len(header.tensors))) for header in headers]
    total = sum(tensor.end - tensor.start for tensor in tensors)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_bytes:
            on_bytes(done, total)

    target = behind_link(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        for file, its_edits in zip(files, edits_of_file, strict=True):
            rewrite(source / file, partial / file, its_edits, count)
        names = {tensor.name: edit.name for tensor, edit in zip(tensors, edits, strict=True)}
        _write_rest(source, partial, names)
        if not invert:
            placement.save(partial / MAP_FILE)
        sync(file for file in partial.rglob("*") if file.is_file())
        partial.replace(target)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "give a writable place to -o"
        raise CoterieError(f"{target}: cannot be written ({error.strerror}); {remedy}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_text_config(source: Path) -> dict[str, Any]:
    """The part of a checkpoint's config.json that describes its text model, with the other keys beside.

    Raises:
        CoterieError: there is none.
    """
    if not source.is_dir():
        raise CoterieError(f"{source}: no such folder; give a checkpoint on disk, such as a downloaded snapshot")
    config = read_json(source / "config.json", "a model's config", "give the folder of a checkpoint")
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def whole_number(config: Mapping[str, Any], *names: str) -> int:
    """The first of several keys of a config that is there; 0 if none is.

    Raises:
        CoterieError: its value is no whole number.
    """
    name = next((name for name in names if config.get(name) is not None), "")
    value = config.get(name, 0)
    if type(value) is not int or value < 0:
        raise CoterieError(f"config.json: {name} is {value!r}, must be a whole number; give the model's own config")
    return value


def read_permuted_map(folder: Path) -> PlacementMap:
    """The plan that a checkpoint was permuted by.

    Raises:
        CoterieError: it was not permuted by coterie.
    """
    if not (folder / MAP_FILE).is_file():
        raise CoterieError(
            f"{folder}: has no {MAP_FILE}, so coterie did not permute it; give what `coterie export` wrote"
        )
    return PlacementMap.load_from(folder / MAP_FILE)


def _require_new(target: Path, source: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CoterieError(f"{target}: is there already and not an empty folder; give another name to -o")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise CoterieError(f"{target}: is inside the checkpoint that it is made from; give another place to -o")
    if not target.name:
        raise CoterieError(f"{target}: is no name for a folder; give one to -o")
    require_writable_parent(target)


def _require_state(source: Path, placement: PlacementMap, invert: bool) -> None:
    if invert:
        applied = read_permuted_map(source)
        if not np.array_equal(applied.physical_to_logical_map, placement.physical_to_logical_map):
            raise CoterieError(f"{source}: was permuted by another plan, in its {MAP_FILE}; give that one")
    elif (source / MAP_FILE).exists():
        raise CoterieError(
            f"{source}: is permuted already, see its {MAP_FILE}; give the original, or --invert it first"
        )
    if (source / CONSTRAINT).exists():
        raise CoterieError(
            f"{source}: experts' numbers in its {CONSTRAINT} would be old ones; move that file away, and constrain the "
            "exported model anew, from a profile of it"
        )


def _require_model(source: Path, config: Mapping[str, Any], placement: PlacementMap) -> None:
    spec = placement.model
    whole = read_json(source / "config.json", "a model's config", "give the folder of a checkpoint")
    types = {str(config.get("model_type")), str(whole.get("model_type"))}
    known = spec.model_type != "unknown"  # of imported recordings
    if known and not {spec.model_type, spec.model_type.removesuffix("_text")} & types:
        raise CoterieError(f"{source}: is a {' / '.join(sorted(types))}, the plan is for {spec.describe()}")
    if spec.num_experts in (config.get("hidden_size"), spec.hidden_size):
        raise CoterieError(
            f"{source}: hidden size and experts are both {spec.num_experts}, so that shapes do not tell which tensors "
            "are by expert; this model cannot be permuted"
        )
    quantized = {"config.json": json.dumps([part.get("quantization_config") for part in (whole, config)])}
    for path in map(source.joinpath, QUANTIZATION_FILES):
        if path.is_file():
            quantized[path.name] = path.read_text(errors="replace")
    for name, text in quantized.items():
        if SINGLE_EXPERT.search(text):
            raise CoterieError(
                f"{source}: the quantisation in its {name} names single experts, which would be others then; give the "
                "checkpoint that it was quantised from"
            )


def _groups(config: Mapping[str, Any], recorded: int) -> int:
    """Groups that a router chooses from, as its config or the recording of it say; the larger number."""
    groups = whole_number(config, "n_group")
    used = config.get("topk_method") != "greedy" and (whole_number(config, "topk_group") or groups) < groups
    return max(recorded, groups if used else 1)


def _shards(source: Path) -> list[str]:
    found = sorted(path.name for path in source.glob("*.safetensors"))
    if not found:
        raise CoterieError(f"{source}: has no .safetensors files; save the model as safetensors first")
    if not (source / INDEX).exists():
        count = re.search(r"-of-(\d+)\.", found[0])
        if count and int(count[1]) != len(found):
            raise CoterieError(f"{source}: {len(found)} of {int(count[1])} shards are there; download the missing ones")
        return found
    named = sorted(set(_weight_map(source).values()))
    missing = sorted(set(named) - set(found))
    if missing:
        raise CoterieError(f"{source}: {len(missing)} of {len(named)} shards are missing ({missing[0]}); download them")
    return named


def _weight_map(source: Path) -> dict[str, str]:
    names = read_json(source / INDEX, "an index of shards", "download it again").get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in names.values()
    ):
        raise CoterieError(f"{source / INDEX}: weight_map must name a file for each tensor; download it again")
    return names


def _write_rest(source: Path, target: Path, new_name: Mapping[str, str]) -> None:
    """The index with the new names, and config, tokenizer and whatever other files lie beside the weights."""
    if (source / INDEX).exists():
        index = read_json(source / INDEX, "an index of shards", "download it again")
        absent = sorted(set(_weight_map(source)) - set(new_name))
        if absent:
            raise CoterieError(f"{source / INDEX}: names {absent[0]}, which no shard has; download it again")
        index["weight_map"] = {new_name[name]: file for name, file in _weight_map(source).items()}
        write_json(target / INDEX, index)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in OTHER_WEIGHTS and path.name not in (INDEX, MAP_FILE):
            shutil.copyfile(path, target / path.name)
        elif path.name == CHAT_TEMPLATES:
            shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
