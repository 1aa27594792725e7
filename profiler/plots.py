"""Every figure of a profile. Takes arrays, draws on axes that it is given, and knows no placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import networkx as nx
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from profiler.analysis import lift

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's colours (2008), which people with any kind of colour vision can tell apart."""


MARKERS = ("o", "^", "s", "D")
"""Of points, the next one where the palette begins anew."""


def series_style(place: int) -> dict[str, Any]:
    """Colour and marker of one of many points: another marker where the palette begins anew."""
    return {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place // len(PALETTE) % len(MARKERS)]}


def rank_colour(rank: int, num_ranks: int) -> tuple[float, float, float, float]:
    """One colour a rank: the palette as long as it lasts, a continuous map beyond."""
    if num_ranks <= len(PALETTE):
        return mpl.colors.to_rgba(PALETTE[rank])
    return mpl.colormaps["cividis"](rank / (num_ranks - 1))


def series_colours(num_series: int) -> list[str]:
    """One colour a series: grey for the first, which others are compared with, blue for the last, which it is about."""
    between = [colour for colour in PALETTE[1:] if colour != PALETTE[7]]
    return [PALETTE[7], *(between[place % len(between)] for place in range(num_series - 2)), PALETTE[0]][-num_series:]


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
        order_E: experts along both axes; -1 for an empty slot, which is left blank, as are experts never picked.
        experts_per_rank: borders are drawn after so many.
    """
    with np.errstate(divide="ignore"):
        shown = np.clip(np.log2(lift(coactivation_EE, load_E)), -2.0, 2.0)
    shown[load_E == 0] = shown[:, load_E == 0] = np.nan  # nothing to compare with
    if not coactivation_EE.any():
        shown[:] = np.nan
    np.fill_diagonal(shown, np.nan)
    shown = shown[np.ix_(order_E, order_E)]
    shown[order_E < 0] = shown[:, order_E < 0] = np.nan
    image = axes.imshow(shown, cmap="PuOr_r", vmin=-2.0, vmax=2.0, interpolation="nearest")
    for border in range(experts_per_rank, len(order_E), experts_per_rank):
        axes.axhline(border - 0.5, color="black", linewidth=0.8)
        axes.axvline(border - 0.5, color="black", linewidth=0.8)
    axes.set(title=title, xlabel="expert number, in this order", ylabel="expert number, in this order")
    ticks = np.arange(0, len(order_E), max(1, len(order_E) // 8))
    names = [str(order_E[tick]) if order_E[tick] >= 0 else "" for tick in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    return image


def collaboration(axes: Axes, graph: nx.Graph[int], rank_of_expert: npt.NDArray[np.int64], num_ranks: int) -> None:
    """The collaboration graph: colour is the rank, size the load, width the strength; edges within a rank are dark.

    A line below says what the largest node and the widest edge stand for.
    """
    positions = nx.spring_layout(graph, k=2.2 / len(graph) ** 0.5, weight="weight", seed=0, iterations=60)
    loads = np.array([graph.nodes[expert]["load"] for expert in graph])
    weights = np.array([data["weight"] for _, _, data in graph.edges(data=True)])
    inside = np.array([rank_of_expert[first] == rank_of_expert[second] for first, second in graph.edges], dtype=bool)
    for same, colour in ((False, "#c8c8c8"), (True, "#333333")):  # those within a rank lie on top
        edges = [edge for edge, its in zip(graph.edges, inside, strict=True) if its == same]
        widths = 0.4 + 2.6 * weights[inside == same]
        nx.draw_networkx_edges(graph, positions, edgelist=edges, ax=axes, width=widths, edge_color=colour)
    nx.draw_networkx_nodes(
        graph,
        positions,
        ax=axes,
        node_size=(30.0 + 220.0 * loads / max(loads.max(), 1)) * min(2.0, 64 / len(graph)),
        node_color=[rank_colour(int(rank_of_expert[expert]), num_ranks) for expert in graph],
        edgecolors="black",
        linewidths=0.5,
    )
    if len(graph) <= 64:
        light = {expert for expert in graph if _is_light(rank_colour(int(rank_of_expert[expert]), num_ranks))}
        size = 6 if len(graph) > 16 else 8
        for ink, experts in (("black", light), ("white", set(graph) - light)):
            labels = {expert: str(expert) for expert in experts}
            nx.draw_networkx_labels(graph, positions, labels, ax=axes, font_size=size, font_color=ink)
    rank_legend(axes, num_ranks)
    axes.set_axis_off()
    words = f"size: load, {loads.max():,} tokens at most; width: pairs, the widest is the layer's commonest"
    axes.text(0.5, -0.02, words, transform=axes.transAxes, ha="center", va="top", fontsize=7)


def _is_light(colour: tuple[float, float, float, float]) -> bool:
    return float(np.dot(colour[:3], (0.3, 0.59, 0.11))) >= 0.5


def rank_legend(axes: Axes, num_ranks: int) -> None:
    """Ranks and their colours beside the axes; a few of them where there are many."""
    step = 1 if num_ranks <= len(PALETTE) else -(-num_ranks // len(PALETTE))
    for rank in sorted({*range(0, num_ranks - step // 2, step), num_ranks - 1}):
        axes.scatter([], [], color=rank_colour(rank, num_ranks), label=f"rank {rank}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)


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


def fan_out_distribution(axes: Axes, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Share of tokens by the number of ranks that serve them, a group of bars for each number.

    Args:
        counts: by name of a map, int64 (1 + most,), tokens served by 0, 1, ... ranks.
    """
    width = 0.8 / len(counts)
    colours = series_colours(len(counts))
    for place, (name, of_map) in enumerate(counts.items()):
        numbers = np.arange(1, len(of_map))
        mean = float((np.arange(len(of_map)) * of_map).sum() / max(of_map.sum(), 1))
        at = numbers - 0.4 + width * (place + 0.5)
        share = of_map[1:] / max(of_map.sum(), 1)
        axes.bar(at, share, width=width, color=colours[place], label=f"{name} (mean {mean:.2f})")
    axes.set(xlabel="ranks that serve a token", ylabel="share of tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False)


def layer_strip(axes: Axes, layer_ids: Sequence[int], values: Mapping[str, npt.NDArray[np.float64]], unit: str) -> None:
    """One figure layer by layer, a line for each map.

    Args:
        values: by name, float64 (L,).
    """
    marker = "o" if len(layer_ids) <= 40 else None
    for (name, values_L), colour in zip(values.items(), series_colours(len(values)), strict=True):
        axes.plot(layer_ids, values_L, marker=marker, markersize=4, color=colour, label=name)
    axes.set(xlabel="MoE layer", ylabel=unit)
    if len(layer_ids) == 1:
        axes.set_xticks([layer_ids[0]])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False)


def load_strip(axes: Axes, relative_load_LE: npt.NDArray[np.float64], layer_ids: Sequence[int]) -> AxesImage:
    """Load of every expert in every layer over the layer's mean, up to 3 times it; for a colour bar in that unit."""
    image = axes.imshow(relative_load_LE, cmap="cividis_r", vmin=0.0, vmax=3.0, aspect="auto", interpolation="nearest")
    ticks = range(0, len(layer_ids), max(1, len(layer_ids) // 8))
    axes.set_yticks(ticks, [str(layer_ids[tick]) for tick in ticks])
    axes.set(xlabel="expert number", ylabel="MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def flows(
    axes: Axes,
    transition_EE: npt.NDArray[np.int64],
    ranks: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    num_ranks: int,
    top: int = 3,
) -> None:
    """Expert to expert across two adjacent MoE layers: each expert's `top` commonest successors.

    Experts stand side by side by rank, which their colour names; width is the tokens of the flow, wide ones on top.

    Args:
        ranks: int64 (E,) of the experts in each of the two layers.
    """
    places = [np.empty(len(rank_E), dtype=np.int64) for rank_E in ranks]
    for place_E, rank_E in zip(places, ranks, strict=True):
        place_E[np.argsort(rank_E, kind="stable")] = np.arange(len(rank_E))
    most = max(int(transition_EE.max()), 1)
    drawn = []
    bend = np.linspace(0.0, 1.0, 24)
    for expert, row in enumerate(transition_EE):
        for successor in np.argsort(-row, kind="stable")[:top].tolist():
            if row[successor] > 0:
                x = places[0][expert] + (places[1][successor] - places[0][expert]) * (3 * bend**2 - 2 * bend**3)
                colour = rank_colour(int(ranks[0][expert]), num_ranks)
                drawn.append((0.2 + 3.5 * row[successor] / most, np.column_stack([x, bend]), colour))
    drawn.sort(key=lambda flow: flow[0])
    widths, lines, colours = zip(*drawn, strict=True) if drawn else ((), (), ())
    axes.add_collection(LineCollection(lines, linewidths=widths, colors=colours, alpha=0.6))
    size = 4000 / max(len(transition_EE), 16) ** 1.3
    for y, place_E, rank_E in zip((0.0, 1.0), places, ranks, strict=True):
        of_rank = [rank_colour(int(rank), num_ranks) for rank in rank_E]
        axes.scatter(place_E, np.full(len(place_E), y), s=size, color=of_rank, marker="s", zorder=3)
    axes.set_yticks([0.0, 1.0], ["this layer", "the next one"])
    rank_legend(axes, num_ranks)
    axes.set(
        xlabel=f"experts, rank by rank; the widest flow is {most:,} tokens",
        xlim=(-1, len(transition_EE)),
        ylim=(1.12, -0.12),
    )
    axes.set_xticks([])


def predicted_against_measured(
    axes: Axes,
    predicted: npt.NDArray[np.float64],
    measured: npt.NDArray[np.float64],
    labels: Sequence[str],
    unit: str,
) -> None:
    """A point for each run; on the diagonal the prediction was right.

    Pairs without a prediction (NaN) are left out.
    """
    known = np.isfinite(predicted) & np.isfinite(measured)
    ends = np.concatenate([predicted[known], measured[known], [0.0]])
    axes.plot([0.0, 1.1 * ends.max()], [0.0, 1.1 * ends.max()], color=PALETTE[7], linewidth=1.0, linestyle="--")
    for place in np.flatnonzero(known).tolist():
        axes.scatter(predicted[place], measured[place], label=labels[place], zorder=3, **series_style(place))
    axes.set(xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}")
    if known.any():
        axes.legend(fontsize=7, frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing was predicted", ha="center", transform=axes.transAxes)


def convergence(axes: Axes, tokens: Sequence[int], values: Sequence[float], enough: int | None, unit: str) -> None:
    """A held-out figure against the tokens planned with, a point for each plan; a line where there were enough."""
    axes.scatter(tokens, values, color=PALETTE[0], zorder=3)
    final = float(np.asarray(values)[int(np.argmax(tokens))])
    axes.axhspan(0.99 * final, 1.01 * final, color=PALETTE[0], alpha=0.15, label="within 1% of all tokens")
    if enough is not None:
        axes.axvline(enough, color=PALETTE[2], linestyle="--", label=f"enough: {enough:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="tokens planned with", ylabel=unit)
    axes.legend(fontsize=7, frameon=False)
