"""`coterie profile`: a model and texts to a profile; merging and splitting.
Knows no plan, and runs no model itself: `profiler/profiling.py` does.
"""

from __future__ import annotations

import contextlib
import re
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from placement.cli.app import (
    Data,
    Device,
    Json,
    Model,
    app,
    group_with_default,
    notes,
    print_json,
    progress_bar,
    seed_option,
    tables,
    waiting,
)
from placement.cli.tables import profile_table
from profiler.errors import CoterieError
from profiler.files import require_writable

if TYPE_CHECKING:
    from profiler.folder import StoredProfile


profile_app = typer.Typer(
    cls=group_with_default("record"), help="Record which experts every token of a text picks; merge; split."
)
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
    similarity: Annotated[
        Path | None, typer.Option(help="Write there how similar experts' router logits are, for `coterie constrain`.")
    ] = None,
    seed: Annotated[
        int | None, seed_option("Take the texts in random order; of the sample and of decoding too.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a recording that was stopped.")] = False,
    device: Device = None,
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
    from placement.constraints.similarity import RouterSimilarity
    from profiler import zoo
    from profiler.documents import read_documents
    from profiler.folder import require_replaceable
    from profiler.loading import load_model
    from profiler.profiling import profile_model
    from profiler.writer import unfinished_folder

    require_replaceable(out)
    if similarity and resume:
        raise CoterieError("--similarity sums over a whole run: leave --resume out, or --similarity")
    if similarity:
        require_writable(similarity)
    documents = read_documents(
        data or [zoo.CALIBRATION], text_field=text_field, domain_field=domain_field, split=split, seed=seed
    )
    with waiting(f"loading {model or zoo.NAME}"):
        loaded = load_model(model, device, device_map=device_map, dtype=dtype)
    if model and not data:
        notes.print("no --data: the texts that come with coterie; give yours for a plan of your own traffic")
    started = time.perf_counter()
    before: list[float] = []  # share of the text that a run that was stopped has done
    try:
        alike = RouterSimilarity(loaded.model, loaded.name) if similarity else contextlib.nullcontext()
        with progress_bar("tokens") as advance_to, alike:

            def on_progress(done: int, total: int) -> None:
                if not before:
                    before.append(done / total)
                advance_to(done, total)

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
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        left = unfinished_folder(out)
        how = "--resume, without --similarity" if similarity else "--resume"
        notes.print(f"stopped; {left} holds what was recorded: go on with {how}" if left.exists() else "stopped")
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - started
    if similarity and isinstance(alike, RouterSimilarity):
        alike.table().save(similarity)
        notes.print(f"wrote {similarity}")
    rate = f"{(1 - before[0]) * recorded.num_tokens / seconds:,.0f} tokens/s"
    show_profile(recorded, as_json, "complete already" if before[0] == 1 else rate)


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
    show_profile(merged, as_json, f"{len(runs)} profiles")


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
    from dataclasses import replace

    from profiler.profile import Profile

    recorded = Profile.load_from(run)
    if by is SplitBy.DOMAIN:
        parts = recorded.split_by_domain()
    elif by is SplitBy.PHASE:
        parts = recorded.split_by_phase()
    else:
        parts = dict(zip(("even", "odd"), recorded.split_by_sequence(), strict=True))
    folders: dict[Path, str] = {}
    for name in parts:  # as names of files, none of which leads out of the folder
        folder = out / (re.sub(r"[^\w.-]+", "-", name) + ".profile")
        if folder in folders:
            raise CoterieError(f"domains {folders[folder]!r} and {name!r} would both be {folder}; rename one of them")
        folders[folder] = name
    written = {}
    for folder, name in folders.items():
        part = replace(
            parts[name],
            provenance={**parts[name].provenance, "made_from": recorded.sources},
        )
        part.save(folder)
        written[str(folder)] = part.num_tokens
    if as_json:
        print_json(written)
    else:
        table = Table("profile", Column("tokens", justify="right"))
        for folder_name, tokens in written.items():
            table.add_row(folder_name, f"{tokens:,}")
        tables.print(table)


def show_profile(stored: StoredProfile, as_json: bool, how: str) -> None:
    """What was written, as every command that writes a profile ends."""
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
            f"{dummy:,} of {stored.num_tokens:,} tokens pick the same in every layer as at least 1% of all do"
            ": warm-up, dummy or padding rows? Record without them",
            style="bold",
        )
    notes.print(f"wrote {stored.folder}: {stored.num_tokens:,} tokens, {how}")
