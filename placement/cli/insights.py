"""`coterie inspect` and `coterie report`: what a profile and a plan mean, in a screenful and on a page.
Measures and concludes nothing itself: `placement/insight.py` and `placement/verdict.py` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.app import Json, app, notes, print_json, progress_bar, tables
from placement.cli.tables import insight_tables, load_summary
from profiler.errors import CoterieError
from profiler.files import require_writable

if TYPE_CHECKING:
    from placement.insight import Insight, Study
    from placement.placement_map import PlacementMap
    from placement.runtime.results import BenchResult
    from placement.solvers import Options
    from placement.sufficiency import Planner
    from profiler.profile import Profile

STUDY_KICKS = 8
"""Rounds of the search in plans that are only compared with each other; all of them get as many."""

HeldOut = Annotated[
    Path | None, typer.Option(help="Profile to measure on; the half of RUN that the plan has not seen if left out.")
]
WithStudy = Annotated[
    bool | None,
    typer.Option(
        "--study/--no-study", help="Plan again from less text and by domain: was there enough? Done if left out."
    ),
]


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="Profile folder; best the one that was planned with.")],
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="Placement map to judge.")] = None,
    held_out: HeldOut = None,
    study: WithStudy = None,
    as_json: Json = False,
) -> None:
    """Say in a screenful what a profile shows and whether a plan is worth it.

    Example: coterie inspect run.profile plan.json
    """
    import dataclasses

    from rich.text import Text

    from placement.placement_map import PlacementMap
    from placement.verdict import answers
    from profiler.profile import Profile

    if plan_file is None and held_out:
        raise CoterieError(f"--held-out {held_out}: is to measure a plan on; give a plan, or leave it out")
    if plan_file is None and study is not None:
        raise CoterieError("--study and --no-study: are of a plan; give a plan, or leave them out")
    recorded = Profile.load_from(run)
    if plan_file is None:
        summary = load_summary(recorded)
        print_json(summary) if as_json else tables.print(insight_tables(summary))
        notes.print("give a plan to judge it: coterie inspect RUN PLAN")
        return
    unseen = Profile.load_from(held_out) if held_out else None
    insight = gather_all(recorded, PlacementMap.load_from(plan_file), unseen, None, study is not False)
    found = answers(insight)
    if as_json:
        print_json({name: dataclasses.asdict(answer) for name, answer in found.items()})
        return
    tones = {"good": "green", "bad": "red", "unsure": "yellow", "plain": "cyan"}
    model, num_ranks = insight.plan.model.describe(), insight.plan.topology.num_ranks
    tables.print(Text.assemble((model, "bold"), f" on {num_ranks} ranks"))
    for answer in found.values():
        asked, told = (f"\n{answer.question}", "dim"), (answer.headline, f"bold {tones[answer.tone]}")
        tables.print(Text.assemble(asked, " ", told))  # not markup: names of domains may look like it
        tables.print(Text(" ".join(answer.sentences)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Profile folder; best the one that was planned with.")],
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Placement map to show.")],
    bench_file: Annotated[Path | None, typer.Argument(metavar="[BENCH]", help="Bench result to show too.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write.")] = Path("report.html"),
    held_out: HeldOut = None,
    study: WithStudy = None,
) -> None:
    """Write one self-contained HTML page that says what the plan buys, where, and how sure that is.

    Example: coterie report run.profile plan.json bench.json -o report.html
    """
    from placement.placement_map import PlacementMap
    from placement.report import write_report
    from placement.runtime.results import BenchResult
    from profiler.profile import Profile

    require_writable(out, plan_file, bench_file)
    recorded, placement = Profile.load_from(run), PlacementMap.load_from(plan_file)
    unseen = Profile.load_from(held_out) if held_out else None
    measured = BenchResult.load_from(bench_file) if bench_file else None
    insight = gather_all(recorded, placement, unseen, measured, study is not False)
    with notes.status("drawing"):
        write_report(insight, out)
    notes.print(f"wrote {out}")


def gather_all(
    recorded: Profile,
    placement: PlacementMap,
    held_out: Profile | None,
    bench: BenchResult | None,
    with_study: bool,
) -> Insight:
    """`insight.gather` with the planners that it is given here, where solvers are known."""
    from placement.insight import gather

    with notes.status("measuring"):
        early = gather(recorded, placement, held_out=held_out, load_only=_planner(placement, "load"), bench=bench)
    if not with_study:
        return early
    from dataclasses import replace

    return replace(early, study=_study(recorded, placement, held_out))


def _study(recorded: Profile, placement: PlacementMap, held_out: Profile | None) -> Study | None:
    from placement.insight import study_data

    with progress_bar("plans") as advance_to:
        done = 0

        def on_plan(total: int) -> None:
            nonlocal done
            done += 1
            advance_to(done, total)

        return study_data(recorded, placement, held_out, _planner(placement, "search", STUDY_KICKS), on_plan)


def _planner(placement: PlacementMap, strategy: str, num_kicks: int | None = None) -> Planner:
    """Plans of a strategy for what the plan was made for."""
    from dataclasses import replace

    from placement.solvers import options_of, plan

    options = replace(options_of(placement), num_redundant=placement.num_redundant, num_kicks=num_kicks)
    options = replace(options, preserve_groups=options.preserve_groups and placement.model.num_groups > 1)
    if strategy == "search":  # it studies single domains too, where no weights are left
        options = replace(options, domain_weights=None)

    def planner(profile: Any) -> PlacementMap:
        # Groups are the plan's, whose profile may know them where this one does not.
        profile = replace(profile, model=replace(profile.model, num_groups=placement.model.num_groups))
        return plan(profile, placement.topology, strategy, _for_domains_of(profile, options))

    return planner


def _for_domains_of(profile: Profile, options: Options) -> Options:
    """Options of a plan for a profile that may lack some of the domains that the plan weighs."""
    from dataclasses import replace

    with_tokens = {profile.domains[domain] for domain in set(profile.require_tokens().domain_ids.tolist())}
    weights = {name: weight for name, weight in (options.domain_weights or {}).items() if name in with_tokens}
    return replace(options, domain_weights=weights if any(weights.values()) else None)
