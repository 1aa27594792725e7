"""Predicted beside measured: what the plan's figures say of a run, and what the run showed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from placement.insight import Insight
from placement.timing import Workload, time_of


def compare_with_run(insight: Insight) -> pd.DataFrame:
    """A row of the bench each.

    Returns:
        `implementation`, `map`; `predicted_copies` and `measured_copies` of a token in a layer (the prediction is of
        the traffic that the report measures on, the run has text of its own); `predicted_ms` of dispatch, experts and
        combine in all layers, NaN where the plan names no links, `measured_ms` of the same, median; empty without a
        bench.
    """
    rows = []
    bench = insight.bench
    for row in bench.rows if bench else ():
        name = "plan" if row.map == "planned" else "linear"
        per_expert = row.implementation != "coterie"
        assert bench is not None
        metrics, placement = insight.metrics[name], insight.maps[name]
        placement = replace(placement, topology=replace(placement.topology, links=insight.plan.topology.links))
        time = time_of(placement, metrics, Workload(bench.tokens_per_rank, "per-expert" if per_expert else "per-rank"))
        rows.append(
            {
                "implementation": row.implementation,
                "map": row.map,
                "predicted_copies": float(placement.model.top_k if per_expert else np.mean(metrics.fan_out)),
                "measured_copies": row.rows_per_token,
                "predicted_ms": float("nan") if time is None else 1e3 * float(time.total.sum()),
                "measured_ms": row.dispatch.median + row.expert.median + row.combine.median,
            }
        )
    return pd.DataFrame(rows)
