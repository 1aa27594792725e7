"""`PlacementMap`: which logical expert each slot holds, layer by layer, and its file. Knows no solver or engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.files import read_json, to_json_bytes, write_bytes
from profiler.spec import MoESpec

SCHEMA_VERSION = 1
"""Of the map's file; another one is refused."""

EMPTY_SLOT = -1
"""In the place of an expert, where a slot holds none."""


def slots_of_ranks(rank_of_expert: npt.NDArray[np.int64], topology: Topology) -> npt.NDArray[np.int64]:
    """A layer's slots, int64 (P,), where each expert has one copy, on the given rank, int (E,): empty slots last.

    Raises:
        CoterieError: a rank is given more experts than it has slots.
    """
    slots = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY_SLOT, dtype=np.int64)
    for rank in range(topology.num_ranks):
        held = np.flatnonzero(rank_of_expert == rank)
        if len(held) > topology.slots_per_rank:
            raise CoterieError(f"rank {rank} is given {len(held)} experts and has {topology.slots_per_rank} slots")
        slots[rank, : len(held)] = held
    return slots.ravel()


def linear_slots(num_experts: int, num_redundant: int, topology: Topology) -> npt.NDArray[np.int64]:
    """A layer's slots, int64 (P,), with consecutive experts on each rank: empty slots last.

    Redundant experts start again from expert 0, as SGLang's trivial location does: slot p holds expert p mod E where
    every slot is filled.  Where copies do not divide, the first ranks hold one more, as in vLLM.
    """
    num_ranks = topology.num_ranks
    # No rank has more than E of these, so that consecutive numbers mod E never meet on a rank.
    num_copies = min(num_experts + num_redundant, num_experts * num_ranks)
    slots = np.full((num_ranks, topology.slots_per_rank), EMPTY_SLOT, dtype=np.int64)
    sizes = num_copies // num_ranks + (np.arange(num_ranks) < num_copies % num_ranks)
    for row, held in zip(slots, np.split(np.arange(num_copies) % num_experts, np.cumsum(sizes)[:-1]), strict=True):
        row[: len(held)] = np.sort(held)
    return slots.ravel()


