"""From artifacts to the page: collects figures and tables, fills the template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jinja2
import numpy as np

from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.report import figures
from placement.runtime.results import BenchResult
from profiler.errors import CoterieError
from profiler.files import write_text
from profiler.profile import Profile

MAX_LAYERS_SHOWN = 8
"""Layers whose pictures are drawn, at equal distances; every layer counts in the tables."""


def write_report(profile: Profile, placement: PlacementMap, bench: BenchResult | None, path: Path) -> None:
    """Write the page.

    Args:
        profile: what the pictures and per-rank figures are drawn from; any traffic of the model, best one that the
            plan has not seen.
        bench: the run to show beside them, if there was one.

    Raises:
        CoterieError: the map is for another model, the bench for other ranks, or the page cannot be written.
    """
    placement.require_model(profile.model)
    runs = [] if bench is None else [run for run in bench.runs if run.num_ranks == placement.topology.num_ranks]
    if bench is not None and not runs:
        raise CoterieError(
            f"the bench ran on {bench.runs[0].num_ranks} ranks, the plan is for {placement.topology.num_ranks}; "
            "bench this plan"
        )
    tokens = profile.require_tokens()
    linear = PlacementMap.linear(profile.model, placement.topology)
    before, after = evaluate(linear, tokens), evaluate(placement, tokens)
    shown = np.unique(np.linspace(0, profile.model.num_layers - 1, MAX_LAYERS_SHOWN).round().astype(int)).tolist()
    layers = [
        {
            "id": profile.model.layer_ids[layer],
            "heatmaps": figures.heatmaps(profile, placement, layer),
            "graph": figures.graph(profile, placement, layer),
            "ranks": figures.ranks(before, after, layer),
        }
        for layer in shown
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("placement.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        model=profile.model,
        placement=placement,
        num_tokens=profile.num_tokens,
        before=before.summary(),
        after=after.summary(),
        seen=placement.profile_digest == profile.digest,
        layers=layers,
        bench=bench,
        runs=runs,
        bench_picture=None if bench is None else figures.data_uri(figures.draw_bench(replace(bench, runs=tuple(runs)))),
    )
    write_text(path, page)
