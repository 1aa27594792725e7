"""Every figure of a profile. Takes arrays, draws on axes that it is given, and knows no placement."""

from __future__ import annotations

import matplotlib as mpl
import networkx as nx
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's colours (2008), which people with any kind of colour vision can tell apart."""


def rank_colour(rank: int, num_ranks: int) -> tuple[float, float, float, float]:
    """One colour a rank: the palette as long as it lasts, a continuous map beyond."""
    if num_ranks <= len(PALETTE):
        return mpl.colors.to_rgba(PALETTE[rank])
    return mpl.colormaps["cividis"](rank / (num_ranks - 1))


def coactivation_heatmap(
    axes: Axes,
    coactivation_EE: npt.NDArray[np.int64],
    load_E: npt.NDArray[np.int64],
    order_E: npt.NDArray[np.int64],
    experts_per_rank: int,
    title: str,
) -> AxesImage:
    """How often experts fire together, relative to chance, in the given order with rank borders.

    Colour is the base-2 logarithm of a pair's count over the count that its two loads would give independently.

    Args:
        order_E: experts along both axes.
        experts_per_rank: borders are drawn after so many.
    """
    chance = np.outer(load_E, load_E).astype(float)
    np.fill_diagonal(chance, 0.0)
    chance *= coactivation_EE.sum() / max(chance.sum(), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.log2(coactivation_EE / chance)
    lift = np.clip(np.where(np.isfinite(lift), lift, -2.0), -2.0, 2.0)
    np.fill_diagonal(lift, np.nan)
    image = axes.imshow(lift[np.ix_(order_E, order_E)], cmap="PuOr_r", vmin=-2.0, vmax=2.0, interpolation="nearest")
    for border in range(experts_per_rank, len(order_E), experts_per_rank):
        axes.axhline(border - 0.5, color="black", linewidth=0.8)
        axes.axvline(border - 0.5, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="expert, in this order", ylabel="expert, in this order")
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def collaboration(axes: Axes, graph: nx.Graph[int], rank_of_expert: npt.NDArray[np.int64], num_ranks: int) -> None:
    """The collaboration graph: colour is the rank, size the load, width the strength; edges within a rank are dark."""
    positions = nx.spring_layout(graph, weight="weight", seed=0, iterations=80)
    loads = np.array([graph.nodes[expert]["load"] for expert in graph])
    weights = np.array([data["weight"] for _, _, data in graph.edges(data=True)])
    inside = [rank_of_expert[first] == rank_of_expert[second] for first, second in graph.edges]
    nx.draw_networkx_edges(
        graph,
        positions,
        ax=axes,
        width=0.4 + 2.6 * weights,
        edge_color=["#333333" if same else "#c8c8c8" for same in inside],
    )
    nx.draw_networkx_nodes(
        graph,
        positions,
        ax=axes,
        node_size=30.0 + 220.0 * loads / max(loads.max(), 1),
        node_color=[rank_colour(int(rank_of_expert[expert]), num_ranks) for expert in graph],
        edgecolors="black",
        linewidths=0.5,
    )
    if len(graph) <= 64:
        nx.draw_networkx_labels(graph, positions, ax=axes, font_size=6)
    for rank in range(num_ranks if num_ranks <= len(PALETTE) else 0):
        axes.scatter([], [], color=rank_colour(rank, num_ranks), label=f"rank {rank}")
    if num_ranks <= len(PALETTE):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)
    axes.set_axis_off()


def per_rank(
    axes: Axes, before_R: npt.NDArray[np.float64], after_R: npt.NDArray[np.float64], labels: tuple[str, str], unit: str
) -> None:
    """Bars of one figure for each rank, before and after, with a line at each one's maximum."""
    ranks = np.arange(len(before_R))
    for offset, values, colour, label in (
        (-0.2, before_R, PALETTE[7], labels[0]),
        (0.2, after_R, PALETTE[0], labels[1]),
    ):
        axes.bar(ranks + offset, values, width=0.4, color=colour, label=f"{label} (busiest {values.max():.2f})")
        axes.axhline(values.max(), color=colour, linewidth=1.0, linestyle="--")
    axes.set(xlabel="rank", ylabel=unit)
    axes.set_xticks(ranks if len(ranks) <= 16 else ranks[:: len(ranks) // 8])
    axes.set_ylim(0.0, 1.25 * max(before_R.max(), after_R.max()))
    axes.legend(fontsize=7, frameon=False, loc="upper right")
