"""Tables and figures of `constraints.py`: benchmarks/results/constraints.{md,json} and two pictures."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.constraints import CASES, MADE_BY, NAMES, SEEDS, TRAINING, WORK, name_of
from benchmarks.record import RESULTS, circumstances

METRICS = ("perplexity", "fan_out", "busiest_ingress", "imbalance_ratio")
Runs = dict[tuple[str, int], list[dict[str, Any]]]
Network = list[dict[str, Any]]
"""Of each seed, constraints by name."""


def write_tables() -> None:
    runs = _read()
    timed = [WORK / f"network-{seed}.json" for seed in SEEDS]
    network = [json.loads(path.read_text()) for path in timed if path.exists()]
    plain = runs["none", 0]
    lines = [
        "# Constrained routing: quality against traffic",
        "",
        f"The embedded model, 4 ranks, plans by search on calibration text, figures on 16,384 tokens of held-out text, "
        f"mean over layers. Mean of {len(SEEDS)} seeds (least to most), which vary the plan and the order of examples. "
        f"Fine-tuning: all weights, {TRAINING['steps']} steps of {TRAINING['batch_size']} sequences of 256 tokens of "
        f"calibration text, peak learning rate {TRAINING['learning_rate']:g}. Change: perplexity against the model "
        "without a constraint, before, or fine-tuned as long with the same seed, after.",
        "",
        _row(["constraint", "perplexity before", "change", "perplexity after", "change", *METRICS[1:]]),
        _row(["---"] * 8),
    ]
    records = []
    for (method, size), parts in sorted(runs.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1])):
        cells = [name_of(method, size)]
        for stage in ("before", "after"):
            quality = [part[stage]["perplexity"] for part in parts]
            cells += [_spread(quality), _spread(_changes(parts, plain, stage), "%")]
        cells += [_spread([part["after"][metric] for part in parts]) for metric in METRICS[1:]]
        lines.append(_row(cells))
        records += parts
    lines += ["", "Traffic is that of the fine-tuned model.", ""]
    lines += _equal_quality(runs, "before") + _equal_quality(runs, "after")
    lines += _network_lines(network)
    where = circumstances() | {"commit": MADE_BY.read_text()}
    lines += ["`python -m benchmarks.constraints`; " + ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    (RESULTS / "constraints.md").write_text("\n".join(lines))
    value = {"circumstances": where, "training": TRAINING, "runs": records, "network": network}
    (RESULTS / "constraints.json").write_text(json.dumps(value, indent=1) + "\n")
    _draw(runs, network)
    print("\n".join(lines))


def _read() -> Runs:
    runs: Runs = {}
    for method, size in CASES:
        files = [WORK / "runs" / f"{method}-{size}-{seed}.json" for seed in SEEDS]
        parts = [json.loads(file.read_text()) for file in files if file.exists()]
        if parts:
            runs[method, size] = parts
    return runs


def _changes(parts: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], stage: str) -> list[float]:
    of_seed = {part["seed"]: part[stage]["perplexity"] for part in plain}
    return [100 * (part[stage]["perplexity"] / of_seed[part["seed"]] - 1) for part in parts if part["seed"] in of_seed]


def _equal_quality(runs: Runs, stage: str) -> list[str]:
    """Device-aware C2R at the perplexity of device-blind C2R, between its own measured T."""
    lines = [
        f"## Device-aware against device-blind C2R at the same perplexity, {stage} fine-tuning",
        "",
        "The fan_out that device-aware lists have at the perplexity of the blind list, interpolated between their "
        "measured T and no constraint; of each seed, mean (least to most).",
        "",
        _row(["T of blind lists", "perplexity", "fan_out, blind", "fan_out, device-aware", "seeds"]),
        _row(["---"] * 5),
    ]
    aware = [key for key in runs if key[0] in ("aware", "none")]
    for method, size in sorted(key for key in runs if key[0] == "c2r"):
        rows = []
        for part in runs[method, size]:
            points = [
                (other[stage]["perplexity"], other[stage]["fan_out"])
                for key in aware
                for other in runs[key]
                if other["seed"] == part["seed"]
            ]
            points.sort()
            if points and points[0][0] <= part[stage]["perplexity"] <= points[-1][0]:
                at = float(np.interp(part[stage]["perplexity"], *map(list, zip(*points, strict=True))))
                rows.append((part[stage]["perplexity"], part[stage]["fan_out"], at))
        if rows:
            lines.append(_row([size, *(_spread(list(column)) for column in zip(*rows, strict=True)), len(rows)]))
        else:
            lines.append(_row([size, "beyond the measured device-aware lists", "", "", 0]))
    return [*lines, ""]


def _network_lines(network: Network) -> list[str]:
    if not network:
        return ["The network was not measured (needs root).", ""]
    lines = [
        "## Time on a network",
        "",
        "Four hosts (network namespaces of one machine), links of 400 Mbit/s, 1,024 tokens a rank, the model before "
        f"fine-tuning, plans of {len(network)} seeds; of each, the median of paired runs of the slowest rank, mean "
        "(least to most). Outputs equal the constrained single process but for tied tokens, for which two experts are "
        "so equal that a change of the embeddings by a millionth makes that process itself choose the other. MoE "
        "layers: dispatch, experts and combine. Speed-up of the MoE layers against the plan alone, median over the "
        "runs of a seed.",
        "",
        _row(
            [
                "map and constraint",
                "MB sent",
                "MoE layers, ms",
                "forward pass, ms",
                "speed-up",
                "difference of logits",
                f"tied of {4096 * len(network):,}",
            ]
        ),
        _row(["---"] * 7),
    ]
    for name in network[0]:
        shown = {"linear": "linear, no constraint", name_of("none", 0): "planned, no constraint"}.get(name, name)
        lines.append(
            _row(
                [
                    shown,
                    f"{statistics.mean(of_seed[name]['bytes_sent'] for of_seed in network) / 1e6:.1f}",
                    *(_spread(_milliseconds(network, name, key), digits=0) for key in ("layers", "total")),
                    _spread(
                        [
                            statistics.median(
                                alone / this
                                for alone, this in zip(
                                    of_seed[name_of("none", 0)]["layers"], of_seed[name]["layers"], strict=True
                                )
                            )
                            for of_seed in network
                        ],
                        digits=2,
                    ),
                    f"{max(of_seed[name]['max_difference'] for of_seed in network):.1e}",
                    sum(of_seed[name]["tied"] for of_seed in network),
                ]
            )
        )
    return [*lines, ""]


def _milliseconds(network: Network, name: str, key: str) -> list[float]:
    return [1e3 * statistics.median(of_seed[name][key]) for of_seed in network]


def _spread(values: Sequence[float], unit: str = "", digits: int = 3) -> str:
    if not values:
        return "-"
    sign, digits = ("+", 2) if unit else ("", digits)
    shown = [f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values))]
    return shown[0] + unit + ("" if len(set(shown)) == 1 else f" ({shown[1]} to {shown[2]})")


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


COLOURS = {"router": "#4477aa", "similarity": "#228833", "c2r": "#cc6677", "aware": "#aa3377", "none": "#444444"}
LABELS = {
    "router": "pruning, router-based",
    "similarity": "pruning, similarity-based",
    "c2r": "C2R",
    "aware": "C2R, device-aware",
    "none": "no constraint",
}


def _draw(runs: Runs, network: Network) -> None:
    panels = [("before", "fan_out"), ("after", "fan_out"), ("before", "busiest_ingress"), ("after", "busiest_ingress")]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex="row", sharey=True)
    for axis, (stage, metric) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, runs, stage, metric)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=len(labels))
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _save(figure, "constraints.svg")
    if network:
        figure, axis = plt.subplots(figsize=(6, 4))
        for method, size in CASES:
            parts = runs.get((method, size), [])
            if parts and name_of(method, size) in network[0]:
                change = statistics.mean(_changes(parts, runs["none", 0], "after"))
                time = statistics.mean(_milliseconds(network, name_of(method, size), "layers"))
                axis.plot(time, change, "o", color=COLOURS[method])
                axis.annotate(f" {size}" if size else "", (time, change), fontsize=8)
        axis.set_xlabel("time of the MoE layers on 4 hosts with 400 Mbit/s, ms")
        axis.set_ylabel("perplexity after fine-tuning\nagainst no constraint, %")
        for method, colour in COLOURS.items():
            axis.plot([], [], "o", color=colour, label=LABELS[method])
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        _save(figure, "constraints-time.svg")


def _draw_panel(axis: Any, runs: Runs, stage: str, metric: str) -> None:
    for method in NAMES:
        points = []
        for (its_method, size), parts in sorted(runs.items()):
            if its_method == method:
                changes = _changes(parts, runs["none", 0], stage)
                points.append((size, [part[stage][metric] for part in parts], changes))
        if points:
            x, y = [statistics.mean(point[1]) for point in points], [statistics.mean(point[2]) for point in points]
            spread = [
                [abs(extreme(point[2]) - mean) for point, mean in zip(points, y, strict=True)] for extreme in (min, max)
            ]
            axis.errorbar(
                x, y, yerr=spread, fmt="o-", color=COLOURS[method], label=LABELS[method], capsize=2, lw=1, ms=4
            )
            for (size, _, _), at, height in zip(points, x, y, strict=True):
                axis.annotate(f" {size}" if size else "", (at, height), fontsize=7)
    axis.set_title(f"{stage} fine-tuning", fontsize=10)
    axis.set_xlabel(metric)
    axis.set_ylabel("perplexity against no constraint, %")
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, name: str) -> None:
    path: Path = RESULTS / name
    with plt.rc_context({"svg.hashsalt": "coterie"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
