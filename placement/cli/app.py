"""The application that commands register with, the options that several share, and how progress and JSON are shown.
Knows no command and no artifact.

Progress and notes go to stderr, a table to stdout.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from typer.core import TyperGroup

from profiler.errors import CoterieError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Where should each expert of a Mixture-of-Experts model live?",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"coterie {version('coterie')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


notes = Console(stderr=True, markup=False)  # names out of files may look like markup
tables = Console(markup=False)

MOST_SEED = 2**31 - 1
"""What every generator of random numbers takes."""


def seed_option(text: str) -> Any:
    """An option for a seed; any other number is refused in one line."""

    def check(seed: int | None) -> int | None:
        if seed is not None and not 0 <= seed <= MOST_SEED:
            raise CoterieError(f"seed {seed}: must be between 0 and {MOST_SEED}")
        return seed

    return typer.Option(help=text, callback=check)


Model = Annotated[str | None, typer.Argument(help="Model folder or hub id; the embedded model if left out.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file, .jsonl, a folder of them (a domain each), or a Hugging Face dataset on disk or by name; may "
        "be given several times; texts that come with coterie if left out."
    ),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; chosen if left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Ranks = Annotated[int, typer.Option(help="Ranks of the expert-parallel group.")]


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


def group_with_default(command: str) -> type[TyperGroup]:
    """A group of commands whose name alone means one of them, such as `coterie profile MODEL`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, args if args and args[0] in self.commands else [command, *args])

    return Group


def waiting(text: str) -> Status:
    """A context manager that shows on stderr what is being done."""
    return notes.status(escape(text))  # it would take markup whatever the console takes


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields a function that takes what is done and what there is in all."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=notes, transient=True) as progress:
        task = progress.add_task(unit, total=None, rate="")
        began: list[tuple[int, float]] = []

        def advance_to(done: int, total: int) -> None:
            if not began:
                began.append((done, time.perf_counter()))
            first, started = began[0]  # of a run that goes on, some were done before
            rate = (done - first) / max(time.perf_counter() - started, 1e-9)
            progress.update(task, completed=done, total=total, rate=f"{rate:,.0f} {unit}/s" if done > first else "")

        yield advance_to


def print_json(value: Any) -> None:
    """For machines; JSON has no number that is none or has no end, so these become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
