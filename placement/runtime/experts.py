"""The experts of one rank and two ways to bring them their tokens: coterie's, and transformers' own as the peer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation

from placement.placement_map import PlacementMap
from placement.runtime.exchange import build_index, combine, dispatch
from placement.runtime.meter import Meter
from profiler.families import MoELayer


class CoterieEP(EPImplementation):  # type: ignore[misc]
    """Each token once per destination rank, summed over a rank's experts before the return trip."""

    def __init__(
        self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, slot_of_expert: torch.Tensor, meter: Meter
    ) -> None:
        """Take the rank's own experts.

        Args:
            experts: the experts module, holding only the experts in this rank's slots.
            slot_of_expert: int64 (E,), the global slot of each logical expert.
        """
        super().__init__(experts, ep_mesh, tp_mesh)
        self.slot_of_expert = slot_of_expert
        self.meter = meter
        self.group = ep_mesh.get_group()

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted expert output of each of this rank's tokens, (T, H)."""
        slots_per_rank = int(self.num_local_experts)
        with self.meter.phase("dispatch"):
            index = build_index(self.slot_of_expert[top_k_index], slots_per_rank, self.group)
            arrived = dispatch(hidden_states, top_k_weights, index, slots_per_rank, self.group, self.meter)
        with self.meter.phase("expert"):
            partial_sums = torch.zeros_like(arrived.hidden)
            if len(arrived.row_of_pair):
                outputs = self.experts_forward(
                    arrived.hidden.index_select(0, arrived.row_of_pair),
                    arrived.slot_of_pair.unsqueeze(-1),
                    arrived.weight_of_pair.to(arrived.hidden.dtype).unsqueeze(-1),
                )
                partial_sums = partial_sums.index_add(0, arrived.row_of_pair, outputs)
        with self.meter.phase("combine"):
            return combine(partial_sums, index, len(hidden_states), self.group, self.meter)


class MeteredAllToAllEP(AllToAllEP):  # type: ignore[misc]
    """transformers' `all_to_all` expert parallelism as it is, with a meter around its three steps.

    It sends each (token, expert) pair and owns experts contiguously, so it takes a map by renaming experts to slots.
    """

    def __init__(
        self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, slot_of_expert: torch.Tensor, meter: Meter
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.slot_of_expert = slot_of_expert
        self.meter = meter
        experts_forward: Callable[..., torch.Tensor] = experts.forward

        def metered_forward(*args: torch.Tensor) -> torch.Tensor:
            with meter.phase("expert"):
                return experts_forward(*args)

        self.experts_forward = metered_forward

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted expert output of each of this rank's tokens, (T, H)."""
        output: torch.Tensor = super().__call__(hidden_states, self.slot_of_expert[top_k_index], top_k_weights)
        return output

    def _dispatch_tokens(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        with self.meter.phase("dispatch"):
            tokens, expert_ids, weights, state = super()._dispatch_tokens(hidden_states, top_k_index, top_k_weights)
        rank = self.ep_mesh.get_local_rank()
        self.meter.rows_sent += sum(state.send_sizes)
        self.meter.count_sent(tokens, state.send_sizes, rank)
        return tokens, expert_ids, weights, state

    def _combine_tokens(self, expert_output: Any, state: Any) -> Any:
        self.meter.count_sent(expert_output, state.recv_sizes, self.ep_mesh.get_local_rank())
        with self.meter.phase("combine"):
            return super()._combine_tokens(expert_output, state)


MakeEP = Callable[[nn.Module, DeviceMesh, DeviceMesh, torch.Tensor, Meter], EPImplementation]

IMPLEMENTATIONS: dict[str, MakeEP] = {"HF all_to_all": MeteredAllToAllEP, "coterie": CoterieEP}


def local_experts(experts: nn.Module, logical_ids: Sequence[int]) -> nn.Module:
    """A copy of an experts module that holds only some experts, in the given order; the original is left as it is.

    Every parameter's first dimension is the expert in all families that transformers can run expert-parallel.
    """
    local = copy.copy(experts)
    rows = torch.tensor(logical_ids, device=next(experts.parameters()).device)
    local._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach()[rows], parameter.requires_grad)
        for name, parameter in experts._parameters.items()
    }
    local.num_experts = len(logical_ids)  # type: ignore[assignment]
    return local


def build_implementations(
    layers: Sequence[MoELayer],
    placement: PlacementMap,
    make_ep: MakeEP,
    ep_mesh: DeviceMesh,
    tp_mesh: DeviceMesh,
    meter: Meter,
) -> list[EPImplementation]:
    """One implementation for each MoE layer, holding the experts that the map gives to this rank.

    Args:
        layers: of a model that is whole on every rank, as `find_moe_layers` gives them.
    """
    slots_per_rank = placement.topology.slots_per_rank
    first_slot = ep_mesh.get_local_rank() * slots_per_rank
    implementations = []
    for index, layer in enumerate(layers):
        mine = placement.physical_to_logical_map[index, first_slot : first_slot + slots_per_rank]
        device = next(layer.experts.parameters()).device
        slot_of_expert = torch.from_numpy(placement.slot_of_expert[index]).to(device)
        local = local_experts(layer.experts, mine.tolist())
        implementations.append(make_ep(local, ep_mesh, tp_mesh, slot_of_expert, meter))
    return implementations


@contextmanager
def installed(layers: Sequence[MoELayer], implementations: Sequence[EPImplementation]) -> Iterator[None]:
    """Let a model's experts modules run through the given implementations while inside."""
    for layer, implementation in zip(layers, implementations, strict=True):
        layer.experts.forward = implementation.__call__
    try:
        yield
    finally:
        for layer in layers:
            del layer.experts.__dict__["forward"]  # the class's own again
