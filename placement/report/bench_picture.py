"""The picture of a bench: where a step's time goes, and the exchange's against fan_out."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from placement.runtime.results import BenchResult, BenchRun

DOTS_PER_INCH = 110


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
