"""The console script `coterie`: each command reads one kind of artifact and writes one.

Progress and notes go to stderr, a table to stdout.  Heavy libraries are imported by the commands that need them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from typer.core import TyperGroup

from profiler.errors import CoterieError
from profiler.files import require_writable

if TYPE_CHECKING:
    from placement.placement_map import PlacementMap
    from placement.runtime.bench import BenchResult
    from profiler.folder import StoredProfile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Where should each expert of a Mixture-of-Experts model live?",
)
notes = Console(stderr=True)
tables = Console()

Model = Annotated[str | None, typer.Argument(help="Model folder or hub id; the embedded model if left out.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file, .jsonl, a folder of them (a domain each), or a Hugging Face dataset on disk or by name; may "
        "be given several times."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Ranks = Annotated[int, typer.Option(help="Ranks of the expert-parallel group.")]


class _ProfileGroup(TyperGroup):
    """`coterie profile MODEL` records; `merge` and `split` are commands of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["record", *args])


profile_app = typer.Typer(cls=_ProfileGroup, help="Record which experts every token of a text picks; merge; split.")
app.add_typer(profile_app, name="profile")


@profile_app.command("record", epilog="See also: coterie profile merge --help, coterie profile split --help")
def profile(
    model: Model = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile folder to write.")] = Path("run.profile"),
    data: Data = None,
    text_field: Annotated[str, typer.Option(help="Field of JSON lines or a dataset that holds the text.")] = "text",
    domain_field: Annotated[str, typer.Option(help="Field that names the domain, where there is one.")] = "domain",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    chat: Annotated[bool, typer.Option("--chat", help="Put plain text through the chat template.")] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens of text.")] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens of decoding to record after each sequence.")] = 0,
    max_traced_tokens: Annotated[
        int | None, typer.Option(help="Keep the expert sets of a sample of so many tokens; all are counted.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Keep the routers' weights too.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Take the texts in random order; of the sample and of decoding too.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a recording that was stopped.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; chosen if left out.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads a model that is larger than one accelerator.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16; on the CPU float32 if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Record which experts every token of a text picks.

    Example: coterie profile ./OLMoE-1B-7B --data texts/ -o run.profile
    """
    from profiler import zoo
    from profiler.calibration import read_documents
    from profiler.folder import require_replaceable
    from profiler.loading import load_model
    from profiler.profiling import profile_model
    from profiler.writer import unfinished_folder

    require_replaceable(out)
    documents = read_documents(
        data or [zoo.CALIBRATION], text_field=text_field, domain_field=domain_field, split=split, seed=seed
    )
    with notes.status(f"loading {model or zoo.NAME}"):
        loaded = load_model(model, device, device_map=device_map, dtype=dtype)
    started = time.perf_counter()
    try:
        with progress_bar("tokens") as advance_to:
            recorded = profile_model(
                loaded,
                documents,
                out,
                sequence_length=sequence_length,
                batch_size=batch_size,
                max_tokens=max_tokens,
                decode_tokens=decode_tokens,
                as_chat=chat,
                max_traced_tokens=max_traced_tokens,
                weights=weights,
                seed=seed or 0,
                resume=resume,
                on_progress=advance_to,
            )
    except KeyboardInterrupt:
        notes.print(f"stopped; {unfinished_folder(out)} holds what was recorded: go on with --resume")
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - started
    _show_profile(recorded, as_json, f"{recorded.num_tokens / seconds:,.0f} tokens/s")


@profile_app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(help="Profile folders of one model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile folder to write.")],
    as_json: Json = False,
) -> None:
    """Unite profiles of several processes or days: counts as if all had been one run.

    Example: coterie profile merge monday.profile tuesday.profile -o week.profile
    """
    from profiler.folder import open_profile
    from profiler.merging import merge as merge_profiles

    total = sum(len(open_profile(run).shards) for run in runs)
    with progress_bar("shards") as advance_to:
        done = iter(range(1, total + 1))
        merged = merge_profiles(runs, out, on_shard=lambda: advance_to(next(done), total))
    _show_profile(merged, as_json, f"{len(runs)} profiles")


class SplitBy(StrEnum):
    """What the parts of a split differ in."""

    DOMAIN = "domain"
    PHASE = "phase"
    SEQUENCE = "sequence"


@profile_app.command("split")
def split_profile(
    run: Annotated[Path, typer.Argument(help="Profile folder.")],
    by: Annotated[SplitBy, typer.Option(help="Domains, prefill and decode, or even and odd sequences.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the parts into.")],
    as_json: Json = False,
) -> None:
    """Write the domains, the phases, or two halves of the sequences as profiles of their own.

    Example: coterie profile split run.profile --by domain -o by-domain/
    """
    from profiler.profile import Profile

    recorded = Profile.load_from(run)
    if by is SplitBy.DOMAIN:
        parts = recorded.split_by_domain()
    elif by is SplitBy.PHASE:
        parts = recorded.split_by_phase()
    else:
        parts = dict(zip(("even", "odd"), recorded.split_by_sequence(), strict=True))
    written = {}
    for name, part in parts.items():
        folder = out / (re.sub(r"[^\w.-]+", "-", name) + ".profile")
        part.save(folder)
        written[str(folder)] = part.num_tokens
    if as_json:
        print_json(written)
    else:
        table = Table("profile", Column("tokens", justify="right"))
        for folder_name, tokens in written.items():
            table.add_row(folder_name, f"{tokens:,}")
        tables.print(table)


import_app = typer.Typer(no_args_is_help=True, help="Read routing that was recorded elsewhere as a profile.")
app.add_typer(import_app, name="import")


@import_app.command("numpy")
def import_numpy(
    file: Annotated[Path, typer.Argument(help=".npz with topk_ids (T, L, K) and what goes with it, or .npy.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile folder to write.")],
    name: Annotated[str | None, typer.Option(help="Of the model; the file's name if left out.")] = None,
    model_type: Annotated[str, typer.Option(help="Its architecture in transformers.")] = "unknown",
    num_experts: Annotated[int | None, typer.Option(help="Experts in a layer, where the file does not say.")] = None,
    hidden_size: Annotated[int, typer.Option(help="Values in a hidden state; 0 if not known.")] = 0,
    expert_size: Annotated[int, typer.Option(help="Intermediate width of one expert; 0 if not known.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.")] = "bfloat16",
    decode: Annotated[bool, typer.Option("--decode", help="The tokens were decoded, not prefilled.")] = False,
    as_json: Json = False,
) -> None:
    """Read numpy arrays: topk_ids (T, L, K), and optional weights, sequences, domains, phases and layer numbers.

    Example: coterie import numpy routing.npz --hidden-size 2880 --expert-size 2880 -o run.profile
    """
    from profiler.folder import open_profile, require_replaceable
    from profiler.importers.arrays import read_arrays

    require_replaceable(out)
    with notes.status(f"reading {file}"):
        recorded = read_arrays(
            file,
            name=name,
            model_type=model_type,
            num_experts=num_experts,
            hidden_size=hidden_size,
            expert_size=expert_size,
            dtype=dtype,
            decode=decode,
        )
        recorded.save(out)
    _show_profile(open_profile(out), as_json, f"read from {file}")


def _show_profile(stored: StoredProfile, as_json: bool, how: str) -> None:
    if as_json:
        print_json(
            {
                "profile": str(stored.folder),
                "model": stored.model.to_json(),
                "num_tokens": stored.num_tokens,
                "num_traced_tokens": stored.num_traced_tokens,
            }
        )
    else:
        tables.print(profile_table(stored))
    dummy = stored.provenance.get("dummy_tokens", 0)
    if dummy:
        notes.print(
            f"[bold]{dummy:,} of {stored.num_tokens:,} tokens pick the same in every layer as at least 1% of all do[/]"
            ": warm-up, dummy or padding rows? Record without them"
        )
    notes.print(f"wrote {stored.folder}: {stored.num_tokens:,} tokens, {how}")


class Goal(StrEnum):
    """What a plan is for."""

    TIME = "time"
    FAN_OUT = "fan-out"
    BALANCE = "balance"
    COLLABORATION = "collaboration"


class Dispatch(StrEnum):
    """How often an engine sends a token."""

    PER_RANK = "per-rank"
    PER_EXPERT = "per-expert"


class CopyChoice(StrEnum):
    """Who chooses among the copies of an expert."""

    TOKEN = "token"  # noqa: S105 (tokens of text)
    SOURCE = "source"


Nodes = Annotated[int, typer.Option(help="Hosts that the ranks are spread over.")]
LinksName = Annotated[
    str | None,
    typer.Option("--links", help="Cluster to predict times for: h100, h100-low-latency, h800, a100 or ethernet."),
]
TokensPerRank = Annotated[int, typer.Option(help="Tokens that start on each rank, to predict times for.")]
DispatchMode = Annotated[
    Dispatch,
    typer.Option(help="A token is sent once to each rank that serves it, or once for each expert."),
]


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="Profile folder to plan with.")],
    ranks: Annotated[int, typer.Option(help="Ranks of the expert-parallel group.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Placement map to write.")] = Path("plan.json"),
    nodes: Nodes = 1,
    redundant_experts: Annotated[int, typer.Option(help="Copies beyond one of each expert, over all ranks.")] = 0,
    objective: Annotated[Goal, typer.Option(help="What to minimise, or collaboration on one rank to maximise.")] = (
        Goal.TIME
    ),
    links: LinksName = None,
    tokens_per_rank: TokensPerRank = 4096,
    dispatch: DispatchMode = Dispatch.PER_RANK,
    strategy: Annotated[
        str,
        typer.Option(
            help="Whose plan to write: linear, random, load, occult, metis, spectral, quadratic, hypergraph or search."
        ),
    ] = "search",
    compare: Annotated[bool, typer.Option("--compare", help="Show the figures of all strategies.")] = False,
    held_out: Annotated[
        Path | None, typer.Option(help="Profile to measure on; half of RUN's sequences if left out.")
    ] = None,
    load_cap: Annotated[
        float | None,
        typer.Option(help="Largest load of a rank that is wanted, over the mean; 1.1 or as near as can be."),
    ] = None,
    domain_weight: Annotated[
        list[str] | None, typer.Option(help="Such as code=2: plan for a mixture of domains; others count 0.")
    ] = None,
    robust: Annotated[bool, typer.Option("--robust", help="Plan for the domain that the plan is worst for.")] = False,
    regret: Annotated[
        bool, typer.Option("--regret", help="Show for each domain what a plan of its own would have bought.")
    ] = False,
    certify: Annotated[
        float | None,
        typer.Option(help="Seconds a layer to prove how far the plan is from the best on the tokens planned with."),
    ] = None,
    preserve_groups: Annotated[
        bool, typer.Option("--preserve-groups", help="Keep the groups of group-limited routers together.")
    ] = False,
    kicks: Annotated[int, typer.Option(help="Rounds of the search; more take longer and find more.")] = 60,
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which the search takes what it has.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same plan.")] = 0,
    as_json: Json = False,
) -> None:
    """Place the experts on ranks and compare strategies on sequences that they have not seen.

    Example: coterie plan run.profile --ranks 8 --links h100 -o plan.json
    """
    from placement.compare import certify_plan, domain_regret, plan_and_compare, verdict
    from placement.solvers import ALWAYS_COMPARED, STRATEGIES, Options
    from placement.timing import Workload
    from placement.topology import Links, Topology
    from profiler.profile import Profile

    require_writable(out)
    options = Options(
        objective=objective.value,
        workload=Workload(tokens_per_rank, dispatch.value),
        load_cap=load_cap,
        num_redundant=redundant_experts,
        seed=seed,
        num_kicks=kicks,
        time_budget=time_budget,
        domain_weights=_domain_weights(domain_weight) if domain_weight else None,
        worst_domain=robust,
        preserve_groups=preserve_groups,
    )
    recorded = Profile.load_from(run)
    unseen = Profile.load_from(held_out) if held_out else None
    known_links = Links.preset(links) if links else None
    topology = Topology.for_experts(recorded.model.num_experts, ranks, nodes, redundant_experts, known_links)
    if known_links and not (recorded.model.hidden_size and recorded.model.expert_size):
        raise CoterieError(
            f"--links {links}: the profile does not know the sizes of the model, which times need; import it with "
            "--hidden-size and --expert-size"
        )
    compared = list(STRATEGIES if compare else ALWAYS_COMPARED)
    if compare and not _has_hypergraph():
        compared.remove("hypergraph")
        notes.print("hypergraph is left out, it needs: pip install 'coterie\\[hypergraph]'")
    total = recorded.model.num_layers * len({*compared, strategy})
    with progress_bar("layers") as advance_to:
        done = iter(range(1, total + 1))
        advance_to(0, total)
        placement = plan_and_compare(
            recorded,
            topology,
            strategy,
            options,
            strategies=compared,
            held_out=unseen,
            on_layer=lambda: advance_to(next(done), total),
        )
    if certify is not None:
        with progress_bar("layers") as advance_to:
            done = iter(range(1, recorded.model.num_layers + 1))
            advance_to(0, recorded.model.num_layers)
            placement = certify_plan(
                recorded, placement, options, certify, unseen, lambda: advance_to(next(done), recorded.model.num_layers)
            )
    placement.save(out)
    assert placement.metrics is not None
    regrets = None
    if regret:
        with progress_bar("layers") as advance_to:
            total = recorded.model.num_layers * len(recorded.domains)
            done = iter(range(1, total + 1))
            regrets = domain_regret(recorded, placement, options, unseen, lambda: advance_to(next(done), total))
    sentences = verdict(placement.metrics, strategy)
    if as_json:
        value = {"plan": str(out), "strategy": strategy, "metrics": placement.metrics, "verdict": sentences}
        print_json(value if regrets is None else {**value, "regret": regrets})
    else:
        tables.print(plan_table(placement))
        if regrets is not None:
            tables.print(regret_table(regrets))
        if placement.certificate is not None:
            tables.print(certificate_table(placement.certificate))
    for sentence in sentences:
        notes.print(f"[bold]{sentence}[/]")
    notes.print(f"wrote {out}: the plan of “{strategy}” for {ranks} ranks")


def _domain_weights(pairs: list[str]) -> dict[str, float]:
    out = {}
    for pair in pairs:
        name, found, weight = pair.rpartition("=")
        try:
            out[name] = float(weight)
        except ValueError:
            found = ""
        if not found or not name:
            raise CoterieError(f"--domain-weight {pair}: must be a domain and a number, such as code=2")
    return out


def _has_hypergraph() -> bool:
    return importlib.util.find_spec("mtkahypar") is not None


@app.command()
def evaluate(
    map_file: Annotated[Path, typer.Argument(metavar="MAP", help="Placement map, SGLang JSON, or EPLB tensor.")],
    run: Annotated[Path, typer.Argument(help="Profile folder to measure on; all of its sequences count.")],
    ranks: Annotated[int | None, typer.Option(help="Ranks, for maps that do not say.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Hosts, for maps that do not say.")] = None,
    links: LinksName = None,
    tokens_per_rank: TokensPerRank = 4096,
    dispatch: DispatchMode = Dispatch.PER_RANK,
    choice: Annotated[
        CopyChoice, typer.Option(help="Each token chooses among copies, or each source rank once and for all.")
    ] = CopyChoice.TOKEN,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Measure any map on any profile of the same model, beside the linear placement.

    Example: coterie evaluate plan.json other.profile --links h100
    """
    from dataclasses import replace

    from placement.compare import measure
    from placement.cost import evaluate as evaluate_map
    from placement.foreign import read_any_map
    from placement.placement_map import PlacementMap
    from placement.timing import Workload
    from placement.topology import Links, Topology
    from profiler.profile import Profile

    recorded = Profile.load_from(run)
    placement = read_any_map(map_file, recorded.model, ranks, nodes)
    placement.require_model(recorded.model)
    model = replace(recorded.model, num_groups=placement.model.num_groups)
    topology = replace(placement.topology, links=Links.preset(links)) if links else placement.topology
    placement = replace(placement, model=model, topology=topology)
    workload = Workload(tokens_per_rank, dispatch.value)
    linear = PlacementMap.linear(
        model, Topology.for_experts(model.num_experts, topology.num_ranks, topology.num_nodes, links=topology.links)
    )
    tokens = recorded.require_tokens()
    figures = {
        "linear": measure(linear, tokens, workload),
        str(placement.solver["name"]): measure(placement, tokens, workload, choice.value),
    }
    by_layer = evaluate_map(placement, tokens, choice.value) if layers else None
    if as_json:
        value: dict[str, Any] = {"tokens": tokens.num_tokens, "metrics": figures}
        if by_layer:
            value["layers"] = {name: getattr(by_layer, name).tolist() for name in METRICS if name != "predicted_time"}
        print_json(value)
        return
    tables.print(metrics_table(f"{model.name} on {topology.num_ranks} ranks, {tokens.num_tokens:,} tokens", figures))
    if by_layer:
        names = [name for name in METRICS if hasattr(by_layer, name)]
        table = Table("layer", *(Column(name, justify="right") for name in names))
        for index, layer_id in enumerate(model.layer_ids):
            table.add_row(str(layer_id), *(f"{getattr(by_layer, name)[index]:.3f}" for name in names))
        tables.print(table)


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
def report(
    run: Annotated[Path, typer.Argument(help="Profile folder to draw.")],
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Placement map to show.")],
    bench_file: Annotated[Path | None, typer.Argument(metavar="[BENCH]", help="Bench result to show too.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: heatmaps, the collaboration graph, load and ingress before and after.

    Example: coterie report run.profile plan.json bench.json -o report.html
    """
    from placement.placement_map import PlacementMap
    from placement.report import write_report
    from placement.runtime.bench import BenchResult
    from profiler.profile import Profile

    require_writable(out)
    recorded, placement = Profile.load_from(run), PlacementMap.load_from(plan_file)
    measured = BenchResult.load_from(bench_file) if bench_file else None
    with notes.status("drawing"):
        write_report(recorded, placement, measured, out)
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
    report(held_out, plan_file, bench_file, out=page)
    notes.print(f"open {page} in a browser")


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


def bench_table(result: BenchResult) -> Table:
    """Bytes and times of every row; fits 80 columns."""
    difference = max(row.max_difference for row in result.rows)
    table = Table(
        title=f"{result.model}, {result.num_ranks} ranks ({result.backend}), {result.tokens_per_rank} tokens a rank",
        caption=f"ms of the slowest rank in one forward pass, median of {result.repeats} paired runs (least to most); "
        f"copies: of a token in a layer; logits differ from one process by {difference:.1e} at most",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("implementation", no_wrap=True)
    table.add_column("map", no_wrap=True)
    for column in ("MB\nsent", "copies", "dispatch", "expert", "combine", "total", "speed\nup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.implementation,
            row.map,
            f"{row.bytes_sent / 1e6:.1f}",
            f"{row.rows_per_token:.2f}",
            *(f"{phase.median:.3g}" for phase in (row.dispatch, row.expert, row.combine)),
            f"{row.total.median:.3g} ({row.total.least:.3g}-{row.total.most:.3g})",
            f"{row.speed_up:.2f}",
        )
    return table


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields a function that takes what is done and what there is in all."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=notes, transient=True) as progress:
        task = progress.add_task(unit, total=None, rate="")
        started = time.perf_counter()

        def advance_to(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            progress.update(task, completed=done, total=total, rate=f"{rate:,.0f} {unit}/s" if done else "")

        yield advance_to


def print_json(value: Any) -> None:
    """For machines."""
    print(json.dumps(value, indent=2))


def main() -> None:
    """Run the command line; a mistake that the user can mend is one line and exit code 1."""
    try:
        app()
    except (CoterieError, OSError) as error:  # a path that the system itself refuses is the user's to mend too
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {message}")
        sys.exit(1)
