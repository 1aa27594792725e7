"""Draws the README's picture from what `coterie demo` wrote: `python -m benchmarks.readme_picture coterie-demo`."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from placement.cost import evaluate
from placement.placement_map import PlacementMap
from profiler import plots
from profiler.profile import Profile

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "before-after.png"
LAYER = 2


def main(folder: Path) -> None:
    unseen, placement = Profile.load_from(folder / "held-out.profile"), PlacementMap.load_from(folder / "plan.json")
    coactivation, load = (counts[:, LAYER].sum(axis=0) for counts in (unseen.counts.coactivation, unseen.counts.load))
    linear = PlacementMap.linear(unseen.model, placement.topology)
    before, after = (evaluate(each, unseen.require_tokens()) for each in (linear, placement))
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, order, title in (
        (left, np.arange(unseen.model.num_experts), "who fires with whom: file order"),
        (middle, placement.physical_to_logical_map[LAYER], "the same, as the plan places them"),
    ):
        image = plots.coactivation_heatmap(axes, coactivation, load, order, placement.topology.slots_per_rank, title)
    figure.colorbar(image, ax=middle, shrink=0.8, label="co-activation against chance, log2")
    unit = "ingress, share of all tokens"
    plots.per_rank(right, before.ingress[LAYER], after.ingress[LAYER], ("linear", "plan"), unit)
    right.set_title("tokens that reach each rank")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
