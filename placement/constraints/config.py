"""Constraints on disk: one safetensors file, its header says for which model and what of it.
Knows no model in memory.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save as to_safetensors

from placement.constraints.constrain import Constraint
from placement.constraints.lists import CollaboratorLists
from placement.constraints.pruning import RankLimit
from profiler.errors import CoterieError
from profiler.files import write_bytes
from profiler.spec import MoESpec

SCHEMA_VERSION = 1
"""Of the constraint's file; another one is refused."""

FILE_NAME = "constraint.safetensors"
"""Its name in the folder of a model that was fine-tuned under it."""


def save(constraint: Constraint, path: Path) -> None:
    """Write the file, renamed into place when complete.

    Raises:
        CoterieError: it cannot be written.
    """
    write_bytes(path, to_bytes(constraint))


def to_bytes(constraint: Constraint) -> bytes:
    """The content of the file."""
    header: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "model": constraint.model.to_json()}
    header |= {"source": dict(constraint.source)}
    tensors: dict[str, np.ndarray[Any, Any]]
    if isinstance(constraint, CollaboratorLists):
        header["method"] = "c2r"
        tensors = {"lists": np.ascontiguousarray(constraint.lists.astype(np.int32))}
    else:
        header |= {"method": "pruning", "limit": constraint.limit, "level": constraint.level}
        tensors = {"held": np.ascontiguousarray(constraint.held.astype(np.uint8))}
        if constraint.similarity is not None:
            tensors["similarity"] = np.ascontiguousarray(constraint.similarity.astype(np.float32))
    return to_safetensors(tensors, {"coterie": json.dumps(header, sort_keys=True)})


def digest_of(constraint: Constraint) -> str:
    """SHA-256 in hex of the file's content."""
    return hashlib.sha256(to_bytes(constraint)).hexdigest()


def load(path: Path) -> Constraint:
    """Read a constraint, or that of a fine-tuned model's folder.

    Raises:
        CoterieError: it is missing, truncated, edited into nonsense, or of another schema version.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise CoterieError(f"{file}: no such file; make a constraint with `coterie constrain`")
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            header = json.loads((stored.metadata() or {})["coterie"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        if header["schema_version"] != SCHEMA_VERSION:
            raise CoterieError(f"schema_version {header['schema_version']!r}, this coterie reads {SCHEMA_VERSION}")
        return _read(header, tensors)
    except CoterieError as error:
        raise CoterieError(f"{file}: {error}") from error
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CoterieError(
            f"{file}: truncated, or not a constraint ({type(error).__name__}: {error}); make it again with "
            "`coterie constrain`"
        ) from error


def _read(header: dict[str, Any], tensors: dict[str, Any]) -> Constraint:
    model = MoESpec.from_json(header["model"])
    source = dict(header["source"])
    if header["method"] == "c2r":
        return CollaboratorLists(model, tensors["lists"].astype(np.int64), source)
    if header["method"] == "pruning":
        if header["level"] not in ("rank", "node") or type(header["limit"]) is not int:
            raise CoterieError(f"level {header['level']!r}, limit {header['limit']!r}: must be rank or node, a number")
        similarity = tensors.get("similarity")
        if similarity is not None and not np.isfinite(similarity).all():
            raise CoterieError("similarity: must be finite numbers")
        return RankLimit(model, tensors["held"].astype(np.bool_), header["limit"], header["level"], similarity, source)
    raise CoterieError(f"method {header['method']!r}: must be c2r or pruning")
