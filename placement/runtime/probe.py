"""How fast a group's links and ranks are, measured before anything is benched, so that times can be predicted.
Knows no map, and predicts nothing itself: `placement/timing.py` does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from placement.runtime.exchange import (
    Hop,
    HopIndex,
    Pairs,
    Route,
    Splits,
    combine,
    dispatch,
    exchange,
    index_hop,
    plan_sizes,
)
from placement.runtime.grouped import grouped_mm
from placement.runtime.meter import Meter
from placement.timing import WEIGHT_BYTES
from placement.topology import Links

REPEATS = 7
"""Timed runs of each measurement, after one that is not timed."""

PAIR_BYTES = 2**20
"""What each rank sends each other one to see how fast that goes."""
COPY_BYTES = 2**26
"""Of the block whose copy tells the memory's bandwidth; larger than the caches of most processors."""

PRODUCT_ROWS = 256
"""Of the matrix product that tells FLOP/s."""


def measure_links(route: Route, device: torch.device, hidden_size: int, expert_size: int, dtype: str) -> Links:
    """Measure all ranks at once, as they share what they share; all call it together and get the same.

    Args:
        route: a flat one.
        dtype: of the weights.
    """
    [hop] = route.hops
    group = hop.group
    slots_TK = torch.zeros((0, 1), dtype=torch.int64, device=device)
    hidden = torch.zeros((0, hidden_size), device=device)
    nobody = Pairs(slots_TK[:, 0], slots_TK[:, 0], hidden.new_zeros(0))

    def dispatch_nothing() -> HopIndex:
        [sizes] = plan_sizes(slots_TK, route)
        index = index_hop(nobody, hop, sizes)
        dispatch(hidden, nobody, index, hop, route)
        return index

    index = dispatch_nothing()
    dispatch_startup = _slowest(dispatch_nothing, group, device)
    combine_startup = _slowest(lambda: combine(hidden, index, hop, 0, route), group, device)
    near = _bandwidth([not far for far in hop.across_nodes], hop, device, combine_startup)
    across = _bandwidth(list(hop.across_nodes), hop, device, combine_startup)

    values = torch.randn(PRODUCT_ROWS, hidden_size, device=device)
    weight = torch.randn(1, hidden_size, 2 * expert_size, device=device)
    ends = torch.tensor([PRODUCT_ROWS], device=device)
    product = _slowest(lambda: grouped_mm(values, weight, ends), group, device)
    flops = 4 * PRODUCT_ROWS * hidden_size * expert_size / product
    launch = _slowest(lambda: grouped_mm(values[:1], weight[:, :, :1], ends.clamp(max=1)), group, device)
    block = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    memory_bandwidth = 2 * COPY_BYTES / _slowest(block.clone, group, device)
    return Links(
        name="measured",
        rank_bandwidth=near or across or memory_bandwidth,
        network_bandwidth=across or near or memory_bandwidth,
        dispatch_startup=dispatch_startup,
        combine_startup=combine_startup,
        network_startup=0.0,
        expert_startup=launch,
        flops=flops * WEIGHT_BYTES[dtype] / 2,  # `Links` counts those of 16-bit weights
        flops_8bit=flops * WEIGHT_BYTES[dtype],
        memory_bandwidth=memory_bandwidth,
    )


def _bandwidth(to: list[bool], hop: Hop, device: torch.device, startup: float) -> float | None:
    """Bytes/s into a rank from some of the others; None where there are none."""
    rows = [int(wanted and other != hop.member) for other, wanted in enumerate(to)]
    if not sum(rows):
        return None
    splits = Splits(rows, rows)
    sent = torch.zeros((sum(rows), PAIR_BYTES), dtype=torch.uint8, device=device)
    seconds = _slowest(lambda: exchange((sent,), (splits,), hop, Meter()), hop.group, device)
    return len(sent) * PAIR_BYTES / max(seconds - startup, 1e-9)


def _slowest(action: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    """Median seconds over some repeats of the slowest rank."""
    seconds = []
    for _ in range(REPEATS + 1):
        dist.barrier(group)
        started = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    of_all = torch.tensor(seconds[1:], dtype=torch.float64, device=device)
    dist.all_reduce(of_all, dist.ReduceOp.MAX, group)
    return float(statistics.median(of_all.tolist()))
