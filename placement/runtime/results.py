"""`BenchResult`: the tables of a bench, and their file. Knows neither torch nor how they were measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from placement.topology import Links
from profiler.errors import CoterieError
from profiler.files import read_json, write_json

SCHEMA_VERSION = 3
"""Of the bench's file; another one is refused."""

PEER = "HF all_to_all"
"""transformers' own expert parallelism, as rows name it."""


@dataclass(frozen=True)
class Spread:
    """A figure over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a repeat."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class BenchRow:
    """One implementation on one map, in one step of the workload: all MoE layers, all ranks.

    Times are milliseconds of the slowest rank.  Those of the parts are of forward passes in which ranks wait for each
    other before each part; the total is of passes in which they do not, and has all that is around MoE layers in it.
    In training the parts are those of the way forth, the total is all of a step.

    Attributes:
        implementation: transformers' or this project's, and how it exchanges if not as usual.
        map: the name of the placement map.
        fan_out: ranks that serve a token, mean over layers, of the evaluator on the tokens that were run.
        rows_per_token: rows sent for a token in a layer, its own rank included; under coterie this is fan_out.
        remote_rows_per_token: those that left their rank, on all hops.
        bytes_sent: counted by this program, dispatch and combine, without what ranks keep for themselves.
        wire_bytes: the part of it that went to other hosts; all of it where there is one.
        interface_bytes: sent by the hosts' interfaces, as the system counts; None where it does not, or where hosts
            are not the plan's nodes.
        least_bytes: of the wire's, what this map needs at the least: rows that went over it x hidden size x width,
            both ways.
        dispatch: to the experts' ranks, indices and sizes included.
        expert: products and sums on the experts' ranks.
        combine: back, and the sum over ranks.
        exchange: dispatch and combine.
        index: the part of dispatch that finds out which rank serves what.
        total: of the whole step.
        predicted_exchange: ms, of the cost model on links measured before; None where it has no such mode.
        predicted_layer: likewise, experts included.
        max_difference: of outputs from the single process's; in training of gradients too, over their largest value.
        speed_up: of the total against the first row's, paired.
        exchange_speed_up: of dispatch and combine against the first row's, paired.
        exchange_against_linear: against the same exchange on the linear map, paired.
    """

    implementation: str
    map: str
    fan_out: float
    rows_per_token: float
    remote_rows_per_token: float
    bytes_sent: float
    wire_bytes: float
    interface_bytes: float | None
    least_bytes: float
    dispatch: Spread
    expert: Spread
    combine: Spread
    exchange: Spread
    index: Spread
    total: Spread
    predicted_exchange: float | None
    predicted_layer: float | None
    max_difference: float
    speed_up: Spread
    exchange_speed_up: Spread
    exchange_against_linear: Spread

    @property
    def layer(self) -> float:
        """Median of all three parts together, ms."""
        return self.exchange.median + self.expert.median


@dataclass(frozen=True)
class BenchRun:
    """One table: all cases on the same ranks and tokens.

    Attributes:
        num_ranks: R.
        num_nodes: of the topology that was planned for; where `network` is known, also the namespaces.
        num_hosts: machines, or namespaces of one, that the ranks ran on.
        tokens_per_rank: in each step.
        links: measured before.
        rows: by case.
        correlations: Spearman's over maps of coterie's first way to exchange, where there are at least three.
    """

    num_ranks: int
    num_nodes: int
    num_hosts: int
    tokens_per_rank: int
    links: Links
    rows: tuple[BenchRow, ...]
    correlations: Mapping[str, float]


@dataclass(frozen=True)
class BenchResult:
    """The tables of one bench, and how they were measured.

    Attributes:
        model: what was run, or whose routing was replayed.
        workload: prefill, decode or training.
        replayed: whether only MoE layers of random weights were run.
        backend: of torch.distributed.
        network: rate of each host's cable where hosts are namespaces of one machine, else None.
        repeats: timed runs of each case.
        runs: by ranks and batch.
    """

    model: str
    workload: str
    replayed: bool
    backend: str
    network: str | None
    repeats: int
    runs: tuple[BenchRun, ...]

    def wire(self, run: BenchRun) -> str:
        """What its ranks exchanged through, in words."""
        if self.network:
            return f"{self.network} cables"
        if run.num_hosts > 1:
            return f"{self.backend}, {run.num_hosts} hosts"
        return f"{self.backend}, through one machine's memory" if self.backend == "gloo" else self.backend

    @property
    def max_difference(self) -> float:
        """Of all rows that do not round on the way; where all do, of these."""
        rows = [row for run in self.runs for row in run.rows]
        exact = [row.max_difference for row in rows if "bf16" not in row.implementation]
        # By itself `max` passes over NaN.
        return max(exact or [row.max_difference for row in rows], key=lambda value: (math.isnan(value), value))

    def on(self, num_ranks: int) -> tuple[BenchRun, ...]:
        """The runs on so many ranks."""
        return tuple(run for run in self.runs if run.num_ranks == num_ranks)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def load_from(cls, path: Path) -> BenchResult:
        """Read what `save` wrote.

        Raises:
            CoterieError: missing, truncated or not a bench result.
        """
        value = read_json(path, "a bench result", "make one with `coterie bench -o`")
        try:
            if value.pop("schema_version") != SCHEMA_VERSION:
                raise CoterieError(f"{path}: not a bench result of schema_version {SCHEMA_VERSION}; bench again")
            runs = tuple(map(_run, value.pop("runs")))
            result = cls(**value, runs=runs)
            _require_kinds(result)
            if not runs or not all(run.rows for run in runs):
                raise CoterieError(f"{path}: not a bench result (no rows, or no numbers in them); bench again")
            return result
        except (AttributeError, KeyError, TypeError) as error:
            raise CoterieError(f"{path}: not a bench result ({error}); bench again") from error


def _run(value: Mapping[str, Any]) -> BenchRun:
    rows, links = tuple(map(_row, value["rows"])), Links.from_json(value["links"])
    run = BenchRun(**{**value, "links": links, "rows": rows})
    _require_kinds(run)
    if any(type(found) not in (int, float) for found in run.correlations.values()):
        raise TypeError(f"correlations are {run.correlations!r}")
    return run


def _require_kinds(read: BenchRun | BenchResult) -> None:
    """A TypeError where a field that holds one value holds one of another kind."""
    kinds = {"int": (int,), "bool": (bool,), "str": (str,), "str | None": (str, type(None))}
    for field in fields(read):
        found = getattr(read, field.name)
        if str(field.type) in kinds and type(found) not in kinds[str(field.type)]:
            raise TypeError(f"{field.name} is {found!r}")


def _row(value: Mapping[str, object]) -> BenchRow:
    cells = {}
    for field in fields(BenchRow):
        cell = value[field.name]
        if field.type == "Spread":
            if not isinstance(cell, dict):
                raise TypeError(f"{field.name} is {cell!r}")
            cell = Spread(**cell)
        numbers = [cell.median, cell.least, cell.most] if isinstance(cell, Spread) else [cell]
        kinds = {"str": (str,), "float | None": (int, float, type(None))}.get(str(field.type), (int, float))
        if any(type(number) not in kinds for number in numbers):
            raise TypeError(f"{field.name} is {value[field.name]!r}")
        cells[field.name] = cell
    return BenchRow(**cells)  # type: ignore[arg-type]
