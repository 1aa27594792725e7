"""Figures hold the data that they were given; every axis has a unit; shapes from 8 to 256 experts and 1 to 94 layers."""

import matplotlib as mpl
import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids
from matplotlib.figure import Figure

from profiler import Profile, plots
from profiler.analysis import collaboration_graph, lift, relative_load, total_coactivation, total_load


@pytest.fixture
def axes():
    return Figure().add_subplot()


def labelled(axes):
    return bool(axes.get_xlabel() and axes.get_ylabel())


@pytest.mark.parametrize("experts", [8, 256])
def test_heatmap_shows_lift_in_the_given_order(axes, experts):
    profile = Profile.from_tokens(
        make_spec(1, experts, 4), ["a", "b"], make_trace(random_ids(0, 1, 3000, experts, 4)), {}
    )
    pairs, load = total_coactivation(profile)[0], total_load(profile)[0]
    order = np.random.default_rng(0).permutation(experts)
    image = plots.coactivation_heatmap(axes, pairs, load, order, experts // 4, "title")
    shown = np.asarray(image.get_array())
    with np.errstate(divide="ignore"):
        expected = np.clip(np.log2(lift(pairs, load)), -2, 2)[np.ix_(order, order)]
    off = ~np.eye(experts, dtype=bool)
    assert shown[off] == pytest.approx(expected[off])
    assert len(axes.lines) == 2 * 3  # a border between ranks, both ways
    assert labelled(axes)


def test_graph_sizes_follow_load_and_colours_follow_rank(axes, profile):
    pairs, load = total_coactivation(profile)[0], total_load(profile)[0]
    ranks = np.arange(16) % 4
    plots.collaboration(axes, collaboration_graph(pairs, load), ranks, 4)
    nodes = next(part for part in axes.collections if len(part.get_offsets()) == 16)
    assert np.argsort(nodes.get_sizes()).tolist() == np.argsort(load).tolist()
    colours = {tuple(colour) for colour in nodes.get_facecolors()}
    assert colours == {plots.rank_colour(rank, 4) for rank in range(4)}


def test_bars_are_the_ranks_figures(axes):
    before, after = np.array([0.9, 0.5, 0.4]), np.array([0.6, 0.6, 0.5])
    plots.per_rank(axes, before, after, ("linear", "plan"), "ingress, share of tokens")
    assert [bar.get_height() for bar in axes.patches] == [*before, *after]
    assert labelled(axes)


def test_fan_out_shares_sum_to_one(axes):
    plots.fan_out_distribution(axes, {"linear": np.array([0, 1, 2, 7]), "plan": np.array([0, 5, 4, 1])})
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([0.1, 0.2, 0.7, 0.5, 0.4, 0.1])
    assert "plan (mean 1.60)" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert labelled(axes)


@pytest.mark.parametrize("layers", [1, 94])
def test_strips_fit_one_layer_and_many(axes, layers):
    values = np.random.default_rng(0).random(layers)
    plots.layer_strip(axes, range(3, 3 + layers), {"plan": values}, "busiest ingress, share of tokens")
    assert axes.lines[0].get_ydata().tolist() == values.tolist()
    assert labelled(axes)
    assert set(axes.get_xticks()) <= set(range(-20, 120))
    assert layers > 1 or axes.get_xticks().tolist() == [3]
    other = Figure().add_subplot()
    load = relative_load(np.random.default_rng(0).integers(1, 9, (layers, 256)))
    image = plots.load_strip(other, load, range(layers))
    assert np.asarray(image.get_array()) == pytest.approx(load)
    assert len(other.get_yticks()) <= 12
    assert labelled(other)


@pytest.mark.parametrize("experts", [8, 256])
def test_flows_lead_to_the_commonest_successors(axes, experts):
    transition = np.random.default_rng(0).integers(1, 99, (experts, experts))
    ranks = np.arange(experts) % 4
    plots.flows(axes, transition, (ranks, ranks), 4, top=2)
    lines = axes.collections[0].get_segments()
    assert len(lines) == 2 * experts
    place = np.argsort(np.argsort(ranks, kind="stable"))
    ends = {(*line[0].tolist(), *line[-1].tolist()) for line in lines}
    assert {(place[expert], 0, place[row.argmax()], 1) for expert, row in enumerate(transition)} <= ends
    widths = axes.collections[0].get_linewidths()
    assert sorted(widths) == list(widths)  # wide ones on top
    assert f"{transition.max():,} tokens" in axes.get_xlabel()


def test_predictions_that_are_missing_are_left_out(axes):
    plots.predicted_against_measured(
        axes, np.array([1.0, np.nan]), np.array([2.0, 3.0]), ("first", "second"), "ms a layer"
    )
    points = [part.get_offsets().tolist() for part in axes.collections]
    assert points == [[[1.0, 2.0]]]
    assert axes.get_xlabel() == "predicted, ms a layer"


def test_convergence_marks_where_there_was_enough(axes):
    plots.convergence(axes, [1000, 2000, 4000], [0.9, 0.7, 0.7], 2000, "busiest ingress, share of tokens")
    assert axes.collections[0].get_offsets().tolist() == [[1000, 0.9], [2000, 0.7], [4000, 0.7]]
    assert axes.lines[0].get_xdata()[0] == 2000
    assert labelled(axes)


def test_a_map_has_one_colour_in_all_pictures():
    bars, shares, strip = (Figure().add_subplot() for _ in range(3))
    plots.per_rank(bars, np.array([0.9, 0.5]), np.array([0.6, 0.6]), ("linear", "plan"), "share")
    plots.fan_out_distribution(shares, {"linear": np.array([0, 1, 2]), "plan": np.array([0, 5, 4])})
    plots.layer_strip(strip, [0, 1], {"linear": np.zeros(2), "plan": np.ones(2)}, "share")
    first, last = mpl.colors.to_rgba(plots.PALETTE[7]), mpl.colors.to_rgba(plots.PALETTE[0])
    for axes in (bars, shares):
        assert [patch.get_facecolor() for patch in axes.patches] == [first, first, last, last]
    assert [mpl.colors.to_rgba(line.get_color()) for line in strip.lines] == [first, last]
    assert plots.series_colours(3)[1] not in (plots.PALETTE[7], plots.PALETTE[0])


@pytest.mark.parametrize("num_ranks", [4, 8, 9, 64])
def test_rank_colours_are_explained(axes, num_ranks):
    plots.rank_legend(axes, num_ranks)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "rank 0"
    assert names[-1] == f"rank {num_ranks - 1}"
    assert len(names) == min(num_ranks, 8) or 5 <= len(names) <= 9


def test_empty_slots_are_blank(axes, profile):
    pairs, load = total_coactivation(profile)[0], total_load(profile)[0]
    image = plots.coactivation_heatmap(axes, pairs, load, np.array([3, -1, 5, -1]), 2, "title")
    assert np.isnan(np.asarray(image.get_array())[[1, 3]]).all()
    assert np.isfinite(np.asarray(image.get_array())[0, 2])


def test_experts_that_were_never_picked_are_blank(axes):
    pairs, load = np.zeros((4, 4), np.int64), np.array([5, 5, 5, 0])
    pairs[0, 1] = pairs[1, 0] = 3
    image = plots.coactivation_heatmap(axes, pairs, load, np.arange(4), 2, "title")
    assert np.isnan(np.asarray(image.get_array())[3]).all()
    assert np.asarray(image.get_array())[0, 2] == -2  # might have met, and never did
    image = plots.coactivation_heatmap(axes, np.zeros_like(pairs), load, np.arange(4), 2, "title")
    assert np.isnan(np.asarray(image.get_array())).all()  # top-1: no pair could


def test_ranks_keep_apart_in_any_colour_vision():
    assert len({plots.rank_colour(rank, 8) for rank in range(8)}) == 8
    assert len({plots.rank_colour(rank, 64) for rank in range(64)}) == 64
