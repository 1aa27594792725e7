"""`coterie plan` and `coterie evaluate`: a profile to a placement map, and what any map does on any profile.
Places no expert and defines no metric: `placement/solvers` and `placement/cost.py` do.
"""

from __future__ import annotations

import importlib.util
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from placement.cli.app import (
    CopyChoice,
    Dispatch,
    DispatchMode,
    Json,
    LinksName,
    Nodes,
    TokensPerRank,
    app,
    notes,
    print_json,
    progress_bar,
    seed_option,
    tables,
)
from placement.cli.tables import METRICS, certificate_table, metrics_table, plan_table, regret_table
from profiler.errors import CoterieError
from profiler.files import require_writable

if TYPE_CHECKING:
    from placement.topology import Topology
    from profiler.spec import MoESpec


class Goal(StrEnum):
    """What a plan is for."""

    TIME = "time"
    FAN_OUT = "fan-out"
    BALANCE = "balance"
    COLLABORATION = "collaboration"


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
            help="Whose plan to write: linear, random, load, occult, metis, spectral, quadratic, hypergraph, "
            "partitioning (the least busiest ingress, or fan_out, of the planned tokens, proved if a minute a layer is "
            "enough) or "
            "search."
        ),
    ] = "search",
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the figures of all strategies but partitioning.")
    ] = False,
    held_out: Annotated[
        Path | None, typer.Option(help="Profile to measure on; half of RUN's sequences if left out.")
    ] = None,
    load_cap: Annotated[
        float | None,
        typer.Option(help="Largest load of a rank over the mean; 1 + 0.5 / slots, 1.06 to 1.15, if left out."),
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
    kicks: Annotated[
        int | None, typer.Option(help="Rounds of the search: more find more; 80, or fewer for large layers.")
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="Seconds after which the search takes what it has.")] = None,
    seed: Annotated[int, seed_option("The same seed gives the same plan.")] = 0,
    as_json: Json = False,
) -> None:
    """Place the experts on ranks and compare strategies on sequences that they have not seen.

    Example: coterie plan run.profile --ranks 8 --links h100 -o plan.json
    """
    from placement.compare import certify_plan, domain_regret, plan_and_compare, require_provable, verdict
    from placement.solvers import ALWAYS_COMPARED, STRATEGIES, Options
    from placement.timing import Workload
    from placement.topology import Links, Topology
    from profiler.profile import Profile

    require_writable(out)
    if certify is not None and not 0 < certify < math.inf:
        raise CoterieError(f"--certify {certify}: must be a number of seconds above 0")
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
    _require_times(recorded.model, topology)
    if certify is not None:
        require_provable(topology, recorded.model, options)
    compared = list(STRATEGIES if compare else ALWAYS_COMPARED)
    if compare:
        compared.remove("partitioning")  # few sizes allow it, and it takes minutes
    if compare and not _has_hypergraph():
        compared.remove("hypergraph")
        notes.print("hypergraph is left out, it needs: pip install 'coterie[hypergraph]'")
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
        placement.save(out)  # proofs may take long, and the plan is there without them
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
    seen = unseen is not None and (recorded.digest in unseen.sources or unseen.digest in recorded.sources)
    sentences = verdict(placement.metrics, strategy, options, seen=seen)
    if as_json:
        value = {"plan": str(out), "strategy": strategy, "metrics": placement.metrics, "verdict": sentences}
        if placement.certificate is not None:
            value["certificate"] = placement.certificate
        print_json(value if regrets is None else {**value, "regret": regrets})
    else:
        tables.print(plan_table(placement))
        if regrets is not None:
            tables.print(regret_table(regrets))
        if placement.certificate is not None:
            tables.print(certificate_table(placement.certificate))
    if regrets is not None and len(regrets) < len(recorded.domains):
        left_out = ", ".join(sorted(set(recorded.domains) - set(regrets)))
        notes.print(f"no regret of {left_out}: planning or measuring saw no sequence of theirs")
    for sentence in sentences:
        notes.print(sentence, style="bold")
    notes.print(f"wrote {out}: the plan of “{strategy}” for {ranks} ranks")


def _require_times(model: MoESpec, topology: Topology) -> None:
    from placement.timing import WEIGHT_BYTES, has_times

    if topology.links is None or has_times(model, topology):
        return
    if model.dtype not in WEIGHT_BYTES:
        raise CoterieError(
            f"--links {topology.links.name}: times need the width of weights, which {model.dtype} does not say (known: "
            f"{', '.join(WEIGHT_BYTES)}); leave --links out, or import the profile with its --dtype"
        )
    raise CoterieError(
        f"--links {topology.links.name}: the profile does not know the sizes of the model, which times need; import it "
        "with --hidden-size and --expert-size"
    )


