"""Plans of recorded routing beside the best that any plan could reach: bounds, gaps and proven optima, all layers."""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from benchmarks import traces
from benchmarks.record import write
from placement.certify import certify
from placement.columns import can_enumerate
from placement.layer_problem import LayerProblem, Objective
from placement.solvers.partitioning import partitioning
from placement.solvers.search import ranks_of, search
from placement.topology import Topology

CASES = (
    ("gpt-oss-20b", 16, 1.1, 1),
    ("gpt-oss-20b", 8, 1.1, 1),
    ("gpt-oss-20b", 8, 1.05, 1),
    ("gpt-oss-20b", 4, 1.1, 6),
    ("deepseek-v2-lite", 16, 1.1, 1),
    ("deepseek-v2-lite", 8, 1.1, 1),
)
"""Trace, ranks, load cap, and every how many layers: groups of 8 of 32 experts take gigabytes and half a minute."""

SECONDS = 20.0
"""A layer, both metrics together."""


def pairs_problem(coactivation: npt.NDArray[np.int64], num_ranks: int) -> LayerProblem:
    """Top-2 routing known by counts (E, E) only: each pair is a token set.  No load cap, and fan_out to be least."""
    a, b = np.nonzero(np.triu(coactivation, 1))
    return LayerProblem(
        np.column_stack([a, b]).astype(np.int32),
        np.zeros(len(a), dtype=np.int64),
        coactivation[a, b].astype(np.float64),
        len(coactivation),
        Topology.for_experts(len(coactivation), num_ranks),
        load_cap=float(num_ranks),
        objective=Objective(fan_out=1.0),
    )


def cases() -> Iterator[tuple[str, int, str, list[LayerProblem]]]:
    """Trace, ranks, load cap and the problem of each layer, on the sequences that plans are made on."""
    for name, num_ranks, cap, every in CASES:
        planned, _ = traces.load(name, every).split_by_sequence()
        num_experts = planned.model.num_experts
        topology = Topology.for_experts(num_experts, num_ranks)
        ids_LTK = planned.require_tokens().topk_ids
        yield name, num_ranks, f"{cap}", [LayerProblem.from_ids(ids, num_experts, topology, cap) for ids in ids_LTK]
    counts = np.load(traces.FOLDER / "llama-moe-coactivation.npz")["base"]
    for num_ranks in (2, 4):
        yield "LLaMA-MoE", num_ranks, "none", [pairs_problem(layer, num_ranks) for layer in counts]


def main() -> None:
    if not traces.FOLDER.is_dir():
        print(f"no recorded traces at {traces.FOLDER}; set COTERIE_TRACES")
        return
    rows = []
    for name, num_ranks, cap, problems in cases():
        for strategy in (search, partitioning) if can_enumerate(problems[0]) else (search,):
            started = time.perf_counter()
            plans = [ranks_of(strategy(problem, np.random.default_rng(0)), problem) for problem in problems]
            planned = time.perf_counter()
            certificates = [certify(problem, plan, SECONDS) for problem, plan in zip(problems, plans, strict=True)]
            seconds = (f"{planned - started:.0f}", f"{time.perf_counter() - planned:.0f}")
            for metric in ("busiest_ingress", "fan_out"):
                bounds = [getattr(certificate, metric) for certificate in certificates]
                value, bound, gap = (
                    float(np.mean([getattr(each, of) for each in bounds])) for of in ("value", "bound", "gap")
                )
                exact = sum(each.method in ("set partitioning", "matching") for each in bounds)
                methods = ", ".join(sorted({each.method for each in bounds}))
                rows.append(
                    [
                        name,
                        num_ranks,
                        cap,
                        strategy.__name__,
                        metric,
                        value,
                        bound,
                        f"{gap:.2%}",
                        f"{exact} of {len(bounds)}",
                        methods,
                        *seconds,
                    ]
                )
            print(rows[-2:], flush=True)
    write(
        "certificates",
        "Plans beside the least that any plan could reach",
        "Planned tokens, mean over all layers, of gpt-oss-20b on 4 ranks over 4 of 24.  Plans are made for the busiest "
        "ingress on these tokens, those of LLaMA-MoE, of which only counts of pairs are known, for fan_out.  A layer "
        f"is exact where its bound is proved the optimum; {SECONDS:.0f} s a layer at most.  Seconds are of all layers, "
        "to prove for both metrics.  Where a plan breaks the load cap, its own imbalance stands for it.",
        (
            "trace",
            "ranks",
            "load cap",
            "strategy",
            "metric",
            "plan",
            "bound",
            "mean gap",
            "layers exact",
            "method",
            "seconds to plan",
            "seconds to prove",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
