"""What the page's script draws from: numbers of every layer, as compact as JSON and deflate make them.
Decides nothing.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt

from placement.choice import ranks_of_experts
from placement.cost import fan_out_counts
from placement.insight import Insight
from profiler.analysis import collaboration_graph, total_coactivation, total_load

LAYOUT_ITERATIONS = 60
"""Of networkx's spring layout; `profiler.plots` takes as many."""

SUCCESSORS = 3
"""Commonest successors of each expert that the page draws."""

GRID = 1000
"""Places of experts in the graph are whole numbers up to this."""


def payload(insight: Insight) -> dict[str, Any]:
    """All numbers, as JSON values; co-activation is deflated (`packed_triangles`)."""
    profile, model = insight.profile, insight.profile.model
    pairs_LEE, load_LE = total_coactivation(profile), total_load(profile)
    shape = (model.num_layers, model.num_experts)
    experts = insight.experts
    return {
        "layers": list(model.layer_ids),
        "experts": model.num_experts,
        "tokens": profile.num_tokens,
        "ranks": insight.plan.topology.num_ranks,
        "load": load_LE.tolist(),
        "domains": list(profile.domains),
        "domainTokens": profile.counts.tokens.tolist(),
        "domainLoad": profile.counts.load.tolist() if len(profile.domains) > 1 else [],
        "pairs": packed_triangles(pairs_LEE),
        "slots": insight.plan.physical_to_logical_map.tolist(),
        "slotsPerRank": insight.plan.topology.slots_per_rank,
        "ranksOf": [
            [
                [rank for rank in ranks if rank >= 0]
                for ranks in ranks_of_experts(slots_P, model.num_experts, insight.plan.topology.slots_per_rank).tolist()
            ]
            for slots_P in insight.plan.physical_to_logical_map
        ],
        "linear": insight.maps["linear"].physical_to_logical_map[0].tolist(),
        "linearSlots": insight.maps["linear"].topology.slots_per_rank,
        "collaborators": _rounded(experts["collaborators"], shape, 1),
        "topShare": _rounded(experts["top_share"], shape, 3),
        "bits": _rounded(experts["specialization"], shape, 3),
        "role": [[role[0] for role in row] for row in experts["role"].to_numpy().reshape(shape).tolist()],
        "community": insight.community_of_expert["community"].to_numpy().reshape(shape).tolist(),
        "places": [_layout(*layer) for layer in zip(pairs_LEE, load_LE, strict=True)],
        "flows": _flows(profile.counts.transition.sum(axis=0)),
        "maps": {
            name: {
                "ingress": np.round(metrics.ingress, 4).tolist(),
                "load": np.round(metrics.load_share * metrics.load.shape[1], 4).tolist(),
                "fanCounts": fan_out_counts(insight.maps[name], insight.measured.require_tokens()).tolist(),
            }
            for name, metrics in insight.metrics.items()
        },
        "affinity": np.round(insight.affinity["affinity"], 4).tolist(),
        "affinityByChance": np.round(insight.affinity["chance"], 4).tolist(),
        "curve": _curve(insight),
        "transfer": _transfer(insight),
    }


def packed_triangles(pairs_LEE: npt.NDArray[np.int64]) -> str:
    """The counts above the diagonal of every layer, row by row: uint32, little-endian, zlib, base64."""
    upper = np.triu_indices(pairs_LEE.shape[1], 1)
    return base64.b64encode(zlib.compress(pairs_LEE[:, upper[0], upper[1]].astype("<u4").tobytes(), 9)).decode()


def to_script(value: object) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _rounded(column: Any, shape: tuple[int, int], digits: int) -> list[list[float]]:
    rows: list[list[float]] = np.round(column.to_numpy().reshape(shape), digits).tolist()
    return rows


def _layout(pairs_EE: npt.NDArray[np.int64], load_E: npt.NDArray[np.int64]) -> list[list[int]]:
    graph = collaboration_graph(pairs_EE, load_E)
    spread = 2.2 / np.sqrt(len(load_E))
    places = nx.spring_layout(graph, k=spread, weight="weight", seed=0, iterations=LAYOUT_ITERATIONS)
    xy = np.array([places[expert] for expert in range(len(load_E))])
    low, high = xy.min(axis=0), xy.max(axis=0)
    scaled: list[list[int]] = np.round((xy - low) / np.maximum(high - low, 1e-9) * GRID).astype(int).tolist()
    return scaled


def _flows(transition_LEE: npt.NDArray[np.int64]) -> list[list[list[int]]]:
    """For each layer but the last and expert: successor, tokens, successor, tokens, ..."""
    out = []
    for counts_EE in transition_LEE:
        order = np.argsort(-counts_EE, axis=1, kind="stable")[:, :SUCCESSORS]
        tokens = np.take_along_axis(counts_EE, order, axis=1)
        out.append(np.stack([order, tokens], axis=2).reshape(len(counts_EE), -1).tolist())
    return out


def _curve(insight: Insight) -> dict[str, Any] | None:
    if insight.study is None:
        return None
    found, curve = insight.study.recommendation, insight.study.curve
    return {
        "tokens": curve["tokens"].tolist(),
        "value": np.round(curve["busiest_ingress"], 5).tolist(),
        "draw": curve["draw"].tolist(),
        "final": round(found.figure, 5),
        "enough": found.tokens,
    }


def _transfer(insight: Insight) -> dict[str, Any] | None:
    across = insight.study.transfer if insight.study else None
    if across is None or not len(across):
        return None
    if insight.seen:  # no held-out figure of the plan, which the domains' own have
        across = across[across["planned_on"] != "this plan"]
    return {
        "rows": list(dict.fromkeys(across["planned_on"])),
        "columns": list(dict.fromkeys(across["measured_on"])),
        "value": np.round(across["busiest_ingress"], 4).tolist(),
        "regret": np.round(across["regret"], 4).tolist(),
    }
