"""`coterie bench` and `demo`: what a plan bought in a real run, and the whole chain on the embedded model.
Plans and times nothing itself: other commands plan, `placement/runtime/bench.py` times.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from placement.cli.app import Data, Json, Ranks, app, notes, print_json, seed_option, tables
from placement.cli.insights import report
from placement.cli.plans import plan
from placement.cli.profiles import profile
from placement.cli.tables import bench_table, traffic_table
from profiler.errors import CoterieError
from profiler.files import require_writable, write_bytes


class Kind(StrEnum):
    """What one step is."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRAINING = "training"


class Mode(StrEnum):
    """How coterie exchanges."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    BF16 = "bf16"
    HIERARCHICAL_BF16 = "hierarchical-bf16"


@app.command()
def bench(
    plan_files: Annotated[
        list[Path],
        typer.Argument(
            metavar="PLAN...", help="Placement maps to run, beside file order; those for other ranks apart."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Model folder or hub id; the embedded model if left out.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Profile whose routing to replay through random weights, instead of a model.")
    ] = None,
    workload: Annotated[
        Kind, typer.Option(help="One forward pass, decoding token by token, or a training step.")
    ] = Kind.PREFILL,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="How coterie exchanges; may be given several times; flat if left out.")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="Rate of a cable, such as 400mbit: run on hosts that are namespaces of this machine."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Must be the plan's; taken from it if left out.")] = None,
    data: Data = None,
    sequences_per_rank: Annotated[
        list[int] | None,
        typer.Option(help="Sequences in each rank's batch; may be given several times; 2 if left out."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    steps: Annotated[
        int | None,
        typer.Option(help="Of decoding: the last tokens of each sequence, one by one; 16 if left out."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each row, taken in turns.")] = 15,
    hidden_size: Annotated[int | None, typer.Option(help="Of a replay, instead of the model's.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Of a replay, instead of the model's.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="MoE layers to replay, at equal distances; all if left out.")
    ] = None,
    seed: Annotated[
        int | None, seed_option("Of a replay's choice of sequences and random values; 0 if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write.")] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG file to draw into.")] = None,
    as_json: Json = False,
) -> None:
    """Run plans expert-parallel beside transformers' all_to_all, check outputs, measure bytes and times.

    Each PLAN is called by its file's name. Under torchrun the ranks are those of torchrun.

    Example: coterie bench plan.json --network 400mbit -o bench.json
    """
    from placement.placement_map import PlacementMap
    from placement.report.bench_picture import draw_bench
    from placement.runtime.bench import Settings
    from placement.runtime.bench import bench as run_bench
    from profiler import zoo
    from profiler.documents import read_documents

    for path in (out, figure):
        if path:
            require_writable(path, *plan_files)
    maps: dict[str, PlacementMap] = {}
    for path in plan_files:
        placement = PlacementMap.load_from(path)
        num_ranks = placement.topology.num_ranks
        if ranks is not None and ranks != num_ranks:
            raise CoterieError(f"--ranks {ranks}: the plan is for {num_ranks}; give {num_ranks} or plan for {ranks}")
        if path.stem in maps or path.stem == "linear":
            raise CoterieError(f"{path}: a map called {path.stem!r} is benched already; give its file another name")
        maps[path.stem] = placement
    if replay and (model or data):
        raise CoterieError("--replay runs no model on texts; leave --model and --data out")
    only_replayed = {"--hidden-size": hidden_size, "--expert-size": expert_size, "--layers": layers, "--seed": seed}
    for option, value in only_replayed.items():
        if value is not None and not replay:
            raise CoterieError(f"{option} {value}: is of a replay; give --replay, or leave it out")
    if steps is not None and workload is not Kind.DECODE:
        raise CoterieError(f"--steps {steps}: is of decoding; give --workload decode, or leave it out")
    settings = Settings(
        kind=workload.value,
        modes=tuple(one.value for one in mode or [Mode.FLAT]),
        sequences_per_rank=tuple(sequences_per_rank or [2]),
        sequence_length=sequence_length,
        steps=16 if steps is None else steps,
        repeats=repeats,
        network=network,
        hidden_size=hidden_size,
        expert_size=expert_size,
        num_layers=layers,
        seed=seed or 0,
    )
    documents = [] if replay else read_documents(data or [zoo.HELD_OUT])
    what = f"routing of {replay}" if replay else model or zoo.NAME
    with notes.status(f"{workload.value} of {what}, {len(maps)} maps and file order"):
        result = run_bench(maps, model, documents, replay, settings)
    if result is None:  # another rank of torchrun has it
        return
    if out:
        result.save(out)
    if figure:
        write_bytes(figure, draw_bench(result))
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        for run in result.runs:
            tables.print(bench_table(result, run))
            tables.print(traffic_table(run))
    if result.backend == "gloo" and all(run.num_hosts == 1 for run in result.runs):
        notes.print("ranks on one machine exchange through memory: MB sent is what a network would carry")
    for path in (out, figure):
        if path:
            notes.print(f"wrote {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write into.")] = Path("coterie-demo"),
    ranks: Ranks = 4,
) -> None:
    """Profile the embedded model, plan, run the plan on this machine and show what it bought.

    Example: coterie demo --ranks 4
    """
    from placement.topology import Topology
    from profiler import zoo
    from profiler.writer import discard_unfinished

    Topology.for_experts(zoo.NUM_EXPERTS, ranks)  # says at once what would only fail after profiling
    calibration, held_out = out / "calibration.profile", out / "held-out.profile"
    plan_file, bench_file, page = out / "plan.json", out / "bench.json", out / "report.html"
    notes.rule("1 of 4: which experts does each token pick?")
    for folder, texts in ((calibration, zoo.CALIBRATION), (held_out, zoo.HELD_OUT)):
        discard_unfinished(folder)
        profile(out=folder, data=[str(texts)])
    notes.rule(f"2 of 4: where should they live, on {ranks} ranks?")
    plan(calibration, ranks, out=plan_file, held_out=held_out)
    notes.rule("3 of 4: what does that buy in a real run?")
    bench([plan_file], out=bench_file)
    notes.rule("4 of 4: see it")
    report(calibration, plan_file, bench_file, held_out=held_out, out=page)
    notes.print(f"open {page} in a browser")
