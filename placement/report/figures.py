"""The pictures of the report, and of a bench, as PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from placement.cost import Metrics
from placement.placement_map import PlacementMap
from placement.runtime.results import BenchResult, BenchRun
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
    return data_uri(_png(figure))


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
    return data_uri(_png(figure))


def ranks(before: Metrics, after: Metrics, layer: int) -> str:
    """Ingress and load of each rank in one layer, linear against the plan."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    names = ("linear", "plan")
    plots.per_rank(
        figure.add_subplot(1, 2, 1), before.ingress[layer], after.ingress[layer], names, "ingress, share of all tokens"
    )
    relative = [metrics.load[layer] / metrics.load[layer].mean() for metrics in (before, after)]
    plots.per_rank(figure.add_subplot(1, 2, 2), relative[0], relative[1], names, "load, over the mean load")
    return data_uri(_png(figure))


def draw_bench(result: BenchResult) -> bytes:
    """For each table the parts of a step as bars, and the exchange's time against fan_out, as PNG."""
    figure = Figure(figsize=(9.6, 0.6 + 3.0 * len(result.runs)), layout="constrained")
    grid = figure.add_gridspec(len(result.runs), 2, width_ratios=(2, 1))
    for at, run in enumerate(result.runs):
        _bars(figure.add_subplot(grid[at, 0]), result, run)
        axes = figure.add_subplot(grid[at, 1])
        for row in run.rows:
            if row.implementation != run.rows[0].implementation or len(run.rows) == 1:
                axes.plot(row.fan_out, row.exchange.median, "o", label=f"{row.implementation}, {row.map}")
        axes.set(xlabel="fan_out", ylabel="exchange, ms", ylim=(0, None))
        axes.legend(fontsize="x-small")
    return _png(figure)


def _bars(axes: Axes, result: BenchResult, run: BenchRun) -> None:
    names = [f"{row.implementation}\n{row.map}" for row in run.rows]
    left = np.zeros(len(names))
    parts = [(part, [getattr(row, part).median for row in run.rows]) for part in ("dispatch", "expert", "combine")]
    rest = [max(0.0, row.total.median - row.layer) for row in run.rows]
    for name, widths in (*parts, ("rest of the step", rest)):
        axes.barh(names, widths, left=left, label=name)
        left += np.array(widths)
    axes.invert_yaxis()
    wire = f"{result.network} cables" if result.network else result.backend
    axes.set_title(f"{result.workload}, {run.num_ranks} ranks, {wire}, {run.tokens_per_rank} tokens a rank", fontsize=9)
    axes.set_xlabel("ms of a step, slowest rank")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.legend(fontsize="x-small")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A picture inside a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
