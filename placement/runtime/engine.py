"""Inside transformers' own engine: models loaded with a `DistributedConfig` run expert-parallel as a map says.
Loads no model, and knows no other engine.

    engine = register(PlacementMap.load_from(Path("plan.json")))
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=4, ep_size=4, ep_implementation="coterie")
    )

transformers owns experts contiguously and fills its tensors with those of the checkpoint.  In the first forward pass
the ranks exchange experts once.  Where the map only permutes them, they change places in transformers' own tensors.
Maps with copies or empty slots have other sizes, so the slots get tensors of their own: made once for inference, and in
every forward pass with gradients, where those of all copies sum up in transformers' tensors, for its optimizer to see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import EPImplementationInterface

from placement.placement_map import PlacementMap
from placement.runtime.agreement import require_fit, require_same
from placement.runtime.exchange import Route
from placement.runtime.experts import CoterieEP, Groups, Options
from placement.runtime.meter import Meter
from placement.runtime.sharding import Resharding
from placement.runtime.slots import SlotChoice
from profiler.errors import CoterieError
from profiler.families import packed_shape

NAME = "coterie"
"""What `ep_implementation` calls this engine."""


def register(placement: PlacementMap, options: Options | None = None, meter: Meter | None = None) -> Engine:
    """Make a map what `ep_implementation="coterie"` means for models loaded from now on; all ranks give the same.

    Args:
        options: how tokens travel.
        meter: counts what the models' layers send.
    """
    engine = Engine(placement, Groups(options or Options(), meter or Meter()))
    EPImplementationInterface.register(NAME, engine)
    return engine


@dataclass
class Engine:
    """What transformers calls with each experts module of a model, in layer order.

    Attributes:
        placement: the map.
        groups: the routes that the layers share.
        layers: what was made so far, one for each MoE layer of the last model.
    """

    placement: PlacementMap
    groups: Groups
    layers: list[PlacedExperts] = field(default_factory=list)

    def __call__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> PlacedExperts:
        """The next layer's implementation.

        Raises:
            CoterieError: the map is for other ranks or experts, or another rank has another map or other options.
        """
        # All layers of one model share its mesh, and most its config.
        config = getattr(experts, "config", None)
        first = self.layers[0] if self.layers else None
        if first and (ep_mesh is not first.ep_mesh or config is not getattr(first.experts, "config", None)):
            self.layers = []
        model, num_ranks = self.placement.model, ep_mesh.size()
        require_fit(self.placement, max(model.num_layers, len(self.layers) + 1), num_ranks)
        shape = packed_shape(experts)
        expected = (model.num_experts, model.hidden_size or shape[1], model.expert_size or shape[2])
        if shape != expected:
            raise CoterieError(f"the map is for (experts, hidden size, expert size) {expected}, this model has {shape}")
        if not self.layers:
            require_same(self.placement, self.groups.options, ep_mesh.get_group(), ep_mesh.device_type)
        layer, rank = len(self.layers), ep_mesh.get_local_rank()
        slots = SlotChoice(self.placement, layer, rank, self.groups.options.choice)
        route = self.groups.route(ep_mesh.get_group(), self.placement, slots.slots_per_rank)
        placed = PlacedExperts(experts, ep_mesh, tp_mesh, slots, route, self)
        self.layers.append(placed)
        return placed

    def restore(self) -> None:
        """Put the experts back in file order, as before reading them; the next forward pass places them again.

        All ranks call it together, and not between a backward pass and the optimizer's step: gradients stay where they
        are.  `state_dict` and `load_state_dict` are in file order by themselves.
        """
        for layer in self.layers:
            layer.restore()


class PlacedExperts(CoterieEP):
    """One layer of a model that transformers sharded: `CoterieEP` on weights that change places after loading."""

    def __init__(
        self,
        experts: nn.Module,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        slots: SlotChoice,
        route: Route,
        engine: Engine,
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh, slots, route)
        self._sum_over_copies = None  # exchanging the weights sums their gradients already
        self._engine = engine
        num_ranks, wanted = ep_mesh.size(), slots.logical_of_rank
        per_rank = self.num_local_experts
        self._contiguous = [list(range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(num_ranks)]
        self._permutes = not slots.has_copies and all(len(held) == per_rank for held in wanted)
        self._to_slots = Resharding(self._contiguous, wanted, ep_mesh.get_group())
        self._is_placed = wanted == self._contiguous
        self._copied: dict[str, torch.Tensor] = {}
        experts.register_load_state_dict_pre_hook(lambda *_: self.restore())
        experts.register_state_dict_post_hook(lambda *arguments: self._write_in_file_order(*arguments))

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of the experts in this rank's slots, which change places on the first call."""
        built, planned = len(self._engine.layers), self._engine.placement.model.num_layers
        if built != planned:
            raise CoterieError(f"the map has {planned} MoE layers, the model {built}; plan for this model")
        if not self._permutes:
            return self._copies()
        if not self._is_placed:
            self._exchange_in_place(self._to_slots)
            self._is_placed = True
        return _local(self.experts)

    def restore(self) -> None:
        """Put the experts back in file order."""
        self._copied = {}
        if self._is_out_of_order:
            self._exchange_in_place(self._to_file_order())
            self._is_placed = False

    @property
    def _is_out_of_order(self) -> bool:
        return self._permutes and self._is_placed and self.slots.logical_of_rank != self._contiguous

    def _to_file_order(self) -> Resharding:
        return Resharding(self.slots.logical_of_rank, self._contiguous, self.ep_mesh.get_group())

    @torch.no_grad()
    def _write_in_file_order(self, experts: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Copies in the place of what is in another order: an optimizer's step may follow, for weights as they are."""
        if not self._is_out_of_order:
            return
        plan = self._to_file_order()
        for name, weight in experts._parameters.items():
            if weight is None:
                continue
            held, key = state[prefix + name], prefix + name
            state[key] = part = self._exchanged(held, plan)
            if isinstance(held, DTensor):
                state[key] = DTensor.from_local(
                    part, held.device_mesh, held.placements, shape=held.shape, stride=held.stride()
                )

    def _copies(self) -> Mapping[str, torch.Tensor]:
        held = _local(self.experts)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in held.values()):
            self._copied = {}  # an optimizer's step may follow
            return {name: self._to_slots(weight) for name, weight in held.items()}
        if not self._copied:
            self._copied = {name: self._to_slots(weight.detach()) for name, weight in held.items()}
        return self._copied

    @torch.no_grad()
    def _exchange_in_place(self, plan: Resharding) -> None:
        """Overwrite transformers' tensors, which FSDP may have sharded once more over ranks with the same experts."""
        fsdp: Any = self.experts if isinstance(self.experts, FSDPModule) else None
        if fsdp is not None:
            fsdp.reshard()  # its full tensors are made anew for each pass, and may have less precision
        for weight in self.experts._parameters.values():
            if weight is not None:
                _part(weight).copy_(self._exchanged(weight, plan))
        if fsdp is not None:
            fsdp.unshard()

    def _exchanged(self, weight: torch.Tensor, plan: Resharding) -> torch.Tensor:
        """What a rank's part of a weight becomes."""
        part, same_experts = _part(weight), _mesh_of_copies(weight)
        if same_experts is None:
            return plan(part)
        size, at = same_experts.size(), same_experts.get_local_rank()
        rows = -(-self.num_local_experts // size)
        padded = part.new_zeros((rows, *part.shape[1:]))
        padded[: len(part)] = part
        gathered = part.new_empty((size * rows, *part.shape[1:]))
        dist.all_gather_single(gathered, padded, group=same_experts.get_group())
        placed = plan(gathered[: self.num_local_experts])
        return placed[at * rows :][: len(part)]


def _local(experts: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: weight.to_local() if isinstance(weight, DTensor) else weight
        for name, weight in experts._parameters.items()
        if weight is not None
    }


def _part(weight: torch.Tensor) -> torch.Tensor:
    """Written to without telling autograd: a forward pass may be about to use it, and does so afterwards."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).data


def _mesh_of_copies(weight: torch.Tensor) -> DeviceMesh | None:
    """The ranks between which FSDP shards the same experts, if there are several."""
    names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
    mesh = weight.device_mesh["efsdp"] if isinstance(weight, DTensor) and "efsdp" in names else None
    return mesh if mesh is not None and mesh.size() > 1 else None