def _domain_weights(pairs: list[str]) -> dict[str, float]:
    out: dict[str, float] = {}
    for pair in pairs:
        name, found, weight = pair.rpartition("=")
        if name in out:
            raise CoterieError(f"--domain-weight {pair}: {name} has a weight already; give it once")
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
    tokens_per_rank: Annotated[
        int | None, typer.Option(help="Tokens that start on each rank; as planned if left out, 4096 for other maps.")
    ] = None,
    dispatch: Annotated[
        Dispatch | None,
        typer.Option(help="A token is sent once to each rank that serves it, or per expert; as planned if left out."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Take the dispatch mode of an engine, such as vllm-deepep-low-latency.")
    ] = None,
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

    from placement.backends import find_backend
    from placement.compare import measure
    from placement.cost import evaluate as evaluate_map
    from placement.foreign import read_any_map
    from placement.placement_map import PlacementMap
    from placement.solvers import options_of
    from placement.topology import Links
    from profiler.profile import Profile

    backend = find_backend(engine) if engine else None
    if backend and dispatch:
        raise CoterieError(f"--dispatch {dispatch.value}: --engine {engine} says it; leave one of them out")
    if backend and backend.sends == "to-all" and links:
        raise CoterieError(f"--engine {engine}: {backend.decides}; times are not modelled there, leave --links out")
    recorded = Profile.load_from(run)
    placement = read_any_map(map_file, recorded.model, ranks, nodes)
    placement.require_model(recorded.model)
    model = replace(recorded.model, num_groups=placement.model.num_groups)
    topology = replace(placement.topology, links=Links.preset(links)) if links else placement.topology
    if backend and backend.sends == "to-all":
        topology = replace(topology, links=None)  # a plan may have them; the time would be that of another exchange
    planned = options_of(placement).workload
    if links:
        _require_times(model, topology)
    placement = replace(placement, model=model, topology=topology)
    workload = planned if tokens_per_rank is None else replace(planned, tokens_per_rank=tokens_per_rank)
    if backend:
        workload = replace(workload, mode="per-expert" if backend.sends == "per-expert" else "per-rank")
    elif dispatch:
        workload = replace(workload, mode=dispatch.value)
    linear = PlacementMap.linear(model, topology, placement.num_redundant)
    tokens = recorded.require_tokens()
    name = str(placement.solver["name"])
    figures = {
        "linear": measure(linear, tokens, workload, choice.value),
        "this map" if name == "linear" else name: measure(placement, tokens, workload, choice.value),
    }
    by_layer = evaluate_map(placement, tokens, choice.value) if layers else None
    rows = _rows_per_token(backend.sends, figures, model.top_k, topology.num_ranks) if backend else {}
    if as_json:
        value: dict[str, Any] = {"tokens": tokens.num_tokens, "metrics": figures}
        if backend:
            value |= {"engine": engine, "sends": backend.sends, "rows_per_token": rows}
        if by_layer:
            value["layers"] = {name: getattr(by_layer, name).tolist() for name in METRICS}
        print_json(value)
        return
    if backend:
        sent = ", ".join(f"{name} {mean:.2f}" for name, mean in rows.items())
        notes.print(f"{engine} ({backend.option}) {backend.decides}", highlight=False, soft_wrap=True)
        notes.print(f"rows sent for a token: {sent}", highlight=False, soft_wrap=True)
    title = f"{model.name} on {topology.num_ranks} ranks, {tokens.num_tokens:,} tokens"
    tables.print(metrics_table(title, figures, nodes=topology.num_nodes > 1))
    if by_layer:
        table = Table("layer", *(Column(name, justify="right") for name in METRICS))
        for index, layer_id in enumerate(model.layer_ids):
            table.add_row(str(layer_id), *(f"{getattr(by_layer, name)[index]:.3f}" for name in METRICS))
        tables.print(table)


def _rows_per_token(sends: str, figures: dict[str, Any], top_k: int, num_ranks: int) -> dict[str, float]:
    """Copies of a token that an engine's exchange hands over, mean over layers, by map; a rank's own count too."""
    constant = {"per-expert": float(top_k), "to-all": float(num_ranks)}
    return {name: constant.get(sends, measured["fan_out"]["mean"]) for name, measured in figures.items()}
