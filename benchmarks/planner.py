"""The planner against every peer, on recorded routing of real models that the plans have not seen.

Planned on the sequences at even places, measured on those at odd places, mean over all layers.
`python -m benchmarks.planner` measures all parts, `python -m benchmarks.planner time` one of `PARTS`.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

import placement.solvers
from benchmarks import traces
from benchmarks.record import peak_memory, write
from placement.compare import measure
from placement.layer_problem import Objective
from placement.solvers import HALVINGS, STRATEGIES, Options, objective_of, plan
from placement.topology import Links, Topology
from profiler.profile import Profile
from profiler.spec import MoESpec
from profiler.trace import TokenTrace, ids_dtype

Floats = npt.NDArray[np.float64]

CELLS = (
    ("gpt-oss-20b", 4),
    ("gpt-oss-20b", 8),
    ("deepseek-v2-lite", 4),
    ("deepseek-v2-lite", 8),
    ("deepseek-v2-lite", 16),
)
PEERS = tuple(name for name in STRATEGIES if name not in ("hypergraph", "partitioning"))
"""Hypergraph partitioning takes minutes a trace, and its plans are METIS's to 4% in every figure; set partitioning is
the project's own, and two of the cells allow it."""

SEEDS = (0, 1, 2, 3)
"""Seeds of the search; its figures differ by up to one part in a hundred between them."""

CLUSTERS = (("h100", 1), ("h100", 2), ("ethernet", 2))
"""Links, and nodes that the ranks are spread over."""


def balance() -> None:
    """Every strategy without knowing the hardware: what reaches the busiest rank, and how much it computes."""
    metrics = ("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share")
    rows = []
    sizes = {}
    for name, num_ranks in CELLS:
        planned, unseen = traces.load(name).split_by_sequence()
        sizes[name] = _tokens_of(planned, unseen)
        topology = Topology.for_experts(planned.model.num_experts, num_ranks)
        for strategy in PEERS:
            held, fitted, worst = [], [], []
            for seed in SEEDS if strategy == "search" else SEEDS[:1]:
                placement = plan(planned, topology, strategy, Options(seed=seed))
                for figures, part in ((held, unseen), (fitted, planned)):
                    found = measure(placement, part.require_tokens(), Options().workload)
                    figures.append([found[metric]["mean"] for metric in metrics])
                    if part is unseen:
                        worst.append([found[metric]["worst"] for metric in metrics])
            spread = [
                f"{least:.4f} to {most:.4f}" for least, most in zip(np.min(held, 0), np.max(held, 0), strict=True)
            ]
            rows.append(
                [
                    name,
                    num_ranks,
                    strategy,
                    *(round(value, 4) for value in np.mean(held, 0).tolist()),
                    " / ".join(spread[1:3]) if len(held) > 1 else "-",
                    *np.mean(worst, 0)[1:3].tolist(),
                    *np.mean(fitted, 0)[1:3].tolist(),
                ]
            )
            print(rows[-1], flush=True)
    write(
        "planner_balance",
        "Strategies on recorded routing",
        "Held-out figures, mean over all layers, of the search the mean of four seeds and their spread; beside them "
        "those of the worst layer, and those of the sequences that were planned on. "
        + "; ".join(f"{name}: {size}" for name, size in sizes.items())
        + ".",
        (
            "trace",
            "ranks",
            "strategy",
            *metrics,
            "busiest_ingress / imbalance_ratio by seed",
            "busiest_ingress, worst layer",
            "imbalance_ratio, worst layer",
            "busiest_ingress, planned on",
            "imbalance_ratio, planned on",
        ),
        rows,
        "planner balance",
    )


def _tokens_of(planned: Profile, unseen: Profile) -> str:
    sizes = planned.require_tokens().num_tokens, unseen.require_tokens().num_tokens
    return f"planned on {sizes[0]:,} tokens of each layer, measured on {sizes[1]:,}"


