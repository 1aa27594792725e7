"""Dispatch and combine that send each token once to every rank, or node, that serves it. Knows no experts and no map.

A row is one copy of a token on its way to one member of a group; a pair is one (token, slot) of it.  A route has one
hop, straight to the ranks, or two: over the network to the destination nodes first, then inside each node.  One index a
hop is built for each layer call and read in both directions.  What travels on each hop:

    dispatch    rows     hidden state of each token, once per destination
                pairs    slot at the destination and whether a new row starts, 2 bytes; the routing weight as it is
    combine     rows     the weighted sum over what a destination served, made before the return

Sums are exact up to the order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from placement.runtime.membership import LONGEST_WAIT
from placement.runtime.meter import Meter


@dataclass(frozen=True)
class Hop:
    """One exchange within a group of ranks.

    Attributes:
        group: whose members exchange; slots are numbered member by member.
        slots_per_member: of the ranks behind a member together, where it hands rows on.
        across_nodes: for each member, whether it sits on another node than this rank.
    """

    group: dist.ProcessGroup
    slots_per_member: int
    across_nodes: tuple[bool, ...]

    @property
    def num_members(self) -> int:
        """How many ranks exchange."""
        return len(self.across_nodes)

    @property
    def member(self) -> int:
        """This rank's number among them."""
        return dist.get_rank(self.group)


@dataclass(frozen=True)
class Route:
    """How tokens get to the ranks that serve them.

    Attributes:
        hops: one, or first over the network and then inside the node.
        wire_dtype: in which rows and their gradients travel; None for that of the hidden states.
        meter: counts what is sent.
    """

    hops: tuple[Hop, ...]
    wire_dtype: torch.dtype | None
    meter: Meter

    def with_slots(self, slots_per_rank: int) -> Route:
        """The same way, for ranks with so many slots."""
        *first, last = self.hops
        behind = [replace(hop, slots_per_member=slots_per_rank * last.num_members) for hop in first]
        return replace(self, hops=(*behind, replace(last, slots_per_member=slots_per_rank)))


@dataclass(frozen=True)
class Pairs:
    """Which rows want which slots: `row` int64 (P,) ascending within each source, `slot` int64 (P,), `weight` (P,)."""

    row: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Splits:
    """How many consecutive rows of one tensor go to each member, and how many come from it."""

    to: list[int]
    received: list[int]

    @property
    def reversed(self) -> Splits:
        """The way back."""
        return Splits(self.received, self.to)


@dataclass(frozen=True)
class Sizes:
    """What one hop carries, known on the host."""

    rows: Splits
    pairs: Splits


@dataclass(frozen=True)
class HopIndex:
    """What this rank sends on one hop, grouped by member, rows ascending in each group.

    Attributes:
        sizes: how much.
        row_sent: int64 (rows sent,), the local row of each.
        pair_sent: int64 (pairs sent,), the local pair of each.
        codes: int16 or int32 (pairs sent,), twice the slot at the member, plus 1 where a new row starts.
    """

    sizes: Sizes
    row_sent: torch.Tensor
    pair_sent: torch.Tensor
    codes: torch.Tensor


