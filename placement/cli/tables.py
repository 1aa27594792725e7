"""What commands print at their end, as tables of 80 columns. Reads no file, and prints nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from placement.placement_map import PlacementMap
    from placement.runtime.results import BenchResult, BenchRun, Spread
    from profiler.folder import StoredProfile
    from profiler.profile import Profile


def profile_table(stored: StoredProfile) -> Table:
    """Tokens and load imbalance of the experts, by domain."""
    table = Table(title=f"{stored.model.describe()}", title_justify="left")
    table.add_column("domain")
    for column in ("tokens", "busiest expert, share of tokens", "unused experts"):
        table.add_column(column, justify="right")
    for domain, tokens, load_LE in zip(stored.domains, stored.counts.tokens.tolist(), stored.counts.load, strict=True):
        share = load_LE.max() / max(tokens, 1)
        table.add_row(domain, f"{tokens:,}", f"{share:.1%}", f"{(load_LE == 0).mean():.1%}")
    return table


METRICS = {
    "fan_out": 2,
    "busiest_ingress": 3,
    "imbalance_ratio": 2,
    "intra_share": 3,
    "node_fan_out": 2,
    "busiest_node_ingress": 3,
}
"""Columns of tables, and their digits."""


def plan_table(placement: PlacementMap) -> Table:
    """Held-out figures of all strategies; the chosen one stands out."""
    assert placement.metrics
    measured = next(iter(placement.metrics.values()))
    title = (
        f"{placement.model.name} on {placement.topology.num_ranks} ranks, held out: "
        f"{measured['tokens_measured_on']:,} tokens (planned on {measured['tokens_planned_on']:,})"
    )
    figures = {name: measured["held_out"] for name, measured in placement.metrics.items()}
    return metrics_table(title, figures, str(placement.solver["name"]), placement.topology.num_nodes > 1)


def metrics_table(title: str, figures: Mapping[str, Any], chosen: str | None = None, nodes: bool = False) -> Table:
    """A row for each map: mean over layers and the worst layer."""
    table = Table(
        title=title,
        caption="mean over layers (worst layer)",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy", no_wrap=True)
    left_out = ("intra_share", "node_fan_out") if nodes else ("node_fan_out", "busiest_node_ingress")  # 80 columns
    columns = {name: digits for name, digits in METRICS.items() if name not in left_out}
    for column in columns:
        table.add_column("\n".join(column.rsplit("_", 1)), justify="right", no_wrap=True)
    timed = all("predicted_time" in measured for measured in figures.values())
    if timed:
        table.add_column("predicted\ntime, µs", justify="right", no_wrap=True)
    for name, measured in figures.items():
        cells = []
        for column, digits in columns.items():
            mean, worst = measured[column]["mean"], measured[column]["worst"]
            cells.append("-" if mean is None else f"{mean:.{digits}f} ({worst:.{digits}f})")
        if timed:
            cells.append(f"{measured['predicted_time']['mean'] * 1e6:,.0f}")
        table.add_row(name, *cells, style="bold" if name == chosen else None)
    return table


def regret_table(regrets: Mapping[str, Mapping[str, float]]) -> Table:
    """By domain, this plan beside one of the domain's own, on its unseen sequences."""
    table = Table(
        title="busiest_ingress / imbalance_ratio by domain, held out",
        caption="regret: how much higher this plan's busiest_ingress is than that of the domain's own plan",
        title_justify="left",
    )
    table.add_column("domain")
    for column in ("this plan", "its own plan", "regret"):
        table.add_column(column, justify="right")
    for domain, row in regrets.items():
        table.add_row(
            domain,
            f"{row['busiest_ingress']:.3f} / {row['imbalance_ratio']:.2f}",
            f"{row['own_busiest_ingress']:.3f} / {row['own_imbalance_ratio']:.2f}",
            f"{row['regret']:+.1%}",
        )
    return table