def predicted() -> None:
    """Predicted time of every strategy on clusters whose links are known; each plan is made for its cluster."""
    rows = []
    for name, num_ranks in CELLS:
        planned, unseen = traces.load(name).split_by_sequence()
        for cluster, nodes in CLUSTERS:
            links = Links.preset(cluster)
            topology = Topology.for_experts(planned.model.num_experts, num_ranks, nodes, links=links)
            times = {}
            for strategy in PEERS:
                placement = plan(planned, topology, strategy)
                figures = measure(placement, unseen.require_tokens(), Options().workload)
                times[strategy] = figures["predicted_time"]["mean"]
                rows.append(
                    [
                        name,
                        num_ranks,
                        f"{cluster}, {nodes} node{'s' * (nodes > 1)}",
                        strategy,
                        round(times[strategy] * 1e6, 1),
                        figures["busiest_ingress"]["mean"],
                        figures["busiest_node_ingress"]["mean"],
                        figures["imbalance_ratio"]["mean"],
                    ]
                )
            print(name, num_ranks, cluster, nodes, times, flush=True)
    columns = ("predicted time, µs", "busiest_ingress", "busiest_node_ingress", "imbalance_ratio")
    write(
        "planner_time",
        "Predicted time of strategies on known clusters",
        "Held out, mean over all layers; 4,096 tokens a rank, sent once per rank, fp8 there and bf16 back.",
        ("trace", "ranks", "cluster", "strategy", *columns),
        rows,
        "planner time",
    )


def copies() -> None:
    """Redundant experts: the search against copies of hot experts, with the same slots and the same choice."""
    planned, unseen = traces.load("gpt-oss-20b").split_by_sequence()
    metrics = ("fan_out", "busiest_ingress", "imbalance_ratio")
    rows = []
    for num_ranks in (4, 8):
        for num_redundant in (8, 16):
            topology = Topology.for_experts(32, num_ranks, 1, num_redundant)
            for strategy in ("linear", "random", "load", "search"):
                started = time.perf_counter()
                seeds = SEEDS if strategy == "search" else SEEDS[:1]
                placements = [
                    plan(planned, topology, strategy, Options(num_redundant=num_redundant, seed=seed)) for seed in seeds
                ]
                seconds = (time.perf_counter() - started) / len(seeds)
                for choice in ("token", "source"):
                    found = [measure(each, unseen.require_tokens(), Options().workload, choice) for each in placements]
                    means, worst = (
                        np.array([[figures[metric][of] for metric in metrics] for figures in found])
                        for of in ("mean", "worst")
                    )
                    ends = zip(means.min(axis=0), means.max(axis=0), strict=True)
                    spread = [f"{least:.4f} to {most:.4f}" for least, most in ends]
                    rows.append(
                        [
                            num_ranks,
                            num_redundant,
                            strategy,
                            choice,
                            *means.mean(axis=0).tolist(),
                            " / ".join(spread[1:]) if len(seeds) > 1 else "-",
                            *worst.mean(axis=0)[1:].tolist(),
                            f"{seconds:.0f}",
                        ]
                    )
                    print(rows[-1], flush=True)
    write(
        "planner_copies",
        "Redundant experts on gpt-oss-20b",
        "Held out, mean over all layers, of the search the mean of four seeds and their spread; copies are chosen by "
        f"each token or once for each source rank. {_tokens_of(planned, unseen).capitalize()}.",
        (
            "ranks",
            "redundant experts",
            "strategy",
            "choice",
            *metrics,
            "busiest_ingress / imbalance_ratio by seed",
            "busiest_ingress, worst layer",
            "imbalance_ratio, worst layer",
            "seconds to plan",
        ),
        rows,
        "planner copies",
    )


