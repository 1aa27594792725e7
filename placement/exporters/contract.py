"""What every exporter is: a pure function from a map to the bytes of one file and the command that uses it.

The only place that writes them. Knows no engine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placement.placement_map import EMPTY_SLOT, PlacementMap
from profiler.errors import CoterieError
from profiler.files import require_writable, to_json_bytes, write_together
from profiler.spec import UNNAMED

PROVENANCE = ".provenance.json"
"""What the name of a sidecar adds to that of the engine's file."""

ON_EVERY_HOST = "every host reads the file: copy it to the same path on each"
"""What is remarked where a plan is for several nodes."""


@dataclass(frozen=True)
class Engine:
    """One engine's way to load a plan.

    Attributes:
        name: for messages.
        checked_against: the versions whose code the format was checked against.
        suffixes: that the engine takes for the file.
        export: the file and its use, out of (map, where it will be, what else is known of the model).
    """

    name: str
    checked_against: str
    suffixes: tuple[str, ...]
    export: Callable[[PlacementMap, Path, ServedModel], Export]


@dataclass(frozen=True)
class Export:
    """One file for an engine.

    Attributes:
        content: its bytes.
        start: a command or configuration to start the engine with it from.
        remarks: what a person should know before, a sentence each.
    """

    content: bytes
    start: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServedModel:
    """What an engine asks of a model and a plan does not say.

    Attributes:
        total: decoder layers, dense ones included; 0 where not known.
        num_mtp: layers for multi-token prediction behind them, which hold experts too; the plan has none for these.
        path: folder or hub id that the engine is to load; empty for the plan's name of the model.
        model_type: in the model's config; empty where that is not known, or the plan says it.
    """

    total: int = 0
    num_mtp: int = 0
    path: str = ""
    model_type: str = ""

    def __post_init__(self) -> None:
        if self.total < 0 or self.num_mtp < 0:
            raise CoterieError(f"{self.total} hidden and {self.num_mtp} MTP layers: must be 0 or more; 0 is not known")

    def path_of(self, placement: PlacementMap) -> str:
        """What to write for the model in a command; MODEL where nobody knows."""
        known = "" if placement.model.name == UNNAMED else placement.model.name
        return self.path or known or "MODEL"

    def require_total(self, placement: PlacementMap, engine: str) -> int:
        """The number of decoder layers.

        Raises:
            CoterieError: it is not known, or smaller than the plan's last MoE layer asks for.
        """
        first, last = placement.model.layer_ids[0], placement.model.layer_ids[-1]
        if not self.total:
            raise CoterieError(
                f"{engine} needs the number of all hidden layers, the plan knows only MoE layers {first} to {last}; "
                "give --num-hidden-layers, or --model with the model's folder"
            )
        if self.total <= last:
            raise CoterieError(
                f"{self.total} hidden layers: the plan's last MoE layer is {last}; give at least {last + 1}"
            )
        return self.total


def full_rows(placement: PlacementMap, engine: str) -> list[list[int]]:
    """The map as lists, L of P, for engines in which every slot holds an expert.

    Raises:
        CoterieError: a slot is empty.
    """
    slots = placement.physical_to_logical_map
    empty = int((slots == EMPTY_SLOT).sum(axis=1).max())
    if empty:
        num_slots, num_experts = placement.topology.num_slots, placement.model.num_experts
        raise CoterieError(
            f"the map has {empty} empty slots of {num_slots} in a layer, {engine} fills every slot; "
            f"plan with --redundant-experts {num_slots - num_experts}, or for ranks that divide {num_experts}"
        )
    rows: list[list[int]] = slots.tolist()
    return rows


def write_export(engine: Engine, placement: PlacementMap, path: Path, served: ServedModel) -> Export:
    """Write an engine's file and beside it where it comes from; both or none.

    Raises:
        CoterieError: the engine cannot express the map or takes no file of that name, or it cannot be written; an
            older export of that name is still there then.
    """
    if path.suffix not in engine.suffixes:
        raise CoterieError(f"{path}: {engine.name} takes {' or '.join(engine.suffixes)}; give such a name to -o")
    require_writable(path)
    export = engine.export(placement, path.absolute(), served)
    if placement.topology.num_nodes > 1:
        export = replace(export, remarks=(*export.remarks, ON_EVERY_HOST))
    sidecar = path.with_name(path.name + PROVENANCE)
    provenance = to_json_bytes(_provenance(engine, placement, path, export))
    write_together({path: [export.content], sidecar: [provenance]})
    return export


def _provenance(engine: Engine, placement: PlacementMap, path: Path, export: Export) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "file": path.name,
        "sha256": hashlib.sha256(export.content).hexdigest(),
        "engine": engine.name,
        "checked_against": engine.checked_against,
        "start": export.start,
        "remarks": list(export.remarks),
        "coterie": importlib.metadata.version("coterie"),
        "model": placement.model.to_json(),
        "topology": placement.topology.to_json(),
        "solver": dict(placement.solver),
        "profile_digest": placement.profile_digest,
    }
