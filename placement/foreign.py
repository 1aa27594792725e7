"""Placement maps of other tools, read as ours: SGLang's JSON and EPLB's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.files import read_json
from profiler.spec import MoESpec


def read_any_map(
    path: Path, model: MoESpec, num_ranks: int | None = None, num_nodes: int | None = None
) -> PlacementMap:
    """Read a placement map, SGLang's initial expert location, or EPLB's physical-to-logical tensor.

    SGLang's JSON is `{"physical_to_logical_map": int[L][P]}` with a row for every hidden layer, dense ones included
    (their rows are passed over), as its release 0.5 reads it.  EPLB's `phy2log` is int (L, P), MoE layers only, in
    .npy, .safetensors (under any one name) or .pt.

    Args:
        model: that the map is for, where the file does not say.
        num_ranks: where the file does not say; slots are shared equally.
        num_nodes: likewise; 1 if None.

    Raises:
        CoterieError: the file cannot be read, is no map of this model, or needs `num_ranks`.
    """
    if path.suffix == ".json":
        value = read_json(path, "a placement map", "make one with `coterie plan`")
        if "schema_version" in value:
            placement = PlacementMap.load_from(path)
            if num_ranks not in (None, placement.topology.num_ranks):
                raise CoterieError(f"--ranks {num_ranks}: {path} is for {placement.topology.num_ranks}; leave it out")
            return placement
        rows, name = _sglang_rows(value, path, model), "SGLang map"
    else:
        rows, name = _read_tensor(path), "EPLB map"
    if rows.ndim != 2 or len(rows) != model.num_layers:
        raise CoterieError(
            f"{path}: a map of shape {rows.shape}, must have a row for each of {model.num_layers} MoE layers"
        )
    if num_ranks is None:
        raise CoterieError(f"{path}: does not say how many ranks it is for; give --ranks")
    num_nodes = num_nodes or 1
    if num_ranks < 1 or num_nodes < 1 or rows.shape[1] % num_ranks or num_ranks % num_nodes:
        raise CoterieError(
            f"{path}: {rows.shape[1]} slots cannot be shared by {num_ranks} ranks on {num_nodes} nodes; give others"
        )
    topology = Topology(num_nodes, num_ranks // num_nodes, rows.shape[1] // num_ranks)
    try:
        return PlacementMap(model, topology, rows.astype(np.int64), {"name": name})
    except CoterieError as error:
        raise CoterieError(f"{path}: {error}") from error


def _sglang_rows(value: dict[str, Any], path: Path, model: MoESpec) -> npt.NDArray[Any]:
    if set(value) != {"physical_to_logical_map"}:
        raise CoterieError(
            f"{path}: neither a placement map of coterie nor of SGLang, which has physical_to_logical_map"
        )
    try:
        rows = np.array(value["physical_to_logical_map"])
    except ValueError:
        rows = np.empty(0)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise CoterieError(f"{path}: physical_to_logical_map must be equally long rows of whole numbers")
    if len(rows) <= model.layer_ids[-1]:
        raise CoterieError(
            f"{path}: {len(rows)} rows, the model's last MoE layer is {model.layer_ids[-1]}; SGLang has a row for "
            "every hidden layer"
        )
    return rows[list(model.layer_ids)]


def _read_tensor(path: Path) -> npt.NDArray[Any]:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays = load_file(path)
            if len(arrays) != 1:
                raise CoterieError(f"{path}: {len(arrays)} tensors, must be one; give phy2log alone")
            return next(iter(arrays.values()))
        if path.suffix == ".pt":
            import torch

            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(loaded, dict):
                loaded = loaded.get("physical_to_logical_map", loaded.get("phy2log"))
            if not isinstance(loaded, torch.Tensor):
                raise CoterieError(f"{path}: holds no tensor physical_to_logical_map or phy2log; save it so")
            return loaded.numpy()
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file") from None
    except CoterieError:
        raise
    except Exception as error:  # what loading a broken file raises is any library's choice
        raise CoterieError(f"{path}: cannot be read as a tensor ({str(error).splitlines()[0]})") from error
    raise CoterieError(f"{path}: not known as a map; give .json, .npy, .safetensors or .pt")
