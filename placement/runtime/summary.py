"""Joins what ranks measured to the rows of a table, beside what the cost model predicts for the same tokens.
Runs and times nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from placement.cost import Metrics, evaluate
from placement.placement_map import PlacementMap
from placement.runtime.meter import PHASES
from placement.runtime.results import PEER, BenchRow, BenchRun, Spread
from placement.runtime.trials import MODES, Case, Task
from placement.timing import Workload, predicted_time
from placement.topology import Links
from profiler.spec import MoESpec
from profiler.trace import TokenTrace, ids_dtype

WIDTH = 4
"""Bytes of a value: benches run in float32."""

Rank = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def joined(task: Task, ranks: Sequence[Rank], batch: int, tokens_per_rank: int) -> BenchRun:
    """All ranks' figures of one batch.

    Args:
        ranks: what `run_task` returned on each.
        tokens_per_rank: in each step.
    """
    of_ranks = [rank["batches"][batch] for rank in ranks]
    links = Links(**ranks[0]["links"])
    some = next(iter(task.maps.values()))
    tokens = _tokens(of_ranks, some.model)
    # Each step of each rank is a call of its own, whose copies are chosen anew; batch b is one of rank b % R.
    calls = np.arange(task.steps) * len(ranks) + np.arange(len(ranks))[:, None]
    source = np.repeat(calls.ravel(), tokens.num_tokens // calls.size)
    metrics = {name: evaluate(placement, tokens, "token", source) for name, placement in task.maps.items()}
    times = [_times([rank["cases"][at] for rank in of_ranks], task.steps) for at in range(len(task.cases))]
    hosts = [rank["host"] for rank in ranks]
    rows = []
    for at, case in enumerate(task.cases):
        placement = task.maps[case.map]
        placement = replace(placement, topology=replace(placement.topology, links=links))
        linear = task.cases.index(replace(case, map="linear"))
        rows.append(
            BenchRow(
                implementation=case.implementation if case.mode == "flat" else f"{case.implementation} {case.mode}",
                map=case.map,
                fan_out=float(metrics[case.map].fan_out.mean()),
                **_counted(task, case, [rank["cases"][at] for rank in of_ranks], hosts, tokens, placement),
                **_milliseconds(times[at]),
                **_predicted(case, placement, metrics[case.map], tokens_per_rank),
                max_difference=float(np.max([rank["cases"][at]["max_difference"] for rank in of_ranks])),
                speed_up=_ratio(times[0], times[at], "total"),
                exchange_speed_up=_ratio(times[0], times[at], "exchange"),
                exchange_against_linear=_ratio(times[linear], times[at], "exchange"),
            )
        )
    num_nodes, correlations = some.topology.num_nodes, _correlations(task, rows)
    return BenchRun(len(ranks), num_nodes, len(set(hosts)), tokens_per_rank, links, tuple(rows), correlations)


def _tokens(of_ranks: Sequence[Rank], spec: MoESpec) -> TokenTrace:
    """What all ranks' tokens picked, rank after rank."""
    parts = [
        np.stack([np.frombuffer(base64.b64decode(layer), dtype=np.int32) for layer in rank["topk_ids"]])
        for rank in of_ranks
    ]
    ids = np.concatenate(parts, axis=1).reshape(len(parts[0]), -1, spec.top_k)
    num_tokens = ids.shape[1]
    zeros = np.zeros(num_tokens, dtype=np.uint8)
    return TokenTrace(ids.astype(ids_dtype(spec.num_experts)), np.zeros(num_tokens, np.int32), zeros, zeros)


def _times(of_ranks: Sequence[Rank], steps: int) -> dict[str, Floats]:
    """Seconds of a step in each repeat; a part of a layer takes as long as on the rank where it takes longest."""
    phases = np.array([rank["phases"] for rank in of_ranks])  # (ranks, repeats, phases, layer calls)
    out = dict(zip(PHASES, phases.max(axis=0).sum(axis=2).T / steps, strict=True))
    out["exchange"] = out["dispatch"] + out["combine"]
    for name in ("index", "total"):
        out[name] = np.array([rank[name] for rank in of_ranks]).max(axis=0) / steps
    return out


