"""What maps buy in real runs: on hosts with cables of 400 Mbit/s, and on one machine. Records tables in this folder.

    python -m benchmarks.runtime plans coterie-demo     once, after `make demo`: maps to run, into build/runtime
    sudo python -m benchmarks.runtime prefill 1         first run of a part; `2` for the second, and so on

Needs the recorded routing that `COTERIE_TRACES` names for the two replays.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import traces
from benchmarks.record import circumstances
from placement.placement_map import PlacementMap
from placement.report.bench_picture import draw_bench
from placement.runtime.bench import Settings, bench
from placement.runtime.results import BenchResult, BenchRow
from placement.solvers import plan
from placement.topology import Topology
from profiler import Profile, zoo
from profiler.documents import read_documents

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "build" / "runtime"
RATE = "400mbit"
STRATEGIES = ("random", "load", "occult", "metis", "spectral", "quadratic", "search")
REPLAYED = ("deepseek-v2-lite", "gpt-oss-20b")
EVERY_NTH_LAYER = 6
STEPS = (1, 2, 3, 4)
"""Of the five layers replayed, how many have the search's plan in maps between file order and the search: strategies
come in two heaps, whose members differ by less than one run does from the next."""


@dataclass(frozen=True)
class Part:
    """One table."""

    title: str
    maps: tuple[str, ...]
    settings: Settings
    replay: str | None = None


ON_NETWORK = Settings(network=RATE, repeats=9)
PARTS = {
    "prefill": Part(
        "A forward pass of the embedded model on 4 hosts",
        tuple(f"{name}-4" for name in STRATEGIES),
        ON_NETWORK,
    ),
    "training": Part(
        "A training step of the embedded model on 4 hosts", ("search-4",), replace(ON_NETWORK, kind="training")
    ),
    "decode": Part(
        "Decoding with the embedded model on 4 hosts",
        ("search-4",),
        replace(ON_NETWORK, kind="decode", sequences_per_rank=(4, 16), steps=8, sequence_length=128),
    ),
    "nodes": Part(
        "A forward pass of the embedded model on 2 hosts of 2 ranks",
        ("search-2x2",),
        replace(ON_NETWORK, modes=("flat", "hierarchical", "bf16", "hierarchical-bf16"), repeats=7),
    ),
    "deepseek-v2-lite": Part(
        "Routing of DeepSeek-V2-Lite on 4 hosts",
        ("deepseek-v2-lite-search-4",),
        replace(ON_NETWORK, sequences_per_rank=(1,), expert_size=1408 // 8, repeats=7),
        "deepseek-v2-lite",
    ),
    "gpt-oss-20b": Part(
        "Routing of gpt-oss-20b on 4 hosts",
        ("gpt-oss-20b-search-4",),
        replace(ON_NETWORK, sequences_per_rank=(1,), expert_size=2880 // 8, repeats=7),
        "gpt-oss-20b",
    ),
    "maps": Part(
        "Routing of DeepSeek-V2-Lite on 4 hosts, all strategies and steps between, narrow experts",
        tuple(f"deepseek-v2-lite-{name}-4" for name in (*STRATEGIES, *(f"search-in-{n}" for n in STEPS))),
        replace(ON_NETWORK, sequences_per_rank=(1,), expert_size=64, repeats=5),
        "deepseek-v2-lite",
    ),
    "one-machine": Part(
        "A forward pass of the embedded model on one machine",
        ("search-2", "search-4", "search-8"),
        Settings(sequences_per_rank=(1, 2, 8), repeats=9),
    ),
}


def make_plans(demo: Path) -> None:
    """Maps of the embedded model from all calibration texts, and of recorded routing from every other sequence."""
    WORK.mkdir(parents=True, exist_ok=True)
    calibration = Profile.load_from(demo / "calibration.profile")
    for num_nodes, ranks_per_node, strategies in (
        (1, 4, STRATEGIES),
        (1, 2, ("search",)),
        (1, 8, ("search",)),
        (2, 2, ("search",)),
    ):
        topology = Topology.for_experts(calibration.model.num_experts, num_nodes * ranks_per_node, num_nodes)
        suffix = f"{ranks_per_node}" if num_nodes == 1 else f"{num_nodes}x{ranks_per_node}"
        for strategy in strategies:
            plan(calibration, topology, strategy).save(WORK / f"{strategy}-{suffix}.json")
    if not traces.FOLDER.is_dir():
        print(f"no recorded traces at {traces.FOLDER}, so nothing to replay; set COTERIE_TRACES")
        return
    for name in REPLAYED:
        planned, unseen = traces.load(name, EVERY_NTH_LAYER).split_by_sequence()
        unseen.save(WORK / f"{name}.profile")
        topology = Topology.for_experts(planned.model.num_experts, 4)
        searched = plan(planned, topology, "search")
        searched.save(WORK / f"{name}-search-4.json")
        if name != "deepseek-v2-lite":
            continue
        for strategy in STRATEGIES[:-1]:
            plan(planned, topology, strategy).save(WORK / f"{name}-{strategy}-4.json")
        linear = PlacementMap.linear(planned.model, topology).physical_to_logical_map
        for step in STEPS:
            slots = np.concatenate([searched.physical_to_logical_map[:step], linear[step:]])
            replace(searched, physical_to_logical_map=slots).save(WORK / f"{name}-search-in-{step}-4.json")


def measure(name: str, number: int) -> None:
    """One run of a part, added to its table."""
    part = PARTS[name]
    maps = {
        which.removeprefix(f"{part.replay}-"): PlacementMap.load_from(WORK / f"{which}.json") for which in part.maps
    }
    replay = WORK / f"{part.replay}.profile" if part.replay else None
    documents = [] if replay else read_documents([zoo.HELD_OUT])
    result = bench(maps, None, documents, replay, part.settings)
    assert result is not None
    result.save(HERE / f"{name}-{number}.json")
    (HERE / f"{name}-{number}.where.json").write_text(json.dumps(circumstances(), indent=1) + "\n")
    if name == "prefill" and number == 1:
        (HERE.parents[1] / "docs" / "images" / "bench.png").write_bytes(draw_bench(result))
    write_table(name, part)


def write_table(name: str, part: Part) -> None:
    """Render all runs of a part."""
    files = sorted(path for path in HERE.glob(f"{name}-[0-9].json"))
    results = [BenchResult.load_from(path) for path in files]
    some = results[0]
    replayed = f", experts {part.settings.expert_size} wide" if part.replay else ""
    lines = [
        f"# {part.title}",
        "",
        f"{some.model}{replayed}; {some.network + ' cables' if some.network else 'through memory'}; milliseconds of "
        f"the slowest rank in one step, median of {some.repeats} paired runs (least to most). Parts are those of all "
        "MoE layers in the forward pass, each started by all ranks at once; the total is the whole step, not held up "
        "so. Shares: of the parts. MB: counted by coterie / by the interfaces / the least that the map needs. "
        "Predicted: by the cost model on links measured before the run. Speed-ups: against the first row; of the "
        "exchange also against the same exchange on the linear map.",
        "",
    ]
    columns = (
        "run, ranks, tokens a rank", "exchange", "map", "fan_out", "MB counted / interfaces / least", "dispatch",
        "expert", "combine", "index share", "exchange", "share", "predicted", "exchange speed-up", "against linear",
        "total", "speed-up", "largest difference",
    )  # fmt: skip
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for number, result in enumerate(results, 1):
        for run in result.runs:
            where = f"{number}, {run.num_ranks}, {run.tokens_per_rank}"
            lines += ["| " + " | ".join([where, *_cells(row)]) + " |" for row in run.rows]
    for number, result in enumerate(results, 1):
        for run in result.runs:
            if run.correlations:
                found = "; ".join(
                    f"{which.replace(', ', ' and ')} {rho:.3f}" for which, rho in run.correlations.items()
                )
                lines += ["", f"Run {number}, rank correlation over {len(part.maps) + 1} maps: {found}."]
    for number, path in enumerate(files, 1):
        where = json.loads(path.with_suffix(".where.json").read_text())
        lines += [
            "",
            f"`python -m benchmarks.runtime {name} {number}`; " + ", ".join(f"{k} {v}" for k, v in where.items()),
        ]
    (HERE / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cells(row: BenchRow) -> list[str]:
    spread = lambda value: f"{value.median:.4g} ({value.least:.4g} to {value.most:.4g})"  # noqa: E731
    ratio = lambda value: f"{value.median:.2f} ({value.least:.2f} to {value.most:.2f})"  # noqa: E731
    sent = (
        "-" if part is None else f"{part / 1e6:.4g}" for part in (row.wire_bytes, row.interface_bytes, row.least_bytes)
    )
    return [
        row.implementation,
        row.map,
        f"{row.fan_out:.2f}",
        " / ".join(sent),
        *(spread(part) for part in (row.dispatch, row.expert, row.combine)),
        f"{row.index.median / row.layer:.1%}",
        spread(row.exchange),
        f"{row.exchange.median / row.layer:.0%}",
        "-" if row.predicted_exchange is None else f"{row.predicted_exchange:.4g}",
        ratio(row.exchange_speed_up),
        ratio(row.exchange_against_linear),
        spread(row.total),
        ratio(row.speed_up),
        f"{row.max_difference:.1e}",
    ]


if __name__ == "__main__":
    if sys.argv[1] == "plans":
        make_plans(Path(sys.argv[2]))
    else:
        measure(sys.argv[1], int(sys.argv[2]))
