"""What a map buys in a real expert-parallel run, beside transformers' own: outputs checked, bytes and times."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from placement.placement_map import PlacementMap
from placement.runtime.experts import IMPLEMENTATIONS, build_implementations, installed
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import PHASES, Meter
from profiler.calibration import Document
from profiler.errors import CoterieError
from profiler.families import find_moe_layers, read_spec
from profiler.files import read_json, write_json
from profiler.loading import load_model

SCHEMA_VERSION = 1
MAX_DIFFERENCE = 1e-4
"""Largest absolute difference of logits from the single-process model that counts as exact in float32."""

CASES = (("HF all_to_all", "linear"), ("coterie", "linear"), ("coterie", "planned"))
"""Implementation and map of each row; speed-ups are against the first."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds over the repeats."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of figures in seconds."""
        return cls(*(1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds))))


@dataclass(frozen=True)
class BenchRow:
    """One implementation on one map; times are those of the slowest rank, waiting included.

    Attributes:
        bytes_sent: by all ranks in one forward pass, dispatch and combine, without what ranks keep for themselves.
        rows_per_token: copies of a token sent in a layer, its own rank included, mean over layers; for coterie this is
            fan_out.
        max_difference: of the logits from the single-process model's.
        speed_up: median over the repeats of the first row's total over this one's.
    """

    implementation: str
    map: str
    bytes_sent: int
    rows_per_token: float
    dispatch: Spread
    expert: Spread
    combine: Spread
    total: Spread
    max_difference: float
    speed_up: float


@dataclass(frozen=True)
class BenchResult:
    """The table of one bench, and where it was measured."""

    model: str
    num_ranks: int
    tokens_per_rank: int
    repeats: int
    backend: str
    rows: tuple[BenchRow, ...]

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
            rows = tuple(
                BenchRow(**{**row, **{name: Spread(**row[name]) for name in (*PHASES, "total")}})
                for row in value.pop("rows")
            )
            result = cls(**value, rows=rows)
            numbers: list[float] = [result.num_ranks, result.tokens_per_rank, result.repeats]
            for row in rows:
                numbers += [row.bytes_sent, row.rows_per_token, row.max_difference, row.speed_up]
                for spread in (row.dispatch, row.expert, row.combine, row.total):
                    numbers += [spread.median, spread.least, spread.most]
            if not rows or any(type(number) not in (int, float) for number in numbers):
                raise CoterieError(f"{path}: not a bench result (no rows, or no numbers in them); bench again")
            return result
        except (KeyError, TypeError) as error:
            raise CoterieError(f"{path}: not a bench result ({error}); bench again") from error


def bench(
    placement: PlacementMap,
    model: str | None,
    documents: Sequence[Document],
    *,
    sequences_per_rank: int = 2,
    sequence_length: int = 256,
    repeats: int = 15,
    before_joining: Callable[[int], None] | None = None,
) -> BenchResult:
    """Run a model's forward pass expert-parallel, one process for each rank of the map, each with its own sequences.

    The cases take turns within each repeat, so that a drift of the machine's speed meets them all.

    Args:
        model: a folder or hub id; None for the embedded model.
        documents: text for the batches, one sequence of each domain in turn.
        before_joining: as in `run_on_ranks`.

    Raises:
        CoterieError: the map is for another model, there is too little text, or logits differ by more than 1e-4.
    """
    if repeats < 1 or sequences_per_rank < 1:
        raise CoterieError(f"repeats {repeats}, sequences per rank {sequences_per_rank}: must be at least 1")
    loaded = load_model(model, "cpu")
    placement.require_model(read_spec(loaded.model, loaded.name))
    num_ranks = placement.topology.num_ranks
    needed = num_ranks * sequences_per_rank
    batches = loaded.batches(documents, sequence_length, batch_size=1)
    of_full_length = (batch.input_ids[0].tolist() for batch in batches if batch.num_tokens == sequence_length)
    full = list(itertools.islice(of_full_length, needed))  # reads no more text than it needs
    if len(full) < needed:
        raise CoterieError(
            f"the text holds {len(full)} sequences of {sequence_length} tokens, {num_ranks} ranks with "
            f"{sequences_per_rank} each need {needed}; give more to --data"
        )
    linear = PlacementMap.linear(placement.model, placement.topology)
    arguments = {
        "model": model,
        "maps": {"linear": linear, "planned": replace(placement, metrics=None)},
        "sequences": full,
        "repeats": repeats,
    }
    ranks = run_on_ranks(_bench_rank, num_ranks, arguments, before_joining)
    rows = _rows(ranks, placement.model.num_layers * sequences_per_rank * sequence_length * num_ranks)
    for row in rows:
        if not row.max_difference <= MAX_DIFFERENCE:
            raise CoterieError(
                f"{row.implementation} on the {row.map} map: logits differ by {row.max_difference:.2e} from the "
                f"single-process model, at most {MAX_DIFFERENCE:g} is exact; do not trust this run"
            )
    tokens_per_rank = sequences_per_rank * sequence_length
    return BenchResult(loaded.name, num_ranks, tokens_per_rank, repeats, ranks[0]["backend"], rows)


@torch.no_grad()
def _bench_rank(rank: int, device: torch.device, arguments: Mapping[str, Any]) -> dict[str, Any]:
    num_ranks = dist.get_world_size()
    # Float32 everywhere: the check against one process is about the exchange, not about rounding.
    model = load_model(arguments["model"], "cpu").model.to(device)
    layers = find_moe_layers(model)
    mesh = init_device_mesh(device.type, (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    input_ids = torch.tensor(arguments["sequences"][rank::num_ranks], device=device)
    expected = model(input_ids=input_ids, use_cache=False).logits
    meters = [Meter() for _ in CASES]
    implementations = [
        build_implementations(layers, arguments["maps"][map_name], IMPLEMENTATIONS[name], mesh["ep"], mesh["tp"], meter)
        for (name, map_name), meter in zip(CASES, meters, strict=True)
    ]
    cases: list[dict[str, Any]] = [{"seconds": {phase: [] for phase in (*PHASES, "total")}} for _ in CASES]
    for repeat in range(arguments["repeats"] + 1):
        for case, meter, layer_implementations in zip(cases, meters, implementations, strict=True):
            with installed(layers, layer_implementations):
                meter.reset()
                dist.barrier()
                started = time.perf_counter()
                logits = model(input_ids=input_ids, use_cache=False).logits
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                total = time.perf_counter() - started
            if repeat == 0:  # a warm-up: checked, not timed
                case["max_difference"] = float((logits - expected).abs().max())
                case["bytes_sent"], case["rows_sent"] = meter.bytes_sent, meter.rows_sent
                continue
            for phase, seconds in {**meter.seconds, "total": total}.items():
                case["seconds"][phase].append(seconds)
    return {"backend": dist.get_backend(), "cases": cases}


def _rows(ranks: Sequence[Mapping[str, Any]], num_layer_tokens: int) -> tuple[BenchRow, ...]:
    """Join the ranks' figures: the slowest rank's time of each repeat, the sum of bytes."""
    slowest = [
        {
            phase: [
                max(times) for times in zip(*(rank["cases"][case]["seconds"][phase] for rank in ranks), strict=True)
            ]
            for phase in (*PHASES, "total")
        }
        for case in range(len(CASES))
    ]
    return tuple(
        BenchRow(
            implementation=implementation,
            map=map_name,
            bytes_sent=sum(rank["cases"][case]["bytes_sent"] for rank in ranks),
            rows_per_token=sum(rank["cases"][case]["rows_sent"] for rank in ranks) / num_layer_tokens,
            **{phase: Spread.of(slowest[case][phase]) for phase in (*PHASES, "total")},
            max_difference=max(rank["cases"][case]["max_difference"] for rank in ranks),
            speed_up=statistics.median(
                first / this for first, this in zip(slowest[0]["total"], slowest[case]["total"], strict=True)
            ),
        )
        for case, (implementation, map_name) in enumerate(CASES)
    )
