"""What maps buy in a real expert-parallel run, beside transformers' own: outputs checked, bytes and times measured.
Knows no solver, and times nothing itself: each rank does, in `trials.py`.

Each batch is run by all cases in turns within each repeat, so that a drift of the machine's speed meets them all.  A
case is timed twice a repeat: once as it is, for the total, and once with all ranks waiting for each other before
dispatch, experts and combine, so that none of these is charged with what a slow rank did before.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from placement.placement_map import PlacementMap
from placement.runtime.launch import joined_by_torchrun, run_as_rank, run_on_ranks, started_by_torchrun
from placement.runtime.network import hosts
from placement.runtime.results import PEER, BenchResult, BenchRun
from placement.runtime.summary import joined
from placement.runtime.trials import MODES, Case, Task, run_task
from placement.runtime.workloads import cut_replay, replayed_layers
from placement.topology import Topology
from profiler.documents import Document
from profiler.errors import CoterieError
from profiler.families import read_spec
from profiler.loading import LoadedModel, load_model
from profiler.profile import Profile

MAX_DIFFERENCE = 1e-4
"""Largest difference from the single process that counts as exact in float32: of outputs, over their largest value
where that is above 1, and of gradients over theirs.  Exchanges that round on the way are not held to it, but their
differences have to be numbers."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        kind: one forward pass, decoding steps, or a training step.
        modes: ways to exchange, of `trials.MODES`.
        sequences_per_rank: batches to run one after the other, by the sequences of a rank.
        sequence_length: tokens of a sequence.
        steps: of decoding, the last tokens of each sequence one by one.
        repeats: timed runs of each case.
        network: None for ranks that exchange through memory, or the rate of a cable for each host, such as 400mbit.
        hidden_size: of a replay, instead of the model's.
        expert_size: likewise.
        num_layers: of a replay, at equal distances; None for all.
        seed: of a replay's choice of sequences and of its random values.
    """

    kind: Literal["prefill", "decode", "training"] = "prefill"
    modes: tuple[str, ...] = ("flat",)
    sequences_per_rank: tuple[int, ...] = (2,)
    sequence_length: int = 256
    steps: int = 16
    repeats: int = 15
    network: str | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    num_layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"repeats": self.repeats, "sequence length": self.sequence_length, "steps": self.steps}
        sizes |= {"sequences per rank": min(self.sequences_per_rank, default=0)}
        sizes |= {
            name: value
            for name, value in (("hidden size", self.hidden_size), ("expert size", self.expert_size))
            if value is not None
        }
        for name, value in sizes.items():
            if value < 1:
                raise CoterieError(f"{name} {value}: must be at least 1")
        for mode in self.modes:
            if mode not in MODES:
                raise CoterieError(f"mode {mode!r}: must be one of {', '.join(MODES)}")

    @property
    def steps_of_a_pass(self) -> int:
        """Forward passes of one batch."""
        return self.steps if self.kind == "decode" else 1

    def tokens_per_step(self, sequences: int) -> int:
        """Tokens of a rank in each forward pass."""
        return sequences if self.kind == "decode" else sequences * self.sequence_length


def bench(
    maps: Mapping[str, PlacementMap],
    model: str | None = None,
    documents: Sequence[Document] = (),
    replay: Path | None = None,
    settings: Settings | None = None,
) -> BenchResult | None:
    """Run maps expert-parallel, one process for each rank, each with tokens of its own.

    Maps for the same ranks and nodes are run in turns with each other, with file order and with transformers'
    all_to_all; others one after the other.  Where torchrun started this process, it is one of the ranks, and only the
    first one gets the result.

    Args:
        maps: by the name that tables give them.
        model: a folder or hub id; None for the embedded model.
        documents: text for the batches, one sequence of each domain in turn.
        replay: a profile to replay instead of running a model.

    Raises:
        CoterieError: a map is for another model, there are too few tokens, or outputs differ from one process.
    """
    settings = settings or Settings()
    if not maps:
        raise CoterieError("no placement map to bench; give at least 1")
    if replay is None and settings.kind == "decode" and settings.steps >= settings.sequence_length:
        raise CoterieError(
            f"{settings.steps} steps: must be fewer than the {settings.sequence_length} tokens of a sequence"
        )
    for name, placement in maps.items():
        _require_modes(name, placement, settings.modes)
    # First of all: ranks wait for each other to join for seconds only, and models take as long as they take.
    with joined_by_torchrun() as device:
        name, tasks = _tasks(maps, model, documents, replay, settings)
        runs: list[BenchRun] = []
        for task in tasks:
            ranks = _run(task, settings.network, device)
            if ranks is None:
                return None
            backend = ranks[0]["backend"]
            for at, count in enumerate(settings.sequences_per_rank):
                runs.append(joined(task, ranks, at, settings.tokens_per_step(count)))
        return BenchResult(
            name, settings.kind, replay is not None, backend, settings.network, settings.repeats, tuple(runs)
        )


def _require_modes(name: str, placement: PlacementMap, modes: Sequence[str]) -> None:
    """Check that each way to exchange is one of its own on a map.

    Raises:
        CoterieError: it would be the flat one, measured again.
    """
    num_nodes, per_node = placement.topology.num_nodes, placement.topology.ranks_per_node
    for mode in modes:
        if MODES[mode].mode == "hierarchical" and min(num_nodes, per_node) == 1:
            what = "1 node" if num_nodes == 1 else f"{num_nodes} nodes of 1 rank"
            raise CoterieError(
                f"--mode {mode}: the plan {name} has {what}, where it is the flat exchange; plan with --nodes, for "
                "several nodes of several ranks"
            )


def _tasks(
    maps: Mapping[str, PlacementMap],
    model: str | None,
    documents: Sequence[Document],
    replay: Path | None,
    settings: Settings,
) -> tuple[str, list[Task]]:
    """The model's name, and what is to be run one after the other; says what is wrong before anything is started."""
    profile = Profile.load_from(replay) if replay else None
    full: list[list[int]] = []
    if profile is not None:
        name, spec = profile.model.name, profile.model
        if not (settings.hidden_size or spec.hidden_size) or not (settings.expert_size or spec.expert_size):
            raise CoterieError(f"{replay}: does not know the sizes of the model; give --hidden-size and --expert-size")
    else:
        loaded = load_model(model, "cpu")
        name, spec = loaded.name, read_spec(loaded.model, loaded.name)
    for placement in maps.values():
        placement.require_model(spec)
    if profile is None:
        most = max(placement.topology.num_ranks for placement in maps.values())
        full = _full_sequences(loaded, documents, settings.sequence_length, most * max(settings.sequences_per_rank))
        del loaded  # each rank loads its own
    together: dict[tuple[int, int], dict[str, PlacementMap]] = {}
    for label, placement in maps.items():
        topology = placement.topology
        together.setdefault((topology.num_nodes, topology.ranks_per_node), {})[label] = placement
    if started_by_torchrun() and len(together) > 1:
        raise CoterieError(
            f"maps for {len(together)} topologies: under torchrun the ranks are given, bench one at a time"
        )
    tasks = [_task(group, settings, model, replay, full) for group in together.values()]
    if profile is not None:
        for task in tasks:
            num_ranks = task.maps["linear"].topology.num_ranks
            cut_replay(spec, profile.require_tokens(), num_ranks * max(task.num_tokens), settings.num_layers, task.seed)
    return name, tasks


