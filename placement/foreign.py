"""Placement maps of other tools, read as ours: all that `exporters` writes, and what the engines' own tools write.
Knows the files of SGLang, TensorRT-LLM, vllm-ascend and EPLB, but runs no engine and writes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.exporters.checkpoint import read_permuted_map
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.errors import CoterieError, first_line
from profiler.files import read_json, read_pt
from profiler.importers.load_balancer import LoadBalancer
from profiler.spec import MoESpec


def read_any_map(
    path: Path, model: MoESpec, num_ranks: int | None = None, num_nodes: int | None = None
) -> PlacementMap:
    """Read a placement map, an engine's file or a permuted checkpoint.

    SGLang's .json or .pt is `{"physical_to_logical_map": int[L][P]}` with a row for every hidden layer, dense ones
    included (their rows are passed over).  TensorRT-LLM's .yaml has rows by global layer number; those of layers that
    the model has not, for multi-token prediction, are passed over.  vllm-ascend's .json has one by MoE ordinal and
    device.  EPLB's `phy2log` is int (L, P), MoE layers only, in .npy, .safetensors (by this name, or under any one
    name) or .pt.  A permuted checkpoint is a folder that `coterie export` wrote.

    Args:
        model: that the map is for, where the file does not say.
        num_ranks: where the file does not say; slots are shared equally.
        num_nodes: likewise; 1 if None.

    Raises:
        CoterieError: the file cannot be read, is no map of this model, or needs `num_ranks`.
    """
    if path.is_dir():
        return _of_these_ranks(read_permuted_map(path), path, num_ranks, num_nodes)
    if path.suffix == ".json":
        value = read_json(path, "a placement map", "make one with `coterie plan`")
        if "schema_version" in value:
            return _of_these_ranks(PlacementMap.load_from(path), path, num_ranks, num_nodes)
        if "layer_list" in value:
            rows, name = _ascend_rows(value, path, num_ranks), "vllm-ascend map"
            if len(rows) == model.num_layers + 1:  # the engine itself writes a draft model's layer behind the others
                rows = rows[:-1]
            num_ranks = len(value["layer_list"][0]["device_list"])
        else:
            rows, name = _sglang_rows(value, path, model), "SGLang map"
    elif path.suffix in (".yaml", ".yml"):
        rows = np.array(LoadBalancer.read(path).rows(path, list(model.layer_ids)))
        name = "TensorRT-LLM map"
    else:
        loaded = _read_tensor(path)
        if isinstance(loaded, dict):
            rows, name = _sglang_rows(loaded, path, model), "SGLang map"
        else:
            rows, name = loaded, "EPLB map"
    if rows.ndim != 2 or len(rows) != model.num_layers:
        raise CoterieError(
            f"{path}: a map of shape {rows.shape}, must have a row for each of {model.num_layers} MoE layers"
        )
    if not np.issubdtype(rows.dtype, np.integer):
        raise CoterieError(f"{path}: a map of {rows.dtype}, must be whole numbers")
    if num_ranks is None:
        raise CoterieError(f"{path}: does not say how many ranks it is for; give --ranks")
    num_nodes = num_nodes or 1
    if num_ranks < 1 or num_nodes < 1 or not rows.shape[1] or rows.shape[1] % num_ranks or num_ranks % num_nodes:
        raise CoterieError(
            f"{path}: {rows.shape[1]} slots cannot be shared by {num_ranks} ranks on {num_nodes} nodes; give others"
        )
    if rows.shape[1] > num_ranks * model.num_experts:  # before a tensor of any claimed size is copied
        raise CoterieError(
            f"{path}: {rows.shape[1]} slots, {num_ranks} ranks with {model.num_experts} experts each fill at most "
            f"{num_ranks * model.num_experts}; is it for another model?"
        )
    topology = Topology(num_nodes, num_ranks // num_nodes, rows.shape[1] // num_ranks)
    try:
        return PlacementMap(model, topology, rows.astype(np.int64), {"name": name})
    except CoterieError as error:
        raise CoterieError(f"{path}: {error}") from error


def _of_these_ranks(placement: PlacementMap, path: Path, num_ranks: int | None, num_nodes: int | None) -> PlacementMap:
    if num_ranks not in (None, placement.topology.num_ranks):
        raise CoterieError(f"--ranks {num_ranks}: {path} is for {placement.topology.num_ranks}; leave it out")
    if num_nodes not in (None, placement.topology.num_nodes):
        raise CoterieError(f"--nodes {num_nodes}: {path} is for {placement.topology.num_nodes}; leave it out")
    return placement


def _rows(value: Any, path: Path, what: str) -> npt.NDArray[Any]:
    """Equally long lists of whole numbers, int (L, P)."""
    if isinstance(value, np.ndarray):
        if value.ndim != 2 or not np.issubdtype(value.dtype, np.integer):
            raise CoterieError(f"{path}: {what} is {value.dtype} {value.shape}, must be whole numbers (layers, slots)")
        return value
    # Looked at before numpy does: nested lists that share their parts can stand for more than any memory holds.
    flat = isinstance(value, list) and all(isinstance(row, list) for row in value)
    if not flat or any(type(item) is not int for row in value for item in row) or len({len(row) for row in value}) != 1:
        raise CoterieError(f"{path}: {what} must be equally long rows of whole numbers")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        raise CoterieError(f"{path}: {what} holds a number that is no expert") from None


def _sglang_rows(value: dict[str, Any], path: Path, model: MoESpec) -> npt.NDArray[Any]:
    if set(value) != {"physical_to_logical_map"}:
        raise CoterieError(
            f"{path}: neither a placement map of coterie nor of SGLang, which has physical_to_logical_map"
        )
    rows = _rows(value["physical_to_logical_map"], path, "physical_to_logical_map")
    if len(rows) <= model.layer_ids[-1]:
        raise CoterieError(
            f"{path}: {len(rows)} rows, the model's last MoE layer is {model.layer_ids[-1]}; SGLang has a row for "
            "every hidden layer"
        )
    if model.num_hidden_layers and len(rows) != model.num_hidden_layers:
        raise CoterieError(f"{path}: {len(rows)} rows, the model has {model.num_hidden_layers} hidden layers")
    return rows[list(model.layer_ids)]


def _ascend_rows(value: dict[str, Any], path: Path, num_ranks: int | None) -> npt.NDArray[Any]:
    try:
        layers = value["layer_list"]
        if value["moe_layer_count"] != len(layers) or [layer["layer_id"] for layer in layers] != list(
            range(len(layers))
        ):
            raise CoterieError(f"{path}: {len(layers)} layers, must be moe_layer_count, numbered from 0")
        rows = []
        for layer in layers:
            devices = layer["device_list"]
            if layer["device_count"] != len(devices) or len(devices) != len(layers[0]["device_list"]) or not devices:
                raise CoterieError(
                    f"{path}: layer {layer['layer_id']} has {len(devices)} devices; all must have as many"
                )
            if [device["device_id"] for device in devices] != list(range(len(devices))):
                raise CoterieError(f"{path}: layer {layer['layer_id']}: devices must be numbered from 0")
            if len({len(device["device_expert"]) for device in devices}) != 1:
                raise CoterieError(f"{path}: layer {layer['layer_id']}: devices must hold equally many experts")
            rows.append([expert for device in devices for expert in device["device_expert"]])
        if num_ranks not in (None, len(layers[0]["device_list"])):
            raise CoterieError(f"--ranks {num_ranks}: {path} is for {len(layers[0]['device_list'])}; leave it out")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CoterieError(f"{path}: not an expert map of vllm-ascend ({type(error).__name__}: {error})") from error
    return _rows(rows, path, "device_expert")


def _read_tensor(path: Path) -> npt.NDArray[Any] | dict[str, Any]:
    """EPLB's tensor, or SGLang's dictionary with an array or lists in it."""
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(path)
            if "phy2log" not in arrays and len(arrays) != 1:
                raise CoterieError(f"{path}: {len(arrays)} tensors and no phy2log; give that one")
            return arrays["phy2log"] if "phy2log" in arrays else next(iter(arrays.values()))
        if path.suffix == ".pt":
            import torch

            loaded = read_pt(path)
            if isinstance(loaded, dict) and "physical_to_logical_map" in loaded:  # a tensor or lists, as SGLang has it
                rows = loaded["physical_to_logical_map"]
                return {**loaded, "physical_to_logical_map": rows.numpy() if isinstance(rows, torch.Tensor) else rows}
            if isinstance(loaded, dict):
                loaded = loaded.get("phy2log")
            if not isinstance(loaded, torch.Tensor):
                raise CoterieError(f"{path}: holds no tensor physical_to_logical_map or phy2log; save it so")
            return loaded.numpy()
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file") from None
    except CoterieError:
        raise
    except Exception as error:  # what loading a broken file raises is any library's choice
        raise CoterieError(f"{path}: cannot be read as a tensor ({first_line(error)})") from error
    raise CoterieError(f"{path}: not known as a map; give .json, .yaml, .npy, .safetensors, .pt or a folder")
