"""Experts' weights to the ranks whose slots hold them: cut from a whole module, or exchanged between ranks.
Knows no tokens, and of a map only which experts each rank holds.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from placement.runtime.exchange import Splits
from profiler.errors import CoterieError


def require_packed(experts: nn.Module, num_experts: int) -> None:
    """Check that every weight of an experts module is packed by expert, and that it takes ids and weights.

    Raises:
        CoterieError: its experts cannot be told apart by the first dimension of its weights.
    """
    packed = [parameter for parameter in experts._parameters.values() if parameter is not None]
    # Modules that say how they are computed may share a norm among their experts.
    elsewhere = any(next(child.parameters(), None) is not None for child in experts.children())
    if (
        not packed
        or (elsewhere and not hasattr(experts, "has_gate"))
        or getattr(experts, "num_experts", None) is None
        or any(len(parameter) != num_experts for parameter in packed)
        or _takes_no_selection(experts)
    ):
        raise CoterieError(
            f"{type(experts).__name__}: the runtime moves experts packed in weights of {num_experts} rows that take "
            "each token's ids and weights, these are not; run this family without expert parallelism"
        )


def _takes_no_selection(experts: nn.Module) -> bool:
    code: Any = type(experts).forward
    code = getattr(code, "__wrapped__", code).__code__
    return int(code.co_argcount) != 4  # self, hidden states, ids, weights


def local_experts(experts: nn.Module, logical_ids: Sequence[int]) -> nn.Module:
    """A copy of an experts module that holds only some experts, in the given order; the original is left as it is.

    Raises:
        CoterieError: the module does not pack its experts along the first dimension of its weights.
    """
    require_packed(experts, int(getattr(experts, "num_experts", 0)))
    local = copy.copy(experts)
    rows = torch.tensor(logical_ids, dtype=torch.int64, device=next(experts.parameters()).device)
    local._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach()[rows], parameter.requires_grad)
        for name, parameter in experts._parameters.items()
    }
    local.num_experts = len(logical_ids)  # type: ignore[assignment]
    return local


class Resharding:
    """How each rank's rows of packed weights become those that its slots want, by one exchange a tensor."""

    def __init__(
        self, held: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], group: dist.ProcessGroup
    ) -> None:
        """Plan the exchange.

        Args:
            held: for each rank the logical experts in its rows, each once among all ranks.
            wanted: for each rank the logical experts that its slots want, copies on several ranks allowed.
        """
        rank = dist.get_rank(group)
        owner = {expert: at for at, experts in enumerate(held) for expert in experts}
        place = {expert: row for row, expert in enumerate(held[rank])}
        to = [[place[expert] for expert in experts if expert in place] for experts in wanted]
        sources = [owner[expert] for expert in wanted[rank]]
        self.group = group
        self.splits = Splits([len(rows) for rows in to], [sources.count(at) for at in range(len(held))])
        self.rows_sent = torch.tensor([row for rows in to for row in rows], dtype=torch.int64)
        self.order = torch.argsort(torch.argsort(torch.tensor(sources, dtype=torch.int64), stable=True))
        self.num_held = len(held[rank])

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The wanted rows of a weight of which each rank holds some; gradients of all copies sum up in those."""
        out: torch.Tensor = _Reshard.apply(weight, self)  # type: ignore[no-untyped-call]
        return out


class _Reshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, plan: Resharding) -> torch.Tensor:
        ctx.plan = plan
        sent = weight.index_select(0, plan.rows_sent.to(weight.device))
        arrived = _all_to_all(sent, plan.splits, plan.group)
        return arrived.index_select(0, plan.order.to(weight.device))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: Resharding = ctx.plan
        arrived = torch.empty_like(gradient).index_copy_(0, plan.order.to(gradient.device), gradient)
        returned = _all_to_all(arrived, plan.splits.reversed, plan.group)
        out = gradient.new_zeros((plan.num_held, *gradient.shape[1:]))
        return out.index_add(0, plan.rows_sent.to(gradient.device), returned), None


class SumOverCopies:
    """Makes the gradient of each copy of an expert that of all its copies, so that they stay alike in training."""

    def __init__(self, logical_of_rank: Sequence[Sequence[int]], group: dist.ProcessGroup) -> None:
        """Plan the exchange; every rank sends its gradient of a copied expert to the others that hold one."""
        rank = dist.get_rank(group)
        slot = {expert: row for row, expert in enumerate(logical_of_rank[rank])}
        copies = Counter(expert for held in logical_of_rank for expert in held)
        copied = {expert for expert in slot if copies[expert] > 1}
        # Both ends list what they share in the order of expert ids.
        shared = [sorted(copied & set(held)) for held in logical_of_rank]
        self.group = group
        self.rows = torch.tensor([slot[expert] for experts in shared for expert in experts], dtype=torch.int64)
        self.splits = Splits(*([len(experts) for experts in shared] for _ in range(2)))

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights as they are, with gradients summed over copies."""
        return {name: _SumOverCopies.apply(weight, self) for name, weight in weights.items()}  # type: ignore[no-untyped-call]


class _SumOverCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, plan: SumOverCopies) -> torch.Tensor:
        ctx.plan = plan
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: SumOverCopies = ctx.plan
        rows = plan.rows.to(gradient.device)
        arrived = _all_to_all(gradient.index_select(0, rows), plan.splits, plan.group)
        out = gradient.index_fill(0, rows, 0)
        # Rank after rank, the own among them, so that every copy gets the same sum to the last bit.
        for at, part in zip(rows.split(plan.splits.received), arrived.split(plan.splits.received), strict=True):
            out.index_add_(0, at, part)
        return out, None


def _all_to_all(tensor: torch.Tensor, splits: Splits, group: dist.ProcessGroup) -> torch.Tensor:
    output = tensor.new_empty((sum(splits.received), *tensor.shape[1:]))
    dist.all_to_all_single(output, tensor.contiguous(), splits.received, splits.to, group=group)
    return output
