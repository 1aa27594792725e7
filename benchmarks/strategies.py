"""Every strategy on recorded routing of real models: planned on even sequences, measured on odd ones, all layers."""

import time

from benchmarks import traces
from benchmarks.record import write
from placement.cost import evaluate
from placement.solvers import STRATEGIES, plan
from placement.topology import Topology

CASES = (("gpt-oss-20b", (4, 8)), ("deepseek-v2-lite", (4, 8, 16)))
METRICS = ("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share")


def main() -> None:
    if not traces.FOLDER.is_dir():
        print(f"no recorded traces at {traces.FOLDER}; set COTERIE_TRACES")
        return
    rows = []
    for name, ranks in CASES:
        planned, unseen = traces.load(name).split_by_sequence()
        for num_ranks in ranks:
            for strategy in STRATEGIES:
                started = time.perf_counter()
                placement = plan(planned, Topology.for_experts(planned.model.num_experts, num_ranks), strategy)
                seconds = time.perf_counter() - started
                held_out = evaluate(placement, unseen.require_tokens()).summary()
                train = evaluate(placement, planned.require_tokens()).summary()["busiest_ingress"]["mean"]
                figures = (held_out[metric]["mean"] for metric in METRICS)
                rows.append([name, num_ranks, strategy, *figures, train, f"{seconds:.1f}"])
    write(
        "strategies",
        "Strategies on recorded routing",
        "Held-out figures, mean over all layers; beside them busiest_ingress on the sequences that were planned on.",
        ("trace", "ranks", "strategy", *METRICS, "busiest_ingress, planned on", "seconds"),
        rows,
    )


if __name__ == "__main__":
    main()
