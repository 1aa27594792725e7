"""The experts of one rank on rows that arrived: one gather, one grouped matrix product a projection.
Knows no map and no other rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from placement.runtime.exchange import Pairs


def run_experts(
    experts: nn.Module, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, pairs: Pairs, num_slots: int
) -> torch.Tensor:
    """The weighted sum of each row's experts, (rows, H), in the dtype of `hidden`.

    Args:
        experts: the module that says how its experts are computed.
        weights: its parameters by name, the first dimension being the local slot.
        hidden: (rows, H).
        pairs: local row, local slot and routing weight of what is to be run.
        num_slots: of this rank.
    """
    if not hasattr(experts, "has_gate"):
        return _one_by_one(experts, weights, hidden, pairs, num_slots)
    slot, order = torch.sort(pairs.slot.to(torch.int16 if num_slots < 2**15 else torch.int64), stable=True)
    slot, row = slot.long(), pairs.row.index_select(0, order)
    counts = torch.zeros(num_slots, dtype=torch.int64, device=slot.device).scatter_add_(0, slot, torch.ones_like(slot))
    ends = counts.cumsum(0)
    module: Any = experts

    def project(name: str, values: torch.Tensor) -> torch.Tensor:
        weight = weights[name] if module.is_transposed else weights[name].transpose(1, 2)
        out = grouped_mm(values.to(weight.dtype), weight, ends)
        return out + weights[f"{name}_bias"].index_select(0, slot) if module.has_bias else out

    values = hidden.index_select(0, row)
    if module.has_gate:
        values = module._apply_gate(project("gate_up_proj", values))
    else:
        values = module.act_fn(project("up_proj", values))
    values = project("down_proj", values)
    if module.has_post_expert_norm:
        values = module.post_expert_norm(values)
    values = values * pairs.weight.index_select(0, order).unsqueeze(1)
    # Sums of 16-bit terms are made in 32 bits, as where one process sums over a token's experts.
    exact = torch.float32 if hidden.element_size() < 4 else hidden.dtype
    out = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
    return out.index_add(0, row, values.to(exact)).to(hidden.dtype)


def grouped_mm(values: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of one expert after another, each times its expert's matrix.

    Args:
        values: (P, in), sorted by expert.
        weight: (E, in, out), a view of either order of the two in memory.
        ends: int64 (E,), the row behind each expert's last.
    """
    # torch's own takes rows of whole 16 bytes only, and saves the host from waiting for `ends`.
    aligned = all(size * values.element_size() % 16 == 0 for size in weight.shape[1:])
    if values.device.type != "cpu" and aligned and len(values):
        return functional.grouped_mm(values, weight, offs=ends.to(torch.int32))
    out: torch.Tensor = _GroupedMatmul.apply(values, weight, ends.tolist())  # type: ignore[no-untyped-call]
    return out


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        ctx.ends = ends
        out = values.new_empty((len(values), weight.shape[2]))
        for expert, start, end in _groups(ends):
            torch.mm(values[start:end], weight[expert], out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_values = torch.empty_like(values)
        to_weight = torch.zeros_like(weight)  # with the strides of `weight`
        for expert, start, end in _groups(ctx.ends):
            torch.mm(gradient[start:end], weight[expert].T, out=to_values[start:end])
            # A transposed product writes the layout that the weight has in memory.
            torch.mm(gradient[start:end].T, values[start:end], out=to_weight[expert].T)
        return to_values, to_weight, None


def _groups(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
        start = end


def _one_by_one(
    experts: nn.Module, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, pairs: Pairs, num_slots: int
) -> torch.Tensor:
    """For modules that do not say how they are computed: each pair is a token with one expert for their own forward."""
    values = hidden.index_select(0, pairs.row)
    ids, factors = pairs.slot.unsqueeze(1), pairs.weight.to(hidden.dtype).unsqueeze(1)
    if not len(values):  # a loop over no experts would leave all of these out of the backward pass, and others waiting
        return hidden * 0 + sum(part.sum() * 0 for part in (factors, *weights.values()))
    # The module as it would be with these weights, which FSDP does not let be copied.  Its class's forward, since its
    # own may be what called this.
    local: Any = object.__new__(type(experts))
    vars(local).update(vars(experts), _parameters=dict(weights), num_experts=num_slots)
    values = type(local).forward(local, values, ids, factors)
    return torch.zeros_like(hidden).index_add(0, pairs.row, values)
