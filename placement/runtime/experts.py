"""Two ways to bring the experts of each rank their tokens: coterie's, and transformers' own as the peer.
Knows nothing of a model but its experts modules, and not how these compute: `grouped.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation

from placement.choice import Choice
from placement.placement_map import PlacementMap
from placement.runtime.agreement import require_fit, require_same
from placement.runtime.exchange import Pairs, Route, combine, dispatch, index_hop, make_route, plan_sizes
from placement.runtime.grouped import run_experts
from placement.runtime.meter import Meter
from placement.runtime.sharding import SumOverCopies, local_experts
from placement.runtime.slots import SlotChoice
from profiler.errors import CoterieError


@dataclass(frozen=True)
class Options:
    """How coterie exchanges tokens.

    Attributes:
        mode: "flat" sends a token once to each rank that serves it; "hierarchical" once to each node, over the
            network, and there once to each rank.
        wire_dtype: in which hidden states, partial sums and their gradients travel; None for exact ones.
        choice: who chooses among copies, as in `placement.cost.evaluate`.
    """

    mode: Literal["flat", "hierarchical"] = "flat"
    wire_dtype: torch.dtype | None = None
    choice: Choice = "token"

    def __post_init__(self) -> None:
        for name, known in (("mode", ("flat", "hierarchical")), ("choice", ("token", "source"))):
            if getattr(self, name) not in known:
                raise CoterieError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(known)}")


@dataclass
class Groups:
    """The routes of one model's layers, which share their process groups.

    Attributes:
        options: how tokens travel.
        meter: counts what all of its layers send.
    """

    options: Options
    meter: Meter
    _groups: dict[Any, Route] = field(default_factory=dict)

    def route(self, group: dist.ProcessGroup, placement: PlacementMap, slots_per_rank: int) -> Route:
        """The route of a layer, made on the first call with these arguments; all ranks call it in the same order."""
        ranks_per_node, mode = placement.topology.ranks_per_node, self.options.mode
        key = (group, ranks_per_node)
        if key not in self._groups:
            self._groups[key] = make_route(
                group,
                ranks_per_node,
                hierarchical=mode == "hierarchical",
                wire_dtype=self.options.wire_dtype,
                meter=self.meter,
            )
        return self._groups[key].with_slots(slots_per_rank)


class CoterieEP(EPImplementation):  # type: ignore[misc]
    """Each token once per destination rank, summed over a rank's experts before the return trip."""

    def __init__(
        self,
        experts: nn.Module,
        ep_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        slots: SlotChoice,
        route: Route,
    ) -> None:
        """Take the rank's own experts.

        Args:
            experts: the experts module; what `weights` gives has to be the experts in this rank's filled slots.
            slots: which slot serves each pick.
            route: how to get there.
        """
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.slots, self.route = experts, slots, route
        self.num_slots = len(slots.logical_of_rank[ep_mesh.get_local_rank()])
        group = ep_mesh.get_group()
        self._sum_over_copies = SumOverCopies(slots.logical_of_rank, group) if slots.has_copies else None

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights of the experts in this rank's filled slots, by name."""
        held = {name: weight for name, weight in self.experts._parameters.items() if weight is not None}
        return self._sum_over_copies(held) if self._sum_over_copies is not None and torch.is_grad_enabled() else held

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted expert output of each of this rank's tokens, (T, H); a pick with an id of no expert adds nothing."""
        num_tokens = len(hidden_states)
        if self.tp_mesh.size() > 1:
            hidden_states, top_k_index, top_k_weights = (
                self._own_slice(values) for values in (hidden_states, top_k_index, top_k_weights)
            )
        out = self._run(hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() == 1:
            return out
        shape = torch.Size((num_tokens, out.shape[1]))
        sliced = DTensor.from_local(out.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1))
        return sliced.full_tensor()

    def _own_slice(self, values: torch.Tensor) -> torch.Tensor:
        # Ranks that share a batch send a part of it each; the gradients of the parts are gathered on the way back.
        shared = DTensor.from_local(values, self.tp_mesh, [Replicate()], run_check=False)
        return shared.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _run(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        route, meter = self.route, self.route.meter
        row_counts, indices = [len(hidden)], []
        with meter.phase("dispatch"):
            with meter.indexing():
                slots_TK = self.slots.slots_of(topk_ids)
                token = torch.arange(len(hidden), device=hidden.device).repeat_interleave(slots_TK.shape[1])
                pairs = Pairs(token, slots_TK.flatten(), topk_weights.flatten())
            sizes = plan_sizes(slots_TK, route)
            rows = hidden
            for hop, size in zip(route.hops, sizes, strict=True):
                with meter.indexing():
                    index = index_hop(pairs, hop, size)
                meter.count_rows(size.rows.to, hop.member, hop.across_nodes)
                rows, pairs = dispatch(rows, pairs, index, hop, route)
                row_counts.append(len(rows))
                indices.append(index)
            meter.count_served(sum(sizes[-1].rows.to), row_counts[-1], len(pairs.row))
        with meter.phase("expert"):
            rows = run_experts(self.experts, self.weights(), rows, pairs, self.num_slots)
        with meter.phase("combine"):
            for hop, index, num_rows in reversed(list(zip(route.hops, indices, row_counts[:-1], strict=True))):
                rows = combine(rows, index, hop, num_rows, route)
        return rows


class MeteredAllToAllEP(AllToAllEP):  # type: ignore[misc]
    """transformers' `all_to_all` expert parallelism as it is, with a meter around its three steps.

    It sends each (token, expert) pair and owns experts contiguously, so it takes a map by renaming experts to slots.
    """

    def __init__(
        self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, slots: SlotChoice, route: Route
    ) -> None:
        if slots.has_copies or len({len(held) for held in slots.logical_of_rank}) > 1:
            raise CoterieError(
                "transformers' all_to_all owns each expert once, as many on each rank: "
                "this map has copies or empty slots; give it one without"
            )
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.slots = experts, slots
        self.meter = meter = route.meter
        node = ep_mesh.get_local_rank() // slots.ranks_per_node
        self._across_nodes = [other // slots.ranks_per_node != node for other in range(ep_mesh.size())]
        experts_forward: Callable[..., torch.Tensor] = experts.forward

        def metered_forward(*args: torch.Tensor) -> torch.Tensor:
            with meter.phase("expert"):
                return experts_forward(*args)

        self.experts_forward = metered_forward

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted expert output of each of this rank's tokens, (T, H)."""
        output: torch.Tensor = super().__call__(hidden_states, self.slots.slots_of(top_k_index), top_k_weights)
        return output

    def _dispatch_tokens(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        with self.meter.phase("dispatch"):
            tokens, expert_ids, weights, state = super()._dispatch_tokens(hidden_states, top_k_index, top_k_weights)
        self.meter.count_rows(state.send_sizes, self.ep_mesh.get_local_rank(), self._across_nodes)
        self.meter.count_served(sum(state.send_sizes), sum(state.recv_sizes), sum(state.recv_sizes))
        self._count(tokens, state.send_sizes)
        return tokens, expert_ids, weights, state

    def _combine_tokens(self, expert_output: Any, state: Any) -> Any:
        self._count(expert_output, state.recv_sizes)
        with self.meter.phase("combine"):
            return super()._combine_tokens(expert_output, state)

    def _count(self, rows: torch.Tensor, rows_to: list[int]) -> None:
        row_bytes = rows.shape[-1] * rows.element_size()
        if torch.is_grad_enabled() and rows.requires_grad:
            row_bytes *= 2  # their gradients come back
        self.meter.count_sent(rows_to, row_bytes, self.ep_mesh.get_local_rank(), self._across_nodes)


MakeEP = Callable[[nn.Module, DeviceMesh, DeviceMesh, SlotChoice, Route], EPImplementation]

IMPLEMENTATIONS: dict[str, MakeEP] = {"HF all_to_all": MeteredAllToAllEP, "coterie": CoterieEP}
"""By the name that rows of a bench give them."""


class HasExperts(Protocol):
    """What `build_implementations` reads of a layer: a `MoELayer`, or any holder of a bare experts module."""

    @property
    def experts(self) -> nn.Module:
        """The module with all experts of the layer."""


def build_implementations(
    layers: Sequence[HasExperts],
    placement: PlacementMap,
    make_ep: MakeEP,
    ep_mesh: DeviceMesh,
    tp_mesh: DeviceMesh,
    meter: Meter,
    options: Options | None = None,
) -> list[EPImplementation]:
    """One implementation for each MoE layer, holding the experts that the map gives to this rank.

    Args:
        layers: of a model that is whole on every rank, as `find_moe_layers` gives them, or of bare experts modules.

    Raises:
        CoterieError: the map has other layers or ranks, another rank has another map or other options, or a family
            keeps its experts in a way that cannot be cut.
    """
    require_fit(placement, len(layers), ep_mesh.size())
    options = options or Options()
    require_same(placement, options, ep_mesh.get_group(), next(layers[0].experts.parameters()).device)
    groups = Groups(options, meter)
    rank = ep_mesh.get_local_rank()
    implementations = []
    for index, layer in enumerate(layers):
        slots = SlotChoice(placement, index, rank, groups.options.choice)
        local = local_experts(layer.experts, slots.logical_of_rank[rank])
        route = groups.route(ep_mesh.get_group(), placement, slots.slots_per_rank)
        implementations.append(make_ep(local, ep_mesh, tp_mesh, slots, route))
    return implementations


@contextmanager
def installed(layers: Sequence[HasExperts], implementations: Sequence[Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Let a model's experts modules run through the given implementations while inside."""
    for layer, implementation in zip(layers, implementations, strict=True):
        layer.experts.forward = implementation
    try:
        yield
    finally:
        for layer in layers:
            del layer.experts.__dict__["forward"]  # the class's own again
