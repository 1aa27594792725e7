"""`coterie constrain`, `codesign`, `finetune` and `quality`: routing that respects a plan, and what that costs.
Constrains, trains and measures nothing itself: `placement/constraints` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from placement.cli.app import (
    Data,
    Device,
    Json,
    Model,
    Nodes,
    Ranks,
    app,
    notes,
    print_json,
    progress_bar,
    seed_option,
    tables,
)
from profiler.errors import CoterieError
from profiler.files import require_writable, require_writable_parent, write_together

if TYPE_CHECKING:
    from placement.constraints.constrain import Constraint
    from placement.placement_map import PlacementMap
    from profiler.loading import LoadedModel
    from profiler.profile import Profile
    from profiler.spec import MoESpec


class Method(StrEnum):
    """How selection is constrained."""

    C2R = "c2r"
    ROUTER = "router"
    SIMILARITY = "similarity"


class What(StrEnum):
    """Which weights learn."""

    ALL = "all"
    EXPERTS = "experts"


ConstraintFile = Annotated[
    Path | None, typer.Option(help="From `coterie constrain`, or a fine-tuned model's folder; none if left out.")
]
HeldOut = Annotated[list[str] | None, typer.Option(help="Text to measure on, as --data.")]
HeldOutTokens = Annotated[int, typer.Option(help="Tokens to measure on.")]


@app.command()
def constrain(
    run: Annotated[Path, typer.Argument(help="Profile folder of the model.")],
    method: Annotated[
        Method, typer.Option(help="C2R lists; pruning by router scores; pruning by similarity of experts.")
    ] = Method.ROUTER,
    plan: Annotated[
        Path | None, typer.Option(help="Placement map: needed for pruning, makes C2R device-aware.")
    ] = None,
    top_t: Annotated[int | None, typer.Option("--top-t", help="C2R: collaborators in the list of each expert.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pruning: ranks, or nodes, that a token may visit.")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Pruning: the limit counts nodes.")] = False,
    similarity: Annotated[
        Path | None, typer.Option(help="Table from `coterie profile --similarity`, for pruning by similarity.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Constraint to write.")] = Path("constraint.safetensors"),
    as_json: Json = False,
) -> None:
    """Say which experts a token may pick together, from a profile and a plan.

    Example: coterie constrain run.profile --plan plan.json --method router --limit 2 -o two-ranks.safetensors
    """
    from placement.constraints.config import digest_of, save
    from placement.placement_map import PlacementMap
    from profiler.profile import Profile

    require_writable(out, plan, similarity)
    recorded = Profile.load_from(run)
    placement = PlacementMap.load_from(plan) if plan else None
    constraint = _make(method, recorded, placement, top_t, limit, nodes, similarity)
    save(constraint, out)
    if as_json:
        print_json({"constraint": str(out), "name": constraint.name, "digest": digest_of(constraint)})
    else:
        table = Table("model", "constraint")
        table.add_row(constraint.model.describe(), constraint.name)
        tables.print(table)
    notes.print(f"wrote {out}; see what it costs with: coterie quality --constraint {out}", markup=False)


def _make(
    method: Method,
    recorded: Profile,
    placement: PlacementMap | None,
    top_t: int | None,
    limit: int | None,
    nodes: bool,
    similarity: Path | None,
) -> Constraint:
    from placement.constraints.lists import collaborator_lists, device_aware_lists
    from placement.constraints.pruning import limit_ranks
    from placement.constraints.similarity import SimilarityTable

    _require_options(method, recorded.model, top_t, limit, nodes, similarity)
    if method is Method.C2R:
        assert top_t is not None
        if placement is None:
            return collaborator_lists(recorded, top_t)
        return device_aware_lists(recorded, placement, top_t)
    if placement is None:
        raise CoterieError(f"--method {method.value}: give --plan and --limit, the ranks that a token may visit")
    assert limit is not None
    placement.require_model(recorded.model)
    alike = None
    if method is Method.SIMILARITY:
        if similarity is None:
            raise CoterieError("--method similarity: give --similarity, from `coterie profile --similarity`")
        table = SimilarityTable.load_from(similarity)
        if not table.model.routes_like(recorded.model):
            raise CoterieError(f"{similarity}: is of {table.model.describe()}, not of {recorded.model.describe()}")
        alike = table.similarity
    return limit_ranks(placement, limit, alike, level="node" if nodes else "rank")


def _require_options(
    method: Method, model: MoESpec, top_t: int | None, limit: int | None, nodes: bool, similarity: Path | None
) -> None:
    """Check that a method has the options that it needs, and no other's.

    Raises:
        CoterieError: one is missing, or would be ignored.
    """
    pruning = {"--limit": limit is not None, "--nodes": nodes}
    others = {
        Method.C2R: {**pruning, "--similarity": similarity is not None},
        Method.ROUTER: {"--top-t": top_t is not None, "--similarity": similarity is not None},
        Method.SIMILARITY: {"--top-t": top_t is not None},
    }
    for name, given in others[method].items():
        if given:
            raise CoterieError(f"{name}: --method {method.value} has no use for it; leave it out")
    if method is Method.C2R and top_t is None:
        raise CoterieError(f"--method c2r: give --top-t from {model.top_k - 1} to {model.num_experts - 1}")
    if method is not Method.C2R and limit is None:
        raise CoterieError(f"--method {method.value}: give --limit, the ranks or nodes that a token may visit")


@app.command()
def codesign(
    model: Model = None,
    ranks: Ranks = 4,
    nodes: Nodes = 1,
    method: Annotated[Method, typer.Option(help="Device-aware C2R lists, or pruning by router scores.")] = Method.C2R,
    top_t: Annotated[int | None, typer.Option("--top-t", help="C2R: collaborators of each expert.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pruning: ranks that a token may visit.")] = None,
    data: Data = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to run in each round.")] = 32_768,
    rounds: Annotated[int, typer.Option(help="Stop after so many.")] = 5,
    seed: Annotated[int, seed_option("The same seed gives the same plans.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the plan and the constraint.")] = Path(
        "codesign"
    ),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Plan for the routing, constrain it by the plan, and again, until tokens visit no fewer ranks.

    Example: coterie codesign ./OLMoE-1B-7B --ranks 8 --top-t 24 --data texts/ -o codesigned/
    """
    from placement.constraints.codesign import Round, alternate, best
    from placement.constraints.config import FILE_NAME, to_bytes
    from placement.constraints.lists import require_size
    from placement.constraints.pruning import limit_ranks
    from placement.placement_map import PlacementMap
    from placement.solvers import Options
    from placement.solvers import plan as make_plan
    from placement.topology import Topology
    from profiler import zoo
    from profiler.documents import read_documents
    from profiler.families import read_spec
    from profiler.loading import load_model

    require_writable_parent(out / FILE_NAME)
    if method is Method.SIMILARITY:
        raise CoterieError("--method similarity: co-design takes c2r or router; give one of them")
    _require_at_least(2, "--max-tokens", max_tokens)
    documents = read_documents(data or [zoo.CALIBRATION])
    loaded = load_model(model, device)
    spec = read_spec(loaded.model, loaded.name)
    topology = Topology.for_experts(spec.num_experts, ranks, nodes)
    _require_options(method, spec, top_t, limit, nodes=False, similarity=None)
    if top_t is not None:
        require_size(top_t, spec)
    if limit is not None:
        limit_ranks(PlacementMap.linear(spec, topology), limit)  # whose ranks hold as many experts as the plan's
    batches = loaded.batches(documents, 256, 8, max_tokens)

    so_far: list[Round] = []

    def note(one: Round) -> None:
        notes.print(f"fan_out {one.fan_out:.3f}, perplexity {one.perplexity:.3f}")
        so_far.append(one)
        chosen = best(so_far)  # written at once, since a later round may fail
        write_together(
            {out / "plan.json": [chosen.placement.to_bytes()], out / FILE_NAME: [to_bytes(chosen.constraint)]}
        )

    with notes.status("planning and constraining in turn"):
        done = alternate(
            loaded,
            batches,
            lambda routing: make_plan(routing, topology, "search", Options(seed=seed)),
            lambda free, placement: _make(method, free, placement, top_t, limit, nodes=False, similarity=None),
            max_rounds=rounds,
            on_round=note,
        )
    chosen = best(done)
    figures = [
        {"fan_out": one.fan_out, "busiest_ingress": one.busiest_ingress, "perplexity": one.perplexity} for one in done
    ]
    if as_json:
        print_json({"rounds": figures, "chosen": done.index(chosen) + 1})
    else:
        table = Table("round", *(Column(name, justify="right") for name in figures[0]))
        for number, row in enumerate(figures, 1):
            table.add_row(
                f"{number}{' (chosen)' if done[number - 1] is chosen else ''}", *(f"{v:.3f}" for v in row.values())
            )
        tables.print(table)
    notes.print(f"wrote {out}/plan.json and {out}/{FILE_NAME}; the figures are of the text that both were made with")