@dataclass(frozen=True)
class PlacementMap:
    """A plan for one model on one topology.

    Attributes:
        model: the MoE layers that the plan is for.
        topology: the ranks and slots that it uses.
        physical_to_logical_map: int64 (L, P), the logical expert in each slot, -1 where empty; slot p sits on rank
            p // slots_per_rank.
        solver: what made it: `name`, `options`, `seed`.
        profile_digest: the profile that it was planned on; None for a map that needed none.
        metrics: for each strategy that was compared, `train` and `held_out` figures.
        certificate: by layer number, how far the plan is from the best on the planned tokens.

    Raises:
        CoterieError: an expert is missing or doubled on a rank, or a number is out of range.
    """

    model: MoESpec
    topology: Topology
    physical_to_logical_map: npt.NDArray[np.int64]
    solver: Mapping[str, Any]
    profile_digest: str | None = None
    metrics: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        expected = (self.model.num_layers, self.topology.num_slots)
        slots = self.physical_to_logical_map
        if slots.shape != expected:
            raise CoterieError(f"physical_to_logical_map {slots.shape}: must be (layers, slots) = {expected}")
        if slots.min() < EMPTY_SLOT or slots.max() >= self.model.num_experts:
            worst = int(slots.max() if slots.max() >= self.model.num_experts else slots.min())
            raise CoterieError(f"physical_to_logical_map: expert {worst}, must be -1 or below {self.model.num_experts}")
        for layer_id, row in zip(self.model.layer_ids, slots, strict=True):
            absent = np.setdiff1d(np.arange(self.model.num_experts), row)
            if len(absent):
                raise CoterieError(f"layer {layer_id}: expert {absent[0]} has no slot; every expert needs one")
            for rank, held in enumerate(row.reshape(self.topology.num_ranks, -1)):
                held = np.sort(held[held != EMPTY_SLOT])
                if (held[1:] == held[:-1]).any():
                    raise CoterieError(
                        f"layer {layer_id}: rank {rank} holds one expert twice; a second copy is no use there"
                    )

    @classmethod
    def from_ranks(
        cls,
        model: MoESpec,
        topology: Topology,
        rank_of_expert: npt.NDArray[np.int64],
        solver: Mapping[str, Any],
        profile_digest: str | None = None,
    ) -> Self:
        """A map without redundant experts from the rank of each expert, int (L, E); experts of a rank in file order.

        Raises:
            CoterieError: a rank is given more experts than it has slots.
        """
        slots = np.stack([slots_of_ranks(rank_of_E, topology) for rank_of_E in rank_of_expert])
        return cls(model, topology, slots, solver, profile_digest)

    @classmethod
    def linear(cls, model: MoESpec, topology: Topology, num_redundant: int = 0) -> Self:
        """Experts in file order on the same ranks: what engines do when they are told nothing.

        The map has as many slots a rank as `linear_slots` takes, however many `topology` has.
        """
        slots_per_rank = -(-(model.num_experts + num_redundant) // topology.num_ranks)
        topology = replace(topology, slots_per_rank=slots_per_rank)
        slots = linear_slots(model.num_experts, num_redundant, topology)
        return cls(model, topology, np.tile(slots, (model.num_layers, 1)), {"name": "linear"})

    @property
    def num_redundant(self) -> int:
        """Copies beyond one of each expert, in the layer that has most."""
        return int((self.physical_to_logical_map != EMPTY_SLOT).sum(axis=1).max()) - self.model.num_experts

    @cached_property
    def rank_of_expert(self) -> npt.NDArray[np.int64]:
        """The rank of each logical expert, int64 (L, E).

        Raises:
            CoterieError: the map holds redundant experts, so there is no single rank.
        """
        return self.slot_of_expert // self.topology.slots_per_rank

    @cached_property
    def slot_of_expert(self) -> npt.NDArray[np.int64]:
        """The slot of each logical expert, int64 (L, E).

        Raises:
            CoterieError: the map holds redundant experts, so there is no single slot.
        """
        slots = self.physical_to_logical_map
        filled = int((slots != EMPTY_SLOT).sum(axis=1).max())
        if filled > self.model.num_experts:
            redundant = filled - self.model.num_experts
            raise CoterieError(
                f"the map has {redundant} redundant experts, this step takes maps with 0; plan without them"
            )
        out = np.empty((self.model.num_layers, self.model.num_experts), dtype=np.int64)
        layers, positions = np.nonzero(slots != EMPTY_SLOT)
        out[layers, slots[layers, positions]] = positions
        return out

    def require_model(self, model: MoESpec) -> None:
        """Check that the map is for this model.

        Raises:
            CoterieError: it is for another one.
        """
        if not self.model.routes_like(model):
            raise CoterieError(
                f"the map is for {self.model.describe()}, not for {model.describe()}; plan for this model"
            )

    def save(self, path: Path) -> None:
        """Write the JSON file, renamed into place when complete.

        Raises:
            CoterieError: the file cannot be written.
        """
        write_bytes(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the JSON file."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "topology": self.topology.to_json(),
            "layer_ids": list(self.model.layer_ids),
            "physical_to_logical_map": self.physical_to_logical_map.tolist(),
            "solver": dict(self.solver),
            "profile_digest": self.profile_digest,
            "metrics": self.metrics,
            "certificate": self.certificate,
        }
        return to_json_bytes(value)

    @classmethod
    def load_from(cls, path: Path) -> Self:
        """Read and check a map file.

        Raises:
            CoterieError: it is missing, truncated, edited into nonsense, or of another schema version.
        """
        value = read_json(path, "a placement map", "make one with `coterie plan`")
        try:
            if value["schema_version"] != SCHEMA_VERSION:
                raise CoterieError(f"schema_version {value['schema_version']!r}, this coterie reads {SCHEMA_VERSION}")
            model = MoESpec.from_json(value["model"])
            if value["layer_ids"] != list(model.layer_ids):
                raise CoterieError(f"layer_ids {value['layer_ids']}: must be the model's, {list(model.layer_ids)}")
            rows = value["physical_to_logical_map"]
            if any(type(expert) is not int for row in rows for expert in row) or len({len(row) for row in rows}) != 1:
                raise CoterieError("physical_to_logical_map: must be equally long rows of whole numbers")
            if not isinstance(value["solver"], dict) or not isinstance(value["solver"].get("name"), str):
                raise CoterieError(f"solver {value['solver']!r}: must be an object with a name")
            _check_metrics(value["metrics"])
            json.dumps(value, allow_nan=False)  # a number that is none could not be written again
            return cls(
                model=model,
                topology=Topology.from_json(value["topology"]),
                physical_to_logical_map=np.array(rows, dtype=np.int64),
                solver=value["solver"],
                profile_digest=value["profile_digest"],
                metrics=value["metrics"],
                certificate=value.get("certificate"),
            )
        except CoterieError as error:
            raise CoterieError(f"{path}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CoterieError(f"{path}: not a placement map ({type(error).__name__}: {error}); plan again") from error


def _check_metrics(metrics: Any) -> None:
    """What tables read of a map's metrics is there and is a number, or null where a figure is not defined."""
    for name, figures in (metrics or {}).items():
        for metric in ("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share"):
            for value in (figures["held_out"][metric][which] for which in ("mean", "worst")):
                if type(value) not in (int, float, type(None)):
                    raise CoterieError(f"metrics: {metric} of {name} is {value!r}, must be a number")
        for count in (figures["tokens_planned_on"], figures["tokens_measured_on"]):
            if type(count) is not int:
                raise CoterieError(f"metrics: tokens of {name} are {count!r}, must be a whole number")