def objectives() -> None:
    """What fits traffic rather than the sample: objectives of the search, on splits by sequence and by domain."""
    plain = Objective(ingress=1.0)
    cases: dict[str, dict[str, Any]] = {  # what of the planner is another
        PLAIN: {"HALVINGS": 0, "objective_of": lambda *_: plain, "_drawn": lambda *_: None},
        PROVED: {"HALVINGS": 0},
        "default": {"HALVINGS": HALVINGS},  # no other; a patch has to name something
    }
    rows = []
    overall: dict[tuple[str, str], list[Floats]] = {}  # by split and case, of each cell (units, 2)
    for name, num_ranks in CELLS:
        profile = traces.load(name, every_nth_layer=2)
        topology = Topology.for_experts(profile.model.num_experts, num_ranks)
        splits = {
            "by sequence": _halvings(profile, num_ranks),
            "by domain": [[pair] for pair in _domain_splits(profile)],
        }
        for split, units in splits.items():
            seeds = range(max(1, FEWEST_PLANS // sum(map(len, units))))
            first: Floats = np.empty(0)
            for case, changes in cases.items():
                if case == PROVED and (name, num_ranks) not in PROVABLE:
                    continue
                strategy = "partitioning" if case == PROVED else "search"
                with patch.multiple(placement.solvers, **changes):
                    held = np.array([_held_out(pairs, topology, strategy, seeds) for pairs in units])
                if case == PLAIN:
                    first = held
                change = 100 * (held / first - 1)
                overall.setdefault((split, case), []).append(change)
                rows.append([name, num_ranks, split, case, *held.mean(axis=0).round(4).tolist(), *_changes([change])])
                print(rows[-1], flush=True)
    for (split, case), changes_of_cell in sorted(overall.items()):
        if case not in (PLAIN, PROVED):
            rows.append(["all", "-", split, case, "-", "-", *_changes(changes_of_cell)])
    write(
        "planner_objectives",
        "What fits traffic rather than the sample",
        "Held out, mean of every second layer. By sequence: planned on one half of the sequences, drawn at random, and "
        f"measured on the other, both ways round, {NUM_HALVINGS} times. By domain: planned on all domains but one and "
        f"measured on that one, for each with {FEWEST_TOKENS:,} tokens at least; parts of a benchmark are one domain. "
        f"Mean of as many seeds as make {FEWEST_PLANS} plans, one at least. Changes are from the first line of each "
        "block, mean over halvings or domains and in brackets its standard error; last, for how many of them both are "
        "lower. At the end the mean over traces and ranks, its error as if they had nothing in common.",
        (
            "trace",
            "ranks",
            "split",
            "objective",
            "busiest_ingress",
            "imbalance_ratio",
            "change in busiest_ingress",
            "change in imbalance_ratio",
            "both lower",
        ),
        rows,
        "planner objectives",
    )


PLAIN = "busiest ingress under the cap"
PROVED = "the least of it, by set partitioning"
PROVABLE = (("gpt-oss-20b", 8),)
"""Cells whose groups of experts are enumerated and whose layers are proved in a second each."""

NUM_HALVINGS = 4
FEWEST_PLANS = 8


def _changes(of_cell: list[Floats]) -> list[str]:
    """Changes in % of busiest_ingress and imbalance_ratio, mean over cells and its standard error; how many are both.

    Args:
        of_cell: float64 (units, 2) each.
    """
    means = np.mean([change.mean(axis=0) for change in of_cell], axis=0)
    variances = [change.var(axis=0, ddof=1) / len(change) for change in of_cell]
    errors = np.sqrt(np.sum(variances, axis=0)) / len(of_cell)
    every = np.concatenate(of_cell)
    if not every.any():
        return ["-", "-", "-"]
    shown = [f"{mean:+.2f}% ({error:.2f})" for mean, error in zip(means, errors, strict=True)]
    return [*shown, f"{int((every < 0).all(axis=1).sum())} of {len(every)}"]


def _held_out(pairs: list[tuple[Profile, Profile]], topology: Topology, strategy: str, seeds: range) -> Floats:
    """busiest_ingress and imbalance_ratio, mean over pairs of what to plan and to measure on, and over seeds."""
    figures = []
    for planned, unseen in pairs:
        for seed in seeds:
            found = plan(planned, topology, strategy, Options(seed=seed))
            measured = measure(found, unseen.require_tokens(), Options().workload)
            figures.append([measured[metric]["mean"] for metric in ("busiest_ingress", "imbalance_ratio")])
    return np.mean(figures, axis=0, dtype=np.float64)


def _halvings(profile: Profile, seed: int) -> list[list[tuple[Profile, Profile]]]:
    """Halves of the sequences drawn at random, each pair both ways round.

    Every other sequence would do less well: it has neighbours of the same text or question set on both sides.
    """
    tokens = profile.require_tokens()
    sequences = np.unique(tokens.sequence_ids)
    rng = np.random.default_rng(seed)
    halvings = []
    for _ in range(NUM_HALVINGS):
        chosen_T = np.isin(tokens.sequence_ids, rng.permutation(sequences)[: len(sequences) // 2])
        a, b = (
            Profile.from_tokens(profile.model, profile.domains, tokens.where(half_T), {})
            for half_T in (chosen_T, ~chosen_T)
        )
        halvings.append([(a, b), (b, a)])
    return halvings


def _domain_splits(profile: Profile) -> list[tuple[Profile, Profile]]:
    """All domains but one to plan on and that one to measure on, for each that has enough tokens."""
    tokens = profile.require_tokens()
    kinds = [domain.rpartition("_")[0] if domain.startswith(KINDRED) else domain for domain in profile.domains]
    kind_T = np.array([sorted(set(kinds)).index(kind) for kind in kinds])[tokens.domain_ids]
    return [
        tuple(
            Profile.from_tokens(profile.model, profile.domains, tokens.where(part), {})
            for part in (kind_T != kind, kind_T == kind)
        )
        for kind in np.flatnonzero(np.bincount(kind_T) >= FEWEST_TOKENS)
    ]


KINDRED = ("gpqa", "mmlu")
"""Domains whose names start so are parts of one: gpqa_diamond lies in gpqa_main, and that in gpqa_extended."""

FEWEST_TOKENS = 5000


def scale() -> None:
    """A model of the shape of DeepSeek-V3, and what it costs as experts, tokens and ranks double."""
    rows = []
    for layers, experts, ranks, redundant, tokens in (
        (58, 256, 32, 32, 100_000),
        (4, 128, 32, 0, 50_000),
        (4, 256, 32, 0, 50_000),
        (4, 256, 32, 0, 100_000),
        (4, 256, 64, 0, 50_000),
    ):
        for strategy in ("load", "metis", "search"):
            # A process of its own, whose peak of memory is of nothing else.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(_scaled, layers, experts, ranks, redundant, tokens, strategy).result())
            print(rows[-1], flush=True)
    write(
        "planner_scale",
        "A model of the shape of DeepSeek-V3",
        "Made-up routing with structure, top-8; planned on so many tokens a layer, measured on as many others. Peak "
        "memory is of the process, the routing included. Relative time is what the default objective takes a layer to "
        "last on unknown links: of an even plan in which nothing collaborates 5 to exchange and 1 to compute.",
        (
            "layers, experts, ranks, tokens",
            "strategy",
            "seconds",
            "peak GB",
            "fan_out",
            "busiest_ingress",
            "imbalance_ratio",
            "relative time",
        ),
        rows,
        "planner scale",
    )


def _scaled(layers: int, experts: int, ranks: int, redundant: int, tokens: int, strategy: str) -> list[Any]:
    """A row of `scale`."""
    planned, unseen = _structured(layers, experts, 2 * tokens).split_by_sequence()
    topology = Topology.for_experts(experts, ranks, 1, redundant)
    started = time.perf_counter()
    placement = plan(planned, topology, strategy, Options(num_redundant=redundant))
    seconds = time.perf_counter() - started
    peak = peak_memory() / 1e9
    figures = measure(placement, unseen.require_tokens(), Options().workload)
    metrics = ("fan_out", "busiest_ingress", "imbalance_ratio")
    weights = objective_of(planned.model, topology, Options())
    ingress, load = (figures[metric]["mean"] for metric in metrics[1:])
    return [
        f"{layers} x {experts} experts, {ranks} x {topology.slots_per_rank} slots, {tokens:,} tokens",
        strategy,
        round(seconds, 1),
        round(peak, 2),
        *(figures[metric]["mean"] for metric in metrics),
        weights.ingress * ingress + weights.load * load,
    ]


def _structured(num_layers: int, num_experts: int, num_tokens: int) -> Profile:
    """Sequences mix 16 topics, and each topic favours some experts; some experts are hot."""
    rng = np.random.default_rng(0)
    ids = np.empty((num_layers, num_tokens, 8), dtype=ids_dtype(num_experts))
    sequences = np.arange(num_tokens) // 200
    mixtures = rng.dirichlet(np.full(16, 0.3), sequences[-1] + 1).cumsum(axis=1)
    topic = (rng.random(num_tokens)[:, None] > mixtures[sequences]).sum(axis=1).clip(max=15)
    for layer in range(num_layers):
        affinity = rng.gumbel(size=(16, num_experts)) * 1.2 + rng.normal(size=num_experts) * 0.5
        for start in range(0, num_tokens, 10_000):
            part = slice(start, start + 10_000)
            scores = affinity[topic[part]] + rng.gumbel(size=(len(topic[part]), num_experts))
            ids[layer, part] = np.argpartition(-scores, 8, axis=1)[:, :8]
    zeros = np.zeros(num_tokens, dtype=np.uint8)
    spec = MoESpec("made-up", "deepseek_v3", tuple(range(3, 3 + num_layers)), num_experts, 8, 1, 7168, 2048, "bfloat16")
    return Profile.from_tokens(spec, ["made up"], TokenTrace(ids, sequences.astype(np.int32), zeros, zeros), {})


PARTS: dict[str, Callable[[], None]] = {
    "balance": balance,
    "time": predicted,
    "copies": copies,
    "objectives": objectives,
    "scale": scale,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        if name != "scale" and not traces.FOLDER.is_dir():
            print(f"no recorded traces at {traces.FOLDER}; set COTERIE_TRACES")
            continue
        PARTS[name]()


if __name__ == "__main__":
    main()
