"""The picture of a bench: where a step's time goes, the exchange's against fan_out, predicted against measured.
Runs nothing.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from placement.runtime.results import PEER, BenchResult, BenchRun
from profiler.plots import PALETTE, predicted_against_measured, series_style

DOTS_PER_INCH = 110
"""Of the PNG, which is 13.2 inches wide."""

PARTS = (PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[7])
"""Colours of dispatch, experts, combine and the rest."""


def draw_bench(result: BenchResult) -> bytes:
    """For each table the parts of a step as bars, the exchange's time against fan_out, and predicted times, as PNG."""
    figure = Figure(figsize=(13.2, 0.6 + 3.0 * len(result.runs)), layout="constrained")
    grid = figure.add_gridspec(len(result.runs), 3, width_ratios=(2, 1, 1))
    for at, run in enumerate(result.runs):
        _bars(figure.add_subplot(grid[at, 0]), result, run)
        axes = figure.add_subplot(grid[at, 1])
        top = 0.0
        for place, row in enumerate(run.rows):
            if row.implementation != PEER or len(run.rows) == 1:
                top = max(top, row.exchange.median)
                label = f"{row.implementation}, {row.map}"
                axes.scatter(row.fan_out, row.exchange.median, label=label, **series_style(place))
        axes.set(xlabel="fan_out, ranks that serve a token", ylabel="exchange, ms", ylim=(0, 1.3 * top or None))
        axes.legend(fontsize="x-small")
        _predictions(figure.add_subplot(grid[at, 2]), run)
    return _png(figure)


def _bars(axes: Axes, result: BenchResult, run: BenchRun) -> None:
    names = [f"{row.implementation}\n{row.map}" for row in run.rows]
    left = np.zeros(len(names))
    parts = [(part, [getattr(row, part).median for row in run.rows]) for part in ("dispatch", "expert", "combine")]
    drawn = np.sum([widths for _, widths in parts], axis=0)
    rest = [max(0.0, row.total.median - part) for row, part in zip(run.rows, drawn, strict=True)]
    for (name, widths), colour in zip((*parts, ("rest of the step", rest)), PARTS, strict=True):
        axes.barh(names, widths, left=left, label=name, color=colour)
        left += np.array(widths)
    axes.invert_yaxis()
    axes.set_title(
        f"{result.workload}, {run.num_ranks} ranks, {result.wire(run)}, {run.tokens_per_rank} tokens a rank", fontsize=9
    )
    axes.set_xlabel("ms, slowest rank; parts started by all at once")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set_xlim(0, 1.3 * left.max() or None)  # room for the legend
    axes.legend(fontsize="x-small")


def _predictions(axes: Axes, run: BenchRun) -> None:
    predicted = np.array([np.nan if row.predicted_layer is None else row.predicted_layer for row in run.rows])
    measured = np.array([row.layer for row in run.rows])
    labels = [f"{row.implementation}, {row.map}" for row in run.rows]
    predicted_against_measured(axes, predicted, measured, labels, "ms of all MoE layers")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