def _full_sequences(loaded: LoadedModel, documents: Sequence[Document], length: int, needed: int) -> list[list[int]]:
    batches = loaded.batches(documents, length, batch_size=1)
    of_full_length = (batch.input_ids[0].tolist() for batch in batches if batch.num_tokens == length)
    full = list(itertools.islice(of_full_length, needed))  # reads no more text than it needs
    if len(full) < needed:
        raise CoterieError(
            f"the text holds {len(full)} sequences of {length} tokens, the ranks need {needed} together; "
            "give more to --data, or fewer or shorter sequences"
        )
    return full


def _task(
    maps: Mapping[str, PlacementMap],
    settings: Settings,
    model: str | None,
    replay: Path | None,
    sequences: Sequence[Sequence[int]],
) -> Task:
    prepared = {name: _prepared(placement, settings, replay is not None) for name, placement in maps.items()}
    some = next(iter(prepared.values()))
    spec, topology = some.model, some.topology
    linear = PlacementMap.linear(spec, topology)
    divides = linear.topology.num_slots == spec.num_experts  # transformers owns as many experts on each rank
    peer = [Case(PEER, "flat", "linear")] if divides else []
    counts = settings.sequences_per_rank
    return Task(
        cases=[*peer, *(Case("coterie", mode, name) for mode in settings.modes for name in ("linear", *prepared))],
        maps={"linear": linear, **prepared},
        training=settings.kind == "training",
        decoding=settings.kind == "decode",
        steps=settings.steps_of_a_pass,
        repeats=settings.repeats,
        model=model,
        sequences=[] if replay else [sequences[: topology.num_ranks * count] for count in counts],
        replay=str(replay) if replay else None,
        num_layers=settings.num_layers,
        num_tokens=[settings.tokens_per_step(count) * settings.steps_of_a_pass for count in counts] if replay else [],
        seed=settings.seed,
        tolerance=MAX_DIFFERENCE,
    )


def _prepared(placement: PlacementMap, settings: Settings, replaying: bool) -> PlacementMap:
    """A map as it is run: on its hosts, with the sizes and layers of a replay, and without figures."""
    model, slots, topology = placement.model, placement.physical_to_logical_map, placement.topology
    if replaying:
        layers = replayed_layers(model, settings.num_layers)
        model = replace(
            model,
            layer_ids=tuple(model.layer_ids[layer] for layer in layers),
            hidden_size=settings.hidden_size or model.hidden_size,
            expert_size=settings.expert_size or model.expert_size,
        )
        slots = slots[layers]
    num_nodes = topology.num_nodes
    if num_nodes == 1 and settings.network:
        num_nodes = topology.num_ranks  # nothing else was planned for, so that each rank gets a host
    topology = Topology(num_nodes, topology.num_ranks // num_nodes, topology.slots_per_rank)
    return PlacementMap(replace(model, dtype="float32"), topology, slots, placement.solver)


def _run(task: Task, network: str | None, device: torch.device | None) -> list[dict[str, Any]] | None:
    """All ranks' results; on a rank that torchrun started, which has a device, those of rank 0 only."""
    topology, arguments = task.maps["linear"].topology, {"task": task}
    if device is not None:
        if network:
            raise CoterieError("--network makes hosts on one machine; under torchrun the hosts are there, leave it out")
        return run_as_rank(run_task, device, arguments)
    if network is None:
        return run_on_ranks(run_task, topology.num_ranks, arguments)
    with hosts(topology.num_nodes, network, topology.ranks_per_node) as made:
        return run_on_ranks(run_task, topology.num_ranks, arguments, made.enter)