def _milliseconds(seconds: Mapping[str, Floats]) -> dict[str, Any]:
    return {name: Spread.of((1e3 * values).tolist()) for name, values in seconds.items()}


def _ratio(first: Mapping[str, Floats], this: Mapping[str, Floats], name: str) -> Spread:
    return Spread.of((first[name] / this[name]).tolist())


def _counted(
    task: Task, case: Case, of_ranks: Sequence[Rank], hosts: Sequence[str], tokens: TokenTrace, placement: PlacementMap
) -> dict[str, Any]:
    spec, several = placement.model, placement.topology.num_nodes > 1
    layer_tokens = tokens.num_tokens * spec.num_layers
    total = {
        name: sum(rank[name] for rank in of_ranks) / task.steps
        for name in ("bytes_sent", "network_bytes_sent", "rows_sent", "rows_away", "network_rows")
    }
    by_host = {host: rank["interface"] for host, rank in zip(hosts, of_ranks, strict=True)}
    nodes = [rank // placement.topology.ranks_per_node for rank in range(len(hosts))]
    # Else it would count other traffic than the runtime, which knows the plan's nodes.
    hosts_are_nodes = len({*zip(nodes, hosts, strict=True)}) == len({*nodes}) == len({*hosts})
    wire = MODES[case.mode].wire_dtype
    width = WIDTH if wire is None else wire.itemsize
    ways = 4 if task.training else 2  # there and back, and their gradients
    return {
        "bytes_sent": total["bytes_sent"],
        "wire_bytes": total["network_bytes_sent" if several else "bytes_sent"],
        "interface_bytes": sum(by_host.values()) / task.steps
        if hosts_are_nodes and None not in by_host.values()
        else None,
        "least_bytes": total["network_rows" if several else "rows_away"] * spec.hidden_size * width * ways,
        "rows_per_token": total["rows_sent"] * task.steps / layer_tokens,
        "remote_rows_per_token": total["rows_away"] * task.steps / layer_tokens,
    }


def _predicted(case: Case, placement: PlacementMap, metrics: Metrics, tokens_per_rank: int) -> dict[str, Any]:
    """Milliseconds of all layers; the cost model knows no exchange that sends once to each rank of another node."""
    topology, wire = placement.topology, MODES[case.mode].wire_dtype
    one_hop = MODES[case.mode].mode == "flat" and case.implementation != PEER
    if one_hop and topology.num_nodes > 1 and topology.ranks_per_node > 1:
        return {"predicted_exchange": None, "predicted_layer": None}
    width = float(WIDTH if wire is None else wire.itemsize)
    workload = Workload(tokens_per_rank, "per-expert" if case.implementation == PEER else "per-rank", width, width)
    load = metrics.load / (metrics.load.sum(axis=1, keepdims=True) / placement.model.top_k)
    time = predicted_time(metrics.ingress, metrics.node_ingress, load, placement.model, topology, workload)
    exchange = 1e3 * float((time.dispatch + time.combine).sum())
    return {"predicted_exchange": exchange, "predicted_layer": exchange + 1e3 * float(time.expert.sum())}


def _correlations(task: Task, rows: Sequence[BenchRow]) -> dict[str, float]:
    ways = [case.mode for case in task.cases if case.implementation != PEER]
    same = [
        row for case, row in zip(task.cases, rows, strict=True) if case.implementation != PEER and case.mode == ways[0]
    ]
    if len(same) < 3:
        return {}
    measured = [row.exchange.median for row in same]
    pairs: dict[str, tuple[list[float], list[float]]] = {"fan_out, exchange": ([row.fan_out for row in same], measured)}
    exchange = [row.predicted_exchange for row in same if row.predicted_exchange is not None]
    layer = [row.predicted_layer for row in same if row.predicted_layer is not None]
    if len(layer) == len(same):
        pairs["predicted exchange, exchange"] = (exchange, measured)
        pairs["predicted layer, layer"] = (layer, [row.layer for row in same])
    vary = {name: columns for name, columns in pairs.items() if all(len(set(column)) > 1 for column in columns)}
    return {name: float(spearmanr(*columns).statistic) for name, columns in vary.items()}
