"""The pictures of the report, as PNG bytes in data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.figure import Figure

from placement.cost import Metrics
from placement.placement_map import PlacementMap
from profiler import plots
from profiler.analysis import collaboration_graph
from profiler.profile import Profile

DOTS_PER_INCH = 110


def heatmaps(profile: Profile, placement: PlacementMap, layer: int) -> str:
    """Co-activation of one layer in file order and in plan order, side by side."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    coactivation, load = profile.counts.coactivation[:, layer].sum(axis=0), profile.counts.load[:, layer].sum(axis=0)
    in_file_order = np.arange(profile.model.num_experts)
    for axes, order, title in (
        (figure.add_subplot(1, 2, 1), in_file_order, "linear: file order"),
        (figure.add_subplot(1, 2, 2), placement.physical_to_logical_map[layer], "plan: by rank"),
    ):
        image = plots.coactivation_heatmap(axes, coactivation, load, order, placement.topology.slots_per_rank, title)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="co-activation against chance, log2")
    return _data_uri(figure)


def graph(profile: Profile, placement: PlacementMap, layer: int) -> str:
    """The collaboration graph of one layer coloured by the plan's ranks."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    coactivation, load = profile.counts.coactivation[:, layer].sum(axis=0), profile.counts.load[:, layer].sum(axis=0)
    plots.collaboration(
        figure.add_subplot(),
        collaboration_graph(coactivation, load),
        placement.rank_of_expert[layer],
        placement.topology.num_ranks,
    )
    return _data_uri(figure)


def ranks(before: Metrics, after: Metrics, layer: int) -> str:
    """Ingress and load of each rank in one layer, linear against the plan."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    names = ("linear", "plan")
    plots.per_rank(
        figure.add_subplot(1, 2, 1), before.ingress[layer], after.ingress[layer], names, "ingress, share of all tokens"
    )
    relative = [metrics.load[layer] / metrics.load[layer].mean() for metrics in (before, after)]
    plots.per_rank(figure.add_subplot(1, 2, 2), relative[0], relative[1], names, "load, over the mean load")
    return _data_uri(figure)


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