@app.command()
def finetune(
    model: Model = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Model folder to write.")] = Path("finetuned"),
    constraint: ConstraintFile = None,
    data: Data = None,
    instructions: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of conversations to learn the answers of, in place of --data.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 16,
    micro_batch_size: Annotated[int | None, typer.Option(help="Sequences in a forward pass; all if left out.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 2e-5,
    warmup_steps: Annotated[int, typer.Option(help="Until the peak.")] = 10,
    what: Annotated[What, typer.Option(help="Weights that learn: all, or those of experts and routers.")] = What.ALL,
    plain: Annotated[
        bool | None,
        typer.Option(
            "--plain/--no-plain", help="Train as long without the constraint too, to compare; done if left out."
        ),
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    seed: Annotated[int, seed_option("The same seed gives the same weights.")] = 0,
    held_out: HeldOut = None,
    held_out_tokens: HeldOutTokens = 16_384,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="In which it computes while it learns, float32 or bfloat16; weights stay in float32.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Fine-tune a model under a constraint, and measure it beside the model as it was and plainly fine-tuned.

    Example: coterie finetune ./OLMoE-1B-7B --constraint two-ranks.safetensors --instructions alpaca.jsonl -o tuned
    """
    from placement.constraints.config import load
    from placement.constraints.examples import instruction_examples, read_conversations, text_examples
    from placement.constraints.finetune import Training, checkpoint_folder, require_own_folder, unfinished_steps
    from placement.constraints.finetune import finetune as run_finetune
    from profiler import zoo
    from profiler.documents import read_documents
    from profiler.loading import load_model

    def begun(folder: Path) -> bool:
        return folder.exists() or checkpoint_folder(folder).exists()

    limited = load(constraint) if constraint else None
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        part=what.value,
        seed=seed,
        save_steps=save_steps,
        dtype=dtype,
    )
    if data and instructions:
        raise CoterieError("--data and --instructions: give one of them")
    if plain is not None and limited is None:
        raise CoterieError("--plain and --no-plain: compare with a constraint; give --constraint, or leave them out")
    _require_at_least(2, "--sequence-length", sequence_length)
    _require_at_least(2, "--held-out-tokens", held_out_tokens)
    require_own_folder(out, resume=resume)  # whose name the others have
    unseen = read_documents(held_out or [zoo.HELD_OUT])
    documents = [] if instructions else read_documents(data or [zoo.CALIBRATION])
    conversations = read_conversations(instructions or [])
    runs: dict[str, tuple[Any, Path]] = {}
    if limited is not None:
        if plain is not False:
            runs["plainly fine-tuned"] = (None, out.with_name(f"{out.name}-plain"))
        runs[f"fine-tuned, {limited.name}"] = (limited, out)
    else:
        runs["plainly fine-tuned"] = (None, out)
    for _, folder in runs.values():
        require_own_folder(folder, resume=resume)
        if model and folder.exists() and Path(model).is_dir() and folder.samefile(model):
            raise CoterieError(f"{folder}: is the model to read, and would be written over; give -o another name")
    any_begun = any(begun(folder) for _, folder in runs.values())  # if none is, going on is refused
    loaded = load_model(model, device, dtype="float32")
    if instructions:
        examples = instruction_examples(loaded, conversations, sequence_length)
    else:
        examples = text_examples(loaded, documents, sequence_length)
    measured = {"as it was": _measure(loaded, None, unseen, held_out_tokens)}
    if limited is not None:
        measured[f"as it was, {limited.name}"] = _measure(loaded, limited, unseen, held_out_tokens)
    try:
        for name, (its_constraint, folder) in runs.items():
            del loaded  # so that the next one finds its place free
            loaded = load_model(model, device, dtype="float32")
            notes.print(f"{name}: {len(examples):,} sequences, {steps:,} steps of {batch_size}")
            with progress_bar("steps") as advance_to:
                run_finetune(
                    loaded,
                    examples,
                    its_constraint,
                    training,
                    folder,
                    resume=resume and (begun(folder) or not any_begun),
                    on_step=lambda step, total, _loss, advance_to=advance_to: advance_to(step, total),  # type: ignore[misc]
                )
            measured[name] = _measure(loaded, its_constraint, unseen, held_out_tokens)
            notes.print(f"wrote {folder}")
    except KeyboardInterrupt:
        kept = any(name in measured or unfinished_steps(folder) for name, (_, folder) in runs.items())
        notes.print("stopped; go on from the last checkpoint with --resume" if kept else "stopped")
        raise typer.Exit(130) from None
    _show(measured, as_json)


@app.command()
def quality(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Model folders or hub ids; one with a constraint is measured under it. Embedded if none."),
    ] = None,
    constraint: ConstraintFile = None,
    data: HeldOut = None,
    max_tokens: HeldOutTokens = 16_384,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness, or all of c2r or occult.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Questions of each task; all if left out.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity by domain on held-out text, constrained and not; accuracy on tasks where asked for.

    Example: coterie quality ./OLMoE-1B-7B ./tuned-plain ./tuned --data held-out/
    """
    from placement.constraints.config import FILE_NAME, digest_of, load
    from placement.constraints.harness import known_tasks, run_tasks, task_names
    from profiler import zoo
    from profiler.documents import read_documents
    from profiler.loading import load_model

    for option, value in (("--task-folder", task_folder), ("--task-limit", task_limit)):
        if value is not None and not task:
            raise CoterieError(f"{option} {value}: is for tasks; give --task too, or leave it out")
    _require_at_least(2, "--max-tokens", max_tokens)
    if task_limit is not None:
        _require_at_least(1, "--task-limit", task_limit)
    unseen = read_documents(data or [zoo.HELD_OUT])
    given = load(constraint) if constraint else None
    own = {folder: load(Path(folder)) for folder in models or () if (Path(folder) / FILE_NAME).is_file()}
    for folder, its_own in own.items():
        if given is not None and digest_of(its_own) != digest_of(given):
            raise CoterieError(
                f"{folder}: is measured under the constraint in its folder, --constraint is another; leave it out, or "
                "measure this model by itself"
            )
    if task:
        known_tasks(task, task_folder)
    measured: dict[str, dict[str, float]] = {}
    labels: set[str] = set()
    try:
        for model in [*models] if models else [None]:
            loaded = load_model(model, device)
            cases = [own[model]] if model in own else [None, *([given] if given is not None else [])]
            for case in cases:
                shown = loaded.name if loaded.name not in labels else str(model)  # folders may have the same last name
                name = shown if case is None else f"{shown}, {case.name}"
                measured[name] = _measure(loaded, case, unseen, max_tokens, task_names(task or []))
                if task:
                    run_tasks(
                        loaded, case, task, folder=task_folder, limit=task_limit, on_figures=measured[name].update
                    )
            labels.add(loaded.name)
            del loaded  # so that the next one finds its place free
    finally:  # what was measured is shown, whatever failed behind it
        if measured:
            _show(measured, as_json)


def _require_at_least(low: int, option: str, value: int) -> None:
    if value < low:
        raise CoterieError(f"{option} {value}: must be at least {low}")


def _measure(
    loaded: LoadedModel, constraint: Constraint | None, documents: Any, max_tokens: int, tasks: Sequence[str] = ()
) -> dict[str, float]:
    from placement.constraints.constrain import constrain as constrained
    from placement.constraints.quality import perplexity

    batches = loaded.batches(documents, 256, 8, max_tokens)
    with progress_bar("tokens") as advance_to, constrained(loaded.model, constraint):
        done = 0

        def on_batch(tokens: int) -> None:
            nonlocal done
            done += tokens
            advance_to(done, batches.num_tokens)

        found = perplexity(loaded.model, batches, loaded.input_device, on_batch)
    # A domain may have the name of what is measured besides.
    return {"all": found.overall} | {
        f"{domain} (domain)" if domain in ("all", *tasks) else domain: value
        for domain, value in found.of_domain.items()
    }


def _show(measured: dict[str, dict[str, float]], as_json: bool) -> None:
    if as_json:
        print_json(measured)
        return
    columns = list(dict.fromkeys(name for figures in measured.values() for name in figures))
    table = Table("perplexity", *(Column(name, justify="right") for name in columns))
    for name, figures in measured.items():
        table.add_row(name, *(f"{figures[column]:.3f}" if column in figures else "-" for column in columns))
    tables.print(table)
