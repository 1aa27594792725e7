"""Routing kept as numpy arrays: `.npz`, or `.npy` with `topk_ids` alone. Knows no engine, and unpickles nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError, first_line
from profiler.importers.known import Known
from profiler.profile import Profile
from profiler.spec import MAX_EXPERTS
from profiler.trace import DECODE, MAX_DOMAINS, PREFILL, RowSketch, TokenTrace, ids_dtype

KEYS = (
    "topk_ids",
    "topk_weights",
    "sequence_ids",
    "domain_ids",
    "domain_names",
    "phase",
    "num_experts",
    "layer_ids",
)
"""What a file may hold; only the first is needed. Others are passed over."""


def read_arrays(path: Path, known: Known | None = None, *, decode: bool = False) -> Profile:
    """Read routing as a profile.

    The file holds `topk_ids`, whole numbers (T, L, K), negative where a pick went to no expert; it may hold
    `topk_weights` (T, L, K), `sequence_ids` (T,), `domain_ids` (T,), `domain_names` (D,), `phase` (T,) 0 prefill and 1
    decode, `num_experts`, and `layer_ids` (L,), the global numbers of the MoE layers.

    Args:
        known: the model, as far as it is known; the file's name, its highest id and 1, and layers from 0 on where
            neither the file nor this says more.
        decode: the phase of all tokens, where the file does not say.

    Raises:
        CoterieError: the file cannot be read, or an array does not fit the others or the model; the message names file
            and layer.
    """
    arrays = _load(path)
    try:
        return _to_profile(arrays, known or Known(), decode, path)
    except CoterieError as error:
        raise CoterieError(f"{path}: {error}") from error


def _load(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"topk_ids": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files if key in KEYS}
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file; give a .npz or .npy file") from None
    except Exception as error:  # numpy parses headers as Python, and so fails in all ways that Python can
        raise CoterieError(f"{path}: not readable as .npz or .npy, or truncated ({first_line(error)})") from error


def _experts_seen(ids_TLK: npt.NDArray[Any]) -> int:
    """One more than the highest expert that is picked."""
    all_ones = int(np.iinfo(ids_TLK.dtype).max)
    highest = int(ids_TLK.max())
    if highest < all_ones or ids_TLK.dtype.kind != "u":
        return highest + 1
    if all_ones < MAX_EXPERTS:
        raise CoterieError(
            f"topk_ids holds {all_ones}, which is an expert or, all ones, none: say num_experts in the file or with "
            "--num-experts"
        )
    picked = ids_TLK[ids_TLK != all_ones]
    return int(picked.max()) + 1 if len(picked) else 1


def _to_profile(arrays: Mapping[str, npt.NDArray[Any]], known: Known, decode: bool, path: Path) -> Profile:
    if "topk_ids" not in arrays:
        raise CoterieError(f"holds {', '.join(arrays) or 'no array that is known'}, but no topk_ids; add it")
    ids_TLK = arrays["topk_ids"]
    if ids_TLK.ndim != 3 or not np.issubdtype(ids_TLK.dtype, np.integer) or 0 in ids_TLK.shape:
        raise CoterieError(
            f"topk_ids is {ids_TLK.dtype} {ids_TLK.shape}: must be whole numbers (tokens, layers, top-k)"
        )
    num_tokens, num_layers, top_k = ids_TLK.shape
    said = int(_whole(arrays, "num_experts", ())) if "num_experts" in arrays else known.num_experts
    num_experts = _experts_seen(ids_TLK) if said is None else said
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise CoterieError(f"num_experts {num_experts}: must be between 1 and {MAX_EXPERTS}")
    layer_ids = list(known.layer_ids or range(num_layers))
    if "layer_ids" in arrays:
        layer_ids = _whole(arrays, "layer_ids", (num_layers,)).tolist()
    if len(layer_ids) != num_layers:
        raise CoterieError(f"{len(layer_ids)} layers are given, topk_ids has {num_layers}; they must agree")
    spec = known.to_spec(path.stem, layer_ids, top_k, num_experts)
    if list(spec.layer_ids) != layer_ids:
        raise CoterieError(f"layer_ids {layer_ids}: must be distinct layer numbers, ascending")
    narrow = ids_dtype(num_experts)
    ids_LTK = np.empty((num_layers, num_tokens, top_k), dtype=narrow)
    for layer, layer_id in enumerate(spec.layer_ids):
        ids_TK = ids_TLK[:, layer]
        # All ones in the file's own type mean no expert, as in a profile; with a sign they are -1.
        all_ones = int(np.iinfo(ids_TK.dtype).max) if ids_TK.dtype.kind == "u" else -1
        none = (ids_TK < 0) | ((ids_TK == all_ones) & (all_ones >= num_experts))
        if (ids_TK[~none] >= num_experts).any():
            worst = int(ids_TK[~none].max())
            raise CoterieError(f"topk_ids of layer {layer_id}: expert {worst}, must be below {num_experts}")
        ids_LTK[layer] = ids_TK.astype(narrow)
        ids_LTK[layer][none] = np.iinfo(narrow).max
    domains = _names(arrays)
    domain_ids = _column(arrays, "domain_ids", num_tokens, 0, MAX_DOMAINS - 1).astype(np.uint8)
    domains += [f"domain {number}" for number in range(len(domains), int(domain_ids.max()) + 1)]
    if len(set(domains)) < len(domains):
        raise CoterieError(f"domain_names {domains}: must differ")
    trace = TokenTrace(
        topk_ids=ids_LTK,
        sequence_ids=_column(arrays, "sequence_ids", num_tokens, 0, np.iinfo(np.int32).max).astype(np.int32),
        domain_ids=domain_ids,
        phase=_column(arrays, "phase", num_tokens, DECODE if decode else PREFILL, DECODE).astype(np.uint8),
        topk_weights=_weights(arrays, ids_TLK.shape, spec.layer_ids),
    )
    trace.require(spec, len(domains))
    dummy = RowSketch.empty().add(trace.row_hashes()).dummy_tokens(spec, num_tokens)
    provenance: dict[str, Any] = {"imported_from": path.name, "format": "numpy"}
    if said is None:
        provenance["num_experts_from"] = "the highest id"
    if dummy:
        provenance["dummy_tokens"] = dummy
    return Profile.from_tokens(spec, domains, trace, provenance)


def _whole(arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise CoterieError(f"{name} is {array.dtype} {array.shape}: must be whole numbers {shape}")
    return array


def _column(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, num_tokens: int, default: int, highest: int
) -> npt.NDArray[Any]:
    """One number a token, `default` where the file has none."""
    if name not in arrays:
        return np.full(num_tokens, default)
    column = _whole(arrays, name, (num_tokens,))
    if column.min() < 0 or column.max() > highest:
        worst = int(column.min()) if column.min() < 0 else int(column.max())
        raise CoterieError(f"{name}: {worst}, must be between 0 and {highest}")
    return column


def _names(arrays: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Of domains, as far as the file has them."""
    names = arrays.get("domain_names", np.empty(0, dtype=np.str_))
    if names.ndim != 1 or not np.issubdtype(names.dtype, np.str_) or len(names) > MAX_DOMAINS:
        raise CoterieError(
            f"domain_names is {names.dtype} {names.shape}: must be texts in one dimension, at most {MAX_DOMAINS}"
        )
    return [str(name) for name in names]


def _weights(
    arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, ...], layer_ids: tuple[int, ...]
) -> npt.NDArray[np.float16] | None:
    weights = arrays.get("topk_weights")
    if weights is None:
        return None
    if weights.shape != shape or not np.issubdtype(weights.dtype, np.floating):
        found = f"{weights.dtype} {weights.shape}"
        raise CoterieError(f"topk_weights is {found}: must be floats of the shape of topk_ids, {shape}")
    with np.errstate(over="ignore"):
        narrowed = np.ascontiguousarray(weights.transpose(1, 0, 2)).astype(np.float16)
    broken = np.flatnonzero(~np.isfinite(narrowed).all(axis=(1, 2)))
    if len(broken):
        raise CoterieError(f"topk_weights of layer {layer_ids[broken[0]]}: not finite; the router's output is broken")
    return narrowed
