"""`coterie bench` and `demo`: what a plan bought in a real run, and the whole chain on the embedded model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from placement.cli.app import Data, Json, Ranks, app, notes, print_json, tables
from placement.cli.insights import report
from placement.cli.plans import plan
from placement.cli.profiles import profile
from placement.cli.tables import bench_table
from profiler.errors import CoterieError
from profiler.files import require_writable


@app.command()
def bench(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Placement map to run.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub id; the embedded model if left out.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Must be the plan's; taken from it if left out.")] = None,
    data: Data = None,
    sequences_per_rank: Annotated[int, typer.Option(help="Sequences in each rank's batch.")] = 2,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    repeats: Annotated[int, typer.Option(help="Timed runs of each row, taken in turns.")] = 15,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Run the model expert-parallel on this machine as the plan says, check its outputs, measure bytes and times.

    Example: coterie bench plan.json --ranks 4 -o bench.json
    """
    from placement.placement_map import PlacementMap
    from placement.runtime.bench import bench as run_bench
    from profiler import zoo
    from profiler.calibration import read_documents

    if out:
        require_writable(out)
    placement = PlacementMap.load_from(plan_file)
    num_ranks = placement.topology.num_ranks
    if ranks is not None and ranks != num_ranks:
        raise CoterieError(f"--ranks {ranks}: the plan is for {num_ranks}; give {num_ranks} or plan for {ranks}")
    documents = read_documents(data or [zoo.HELD_OUT])
    with notes.status(f"running {model or zoo.NAME} on {num_ranks} ranks"):
        result = run_bench(
            placement,
            model,
            documents,
            sequences_per_rank=sequences_per_rank,
            sequence_length=sequence_length,
            repeats=repeats,
        )
    if out:
        result.save(out)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        tables.print(bench_table(result))
    if result.backend == "gloo":
        notes.print("ranks on one machine exchange through memory: MB sent is what a network would carry")
    if out:
        notes.print(f"wrote {out}")


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
    bench(plan_file, out=bench_file)
    notes.rule("4 of 4: see it")
    report(calibration, plan_file, bench_file, held_out=held_out, out=page)
    notes.print(f"open {page} in a browser")