def certificate_table(certificate: Mapping[str, Any]) -> Table:
    """By metric: the plan's mean over layers, the mean bound, and how many layers are proved to be optimal."""
    table = Table(
        title="how far from the best, on the tokens planned with",
        caption=f"layer {next(iter(certificate))}: {next(iter(certificate.values()))['statement']}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("metric")
    for column in ("plan", "bound", "mean gap", "worst gap", "layers optimal"):
        table.add_column(column, justify="right")
    for metric in ("busiest_ingress", "fan_out"):
        bounds = [layer[metric] for layer in certificate.values()]
        gaps = [bound["gap"] for bound in bounds]
        table.add_row(
            metric,
            f"{sum(bound['value'] for bound in bounds) / len(bounds):.3f}",
            f"{sum(bound['bound'] for bound in bounds) / len(bounds):.3f}",
            f"{sum(gaps) / len(gaps):.1%}",
            f"{max(gaps):.1%}",
            f"{sum(bound['optimal'] for bound in bounds)} of {len(bounds)}",
        )
    return table


def bench_table(result: BenchResult, run: BenchRun) -> Table:
    """Times of every row; fits 80 columns."""
    places = f"{run.num_ranks} ranks" + (f" of {run.num_nodes} nodes" if run.num_nodes > 1 else "")
    parts = "parts are those of the forward pass" if result.workload == "training" else "parts are those"
    table = _plain_table(
        f"{result.model}, {result.workload}: {places} ({result.wire(run)}), {run.tokens_per_rank} tokens a rank",
        f"ms of the slowest rank in one step, median of {result.repeats} paired runs (least-most); {parts} of all MoE "
        f"layers, the total is of the whole step; speed-ups against the first row; differs from one process by "
        f"{result.max_difference:.1e} at most",
    )
    table.add_column("implementation", min_width=14)
    table.add_column("map")
    for column in ("dis-\npatch", "expert", "com-\nbine", "exchange\nspeed-up", "total", "speed\nup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in run.rows:
        table.add_row(
            row.implementation,
            row.map,
            *(_ms(phase.median) for phase in (row.dispatch, row.expert, row.combine)),
            f"{row.exchange_speed_up.median:.2f}",
            _spread(row.total),
            f"{row.speed_up.median:.2f}",
        )
    return table


def traffic_table(run: BenchRun) -> Table:
    """Bytes of every row beside time and prediction; fits 80 columns."""
    found = "; ".join(f"{names.replace(', ', ' and ')} {value:.2f}" for names, value in run.correlations.items())
    table = _plain_table(
        "what that sent, MB in one step",
        "counted: to other ranks, or to other hosts where there are several; interfaces: all of that as the system "
        "counts; least: rows that go there x hidden size x width, both ways; "
        "predicted: by the cost model on links measured before, ms"
        + (f"; rank correlation over maps: {found}" if found else ""),
    )
    table.add_column("implementation", min_width=14)
    table.add_column("map")
    for column in ("fan_out", "rows", "counted", "inter-\nfaces", "least", "exchange\nms", "pre-\ndicted"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in run.rows:
        table.add_row(
            row.implementation,
            row.map,
            f"{row.fan_out:.2f}",
            f"{row.rows_per_token:.2f}",
            *(
                "-" if sent is None else f"{sent / 1e6:.4g}"
                for sent in (row.wire_bytes, row.interface_bytes, row.least_bytes)
            ),
            _ms(row.exchange.median),
            "-" if row.predicted_exchange is None else _ms(row.predicted_exchange),
        )
    return table


def _plain_table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )


def load_summary(recorded: Profile) -> dict[str, Any]:
    """What a profile shows without a plan: model, tokens, domains, and the layers' tables."""
    from profiler.analysis import community_table, load_table
    from profiler.drift import domain_table

    layers = load_table(recorded).merge(community_table(recorded)[0], on="layer")
    rows = layers.to_dict("records")
    if "cannot_tell" in recorded.provenance:  # counts that hold no pairs
        rows = [{**row, "communities": None, "largest": None, "modularity": None} for row in rows]
    domains = domain_table(recorded) if recorded.tokens is not None else None
    return {
        "model": recorded.model.describe(),
        "tokens": recorded.num_tokens,
        "layers": rows,
        "domains": [] if domains is None else domains.to_dict("records"),
    }


COUNTED = ("hottest", "hot", "cold", "dead", "communities")
"""Columns of a layer in whole numbers."""


def insight_tables(summary: Mapping[str, Any]) -> Group:
    """A screenful: at most a dozen layers, the least even first, and the domains."""
    table = Table(title=f"{summary['model']}, {summary['tokens']:,} tokens", title_justify="left", box=SIMPLE_HEAD)
    for column in ("layer", "expert\nimbalance", "hottest\nexpert", "hot", "cold", "dead", "communities", "modularity"):
        table.add_column(column, justify="right")
    shown = sorted(summary["layers"], key=lambda row: -row["expert_imbalance"])[:12]
    for row in shown:
        ratio = f"{row['expert_imbalance']:.2f}"
        modularity = "-" if row["modularity"] is None else f"{row['modularity']:.2f}"
        counts = ["-" if row[name] is None else str(row[name]) for name in COUNTED]
        table.add_row(str(row["layer"]), ratio, *counts, modularity)
    if len(shown) < len(summary["layers"]):
        table.caption = f"the {len(shown)} least even of {len(summary['layers'])} layers"
    parts = [table]
    if summary["domains"]:
        domains = Table(
            title="each domain against the others: distance of expert loads in bits",
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        domains.add_column("domain", no_wrap=True, max_width=18)
        for column, width in (("tokens", 7), ("distance", 8), ("noise", 5), ("p", 5)):
            domains.add_column(column, justify="right", no_wrap=True, min_width=width)
        domains.add_column("what stands out", no_wrap=True)
        for row in summary["domains"][:12]:
            figures = [f"{row[name]:.3f}" for name in ("load_distance", "load_noise", "load_p")]
            domains.add_row(row["domain"], f"{row['tokens']:,}", *figures, row["hottest"])
        parts.append(domains)
    return Group(*parts)


def _spread(value: Spread) -> str:
    return f"{_ms(value.median)} ({_ms(value.least)}-{_ms(value.most)})"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