def make_route(
    group: dist.ProcessGroup,
    ranks_per_node: int,
    *,
    hierarchical: bool,
    wire_dtype: torch.dtype | None,
    meter: Meter,
) -> Route:
    """The route of this rank, to ranks with one slot each; see `Route.with_slots`.

    `hierarchical` makes two more process groups, so all ranks have to call it together.
    """
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    node, local = divmod(rank, ranks_per_node)
    num_nodes = len(ranks) // ranks_per_node
    if not hierarchical or num_nodes == 1:
        across = tuple(other // ranks_per_node != node for other in range(len(ranks)))
        return Route((Hop(group, 1, across),), wire_dtype, meter)
    on_rail, on_node = ranks[local::ranks_per_node], ranks[node * ranks_per_node :][:ranks_per_node]
    rail, inside = (
        dist.new_group(members, timeout=LONGEST_WAIT, use_local_synchronization=True) for members in (on_rail, on_node)
    )
    over_network = Hop(rail, ranks_per_node, tuple(other != node for other in range(num_nodes)))
    return Route((over_network, Hop(inside, 1, (False,) * ranks_per_node)), wire_dtype, meter)


def plan_sizes(slots_TK: torch.Tensor, route: Route) -> list[Sizes]:
    """Tell the others what to expect, hop by hop; the figures of all hops are read back to the host at once.

    Args:
        slots_TK: int64 (T, K), the slot that serves each pick, negative where a pick goes nowhere.
    """
    num_tokens, last = len(slots_TK), route.hops[-1]
    num_ranks = last.num_members * (route.hops[0].num_members if len(route.hops) > 1 else 1)
    rank_TK = torch.where(slots_TK < 0, num_ranks, slots_TK // last.slots_per_member)
    served_TR = slots_TK.new_zeros((num_tokens, num_ranks + 1))
    served_TR.scatter_(1, rank_TK, 1)
    pairs_R = slots_TK.new_zeros(num_ranks + 1).scatter_add_(0, rank_TK.flatten(), torch.ones_like(rank_TK.flatten()))
    sent = torch.stack([served_TR.sum(dim=0), pairs_R], dim=1)[:num_ranks]  # (R, 2): rows and pairs
    if len(route.hops) == 1:
        figures = [sent, _exchange_figures(sent, last)]
    else:
        by_node = sent.view(-1, last.num_members, 2)
        rows_N = served_TR[:, :num_ranks].view(num_tokens, *by_node.shape[:2]).amax(dim=2).sum(dim=0)
        over_network = torch.stack([rows_N, by_node[:, :, 1].sum(dim=1)], dim=1)
        # What a node's rank will hand on is the sum of what its senders want handed on.
        wanted = torch.cat([over_network, by_node.flatten(1)], dim=1)
        received = _exchange_figures(wanted, route.hops[0])
        handed_on = received[:, 2:].sum(dim=0).view(-1, 2)
        figures = [over_network, received[:, :2], handed_on, _exchange_figures(handed_on, last)]
    on_host = iter(torch.cat(figures).tolist())  # the one wait for the accelerator
    sizes = []
    for hop in route.hops:
        to, received_from = ([next(on_host) for _ in range(hop.num_members)] for _ in range(2))
        rows, pairs = (Splits([pair[i] for pair in to], [pair[i] for pair in received_from]) for i in range(2))
        sizes.append(Sizes(rows, pairs))
    return sizes


def _exchange_figures(sent: torch.Tensor, hop: Hop) -> torch.Tensor:
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous(), group=hop.group)
    return received


def index_hop(pairs: Pairs, hop: Hop, sizes: Sizes) -> HopIndex:
    """Group pairs by the member that they go to; a pair with a negative slot goes nowhere."""
    num_rows, num_pairs = sum(sizes.rows.to), sum(sizes.pairs.to)
    # A negative slot counts as one behind the last member, so that these come last.
    member = torch.where(pairs.slot < 0, hop.num_members, pairs.slot // hop.slots_per_member)
    member, pair_sent = torch.sort(member.to(torch.int16), stable=True)
    member, pair_sent = member[:num_pairs], pair_sent[:num_pairs]
    row, slot = pairs.row.index_select(0, pair_sent), pairs.slot.index_select(0, pair_sent)
    starts = torch.ones_like(row)
    starts[1:] = (row[1:] != row[:-1]) | (member[1:] != member[:-1])
    row_sent = row.new_empty(num_rows).scatter_(0, starts.cumsum(0) - 1, row)
    codes = (slot % hop.slots_per_member) * 2 + starts
    return HopIndex(sizes, row_sent, pair_sent, codes.to(torch.int16 if hop.slots_per_member <= 2**14 else torch.int32))


def dispatch(hidden: torch.Tensor, pairs: Pairs, index: HopIndex, hop: Hop, route: Route) -> tuple[torch.Tensor, Pairs]:
    """Send every row once to each member that serves it, with its pairs there: what this rank received."""
    rows = hidden.index_select(0, index.row_sent).to(route.wire_dtype or hidden.dtype)
    weights = pairs.weight.index_select(0, index.pair_sent)
    arrived, weight, codes = _Dispatch.apply(rows, weights, index, hop, route.meter)  # type: ignore[no-untyped-call]
    codes = codes.long()
    # Rows and pairs arrive in the same order, source by source.
    return arrived.to(hidden.dtype), Pairs((codes & 1).cumsum(0) - 1, codes >> 1, weight)


def combine(partial_sums: torch.Tensor, index: HopIndex, hop: Hop, num_rows: int, route: Route) -> torch.Tensor:
    """Return each row's partial sum to where it came from and add them up by row: (num_rows, H)."""
    on_wire = partial_sums.to(route.wire_dtype or partial_sums.dtype)
    returned = _Combine.apply(on_wire, index, hop, route.meter)  # type: ignore[no-untyped-call]
    # 16-bit formats lose too much in sums of several terms.
    exact = torch.float32 if partial_sums.element_size() < 4 else partial_sums.dtype
    out = partial_sums.new_zeros((num_rows, partial_sums.shape[1]), dtype=exact)
    return out.index_add(0, index.row_sent, returned.to(exact)).to(partial_sums.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, index: HopIndex, hop: Hop, meter: Meter
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.sizes, ctx.hop, ctx.meter = index.sizes, hop, meter
        packed = torch.cat([_as_bytes(weights), _as_bytes(index.codes)], dim=1)
        arrived, packed = exchange((rows, packed), (index.sizes.rows, index.sizes.pairs), hop, meter)
        width = weights.element_size()
        weight, codes = _from_bytes(packed[:, :width], weights.dtype), _from_bytes(packed[:, width:], index.codes.dtype)
        ctx.mark_non_differentiable(codes)
        return arrived, weight, codes

    @staticmethod
    def backward(
        ctx: Any, to_rows: torch.Tensor, to_weights: torch.Tensor, _codes: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        splits = (ctx.sizes.rows.reversed, ctx.sizes.pairs.reversed)
        return *exchange((to_rows, to_weights), splits, ctx.hop, ctx.meter), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_sums: torch.Tensor, index: HopIndex, hop: Hop, meter: Meter) -> torch.Tensor:
        ctx.sizes, ctx.hop, ctx.meter = index.sizes, hop, meter
        return exchange((partial_sums,), (index.sizes.rows.reversed,), hop, meter)[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *exchange((gradient,), (ctx.sizes.rows,), ctx.hop, ctx.meter), None, None, None


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(1).contiguous().view(torch.uint8)


def _from_bytes(columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return columns.clone(memory_format=torch.contiguous_format).view(dtype).flatten()


def exchange(
    tensors: Sequence[torch.Tensor], splits: Sequence[Splits], hop: Hop, meter: Meter
) -> tuple[torch.Tensor, ...]:
    """Send consecutive rows of each tensor to each member: what came from them, in their order.

    All are under way before any is waited for, so that their latencies overlap.
    """
    tensors = [tensor.contiguous() for tensor in tensors]
    outputs = [
        tensor.new_empty((sum(split.received), *tensor.shape[1:]))
        for tensor, split in zip(tensors, splits, strict=True)
    ]
    for tensor, split in zip(tensors, splits, strict=True):
        row_bytes = tensor[:1].numel() * tensor.element_size()
        meter.count_sent(split.to, row_bytes, hop.member, hop.across_nodes)
    over_cables = outputs[0].device.type == "cpu" and any(hop.across_nodes)
    start = _start_one_by_one if over_cables else _start_all_to_all
    for work in start(outputs, tensors, splits, hop):
        if work is not None:
            work.wait()
    return tuple(outputs)


def _start_all_to_all(
    outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], splits: Sequence[Splits], hop: Hop
) -> list[dist.Work | None]:
    return [
        dist.all_to_all_single(output, tensor, split.received, split.to, group=hop.group, async_op=True)
        for output, tensor, split in zip(outputs, tensors, splits, strict=True)
    ]


def _start_one_by_one(
    outputs: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], splits: Sequence[Splits], hop: Hop
) -> list[dist.Work | None]:
    """Post every receive before anything is sent.

    gloo has one connection for two ranks, where the word that one is ready to receive waits behind what it sends: its
    all_to_all sends one way after the other as often as both at once.  Through memory that costs less than the more
    messages here; docs/log.md has the figures.
    """
    ranks = dist.get_process_group_ranks(hop.group)
    pending: list[dist.Work | None] = []
    sends = []
    for tag, (output, tensor, split) in enumerate(zip(outputs, tensors, splits, strict=True)):
        received, to = output.split(split.received), tensor.split(split.to)
        received[hop.member].copy_(to[hop.member])
        for step in range(1, hop.num_members):  # the next one first, so that not all begin with the same one
            source, target = (hop.member - step) % hop.num_members, (hop.member + step) % hop.num_members
            if len(received[source]):
                pending.append(dist.irecv(received[source], ranks[source], hop.group, tag))
            if len(to[target]):
                sends.append((to[target], ranks[target], tag))
    return pending + [dist.isend(rows, rank, hop.group, tag) for rows, rank, tag in sends]
