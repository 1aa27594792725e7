"""Dispatch and combine that send each token once to every rank that serves it.

One `ExchangeIndex` is built for each layer call and read in both directions.  A row is one copy of a token on its way
to one rank; a pair is one (token, expert) of it.  What travels:

    dispatch    rows     hidden state of each token, once per destination rank
                pairs    (row on arrival, local slot) in one whole number and the routing weight, 4 + 4 bytes
    combine     rows     the weighted sum over a row's experts, made before the return

Sums are exact up to the order of addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from placement.runtime.meter import Meter


@dataclass(frozen=True)
class Splits:
    """How many consecutive rows of one tensor go to each rank, and how many come from it."""

    to: list[int]
    received: list[int]

    @property
    def reversed(self) -> Splits:
        """The way back."""
        return Splits(self.received, self.to)


@dataclass(frozen=True)
class ExchangeIndex:
    """Which tokens go where, and what comes back, seen from one rank.

    Attributes:
        token_of_row: int64 (rows sent,), grouped by destination rank, tokens ascending in each group.
        pair_order: int64 (T*K,), the (token, pick) of each sent pair, grouped by destination rank.
        pair_codes: int64 (T*K,), row on arrival * slots_per_rank + local slot, in that order.
        rows: how many rows go to each rank and come from it.
        pairs: likewise for pairs.
    """

    token_of_row: torch.Tensor
    pair_order: torch.Tensor
    pair_codes: torch.Tensor
    rows: Splits
    pairs: Splits


@dataclass(frozen=True)
class Arrived:
    """What a rank received: `hidden` (rows, H), and for each pair its row, its local slot and its routing weight."""

    hidden: torch.Tensor
    row_of_pair: torch.Tensor
    slot_of_pair: torch.Tensor
    weight_of_pair: torch.Tensor


def build_index(slots_TK: torch.Tensor, slots_per_rank: int, group: dist.ProcessGroup) -> ExchangeIndex:
    """Group tokens by the ranks that serve them and tell every rank what to expect; sizes are read back to the host.

    Args:
        slots_TK: int64 (T, K), the global slot that serves each pick.
    """
    num_ranks = dist.get_world_size(group)
    num_tokens, _ = slots_TK.shape
    rank_TK = slots_TK // slots_per_rank
    served_RT = slots_TK.new_zeros((num_ranks, num_tokens), dtype=torch.bool)
    served_RT[rank_TK.T, torch.arange(num_tokens, device=slots_TK.device)] = True
    token_of_row = served_RT.nonzero()[:, 1]
    row_on_arrival_RT = served_RT.long().cumsum(dim=1) - 1
    pair_order = torch.argsort(rank_TK.flatten(), stable=True)
    pair_codes = row_on_arrival_RT.T.gather(1, rank_TK) * slots_per_rank + slots_TK % slots_per_rank
    sent = torch.stack([served_RT.sum(dim=1), torch.bincount(rank_TK.flatten(), minlength=num_ranks)], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    (rows_to, pairs_to), (rows_from, pairs_from) = torch.stack([sent.T, received.T]).tolist()
    codes = pair_codes.flatten().index_select(0, pair_order)
    return ExchangeIndex(token_of_row, pair_order, codes, Splits(rows_to, rows_from), Splits(pairs_to, pairs_from))


def dispatch(
    hidden_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    index: ExchangeIndex,
    slots_per_rank: int,
    group: dist.ProcessGroup,
    meter: Meter,
) -> Arrived:
    """Send every token once to each rank that serves it, with its picks there and their weights."""
    rank = dist.get_rank(group)
    rows = hidden_TH.index_select(0, index.token_of_row)
    # Codes travel as the bits of a float beside the weight, so that pairs are one message; nothing computes with them.
    codes_as_float = index.pair_codes.to(torch.int32).view(torch.float32)
    weights = weights_TK.flatten().index_select(0, index.pair_order).to(torch.float32)
    pairs = torch.stack([codes_as_float, weights], dim=1)
    hidden, arrived_pairs = all_to_all(group, (rows, pairs), (index.rows, index.pairs))
    codes = arrived_pairs[:, 0].detach().contiguous().view(torch.int32).long()
    meter.rows_sent += len(rows)
    meter.count_sent(rows, index.rows.to, rank)
    meter.count_sent(pairs, index.pairs.to, rank)
    # Rows arrive grouped by source; each source numbered its own from zero.
    rows_from = torch.tensor(index.rows.received, device=codes.device)
    pairs_from = torch.tensor(index.pairs.received, device=codes.device)
    first_row = torch.repeat_interleave(rows_from.cumsum(0) - rows_from, pairs_from)
    return Arrived(hidden, codes // slots_per_rank + first_row, codes % slots_per_rank, arrived_pairs[:, 1])


def combine(
    partial_sums: torch.Tensor, index: ExchangeIndex, num_tokens: int, group: dist.ProcessGroup, meter: Meter
) -> torch.Tensor:
    """Return each row's partial sum (rows received, H) to its source and add them up by token: (T, H)."""
    meter.count_sent(partial_sums, index.rows.received, dist.get_rank(group))
    (returned,) = all_to_all(group, (partial_sums,), (index.rows.reversed,))
    out = partial_sums.new_zeros((num_tokens, partial_sums.shape[1]))
    return out.index_add(0, index.token_of_row, returned)


def all_to_all(
    group: dist.ProcessGroup, tensors: tuple[torch.Tensor, ...], splits: tuple[Splits, ...]
) -> tuple[torch.Tensor, ...]:
    """Exchange rows of several tensors at once; gradients travel back the same way."""
    out: tuple[torch.Tensor, ...] = _AllToAll.apply(group, splits, *tensors)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, splits: tuple[Splits, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.splits = group, splits
        return _exchange(group, tensors, splits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_exchange(ctx.group, gradients, tuple(split.reversed for split in ctx.splits))


def _exchange(
    group: dist.ProcessGroup, tensors: tuple[torch.Tensor, ...], splits: tuple[Splits, ...]
) -> tuple[torch.Tensor, ...]:
    """Start every exchange before waiting for any, so that their latencies overlap."""
    outputs = tuple(
        tensor.new_empty((sum(split.received), *tensor.shape[1:]))
        for tensor, split in zip(tensors, splits, strict=True)
    )
    pending = [
        dist.all_to_all_single(output, tensor.contiguous(), split.received, split.to, group=group, async_op=True)
        for output, tensor, split in zip(outputs, tensors, splits, strict=True)
    ]
    for work in pending:
        if work is not None:
            work.wait()
    return outputs
