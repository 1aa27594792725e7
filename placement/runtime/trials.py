"""One rank's part in a bench: every case on the same tokens in turns, timed, counted, checked against one process.
Neither joins ranks' figures nor predicts any: `summary.py` does.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed.expert_parallel import EPImplementation

from placement.placement_map import PlacementMap
from placement.runtime.exchange import make_route
from placement.runtime.experts import IMPLEMENTATIONS, Options, build_implementations, installed
from placement.runtime.meter import PHASES, Meter
from placement.runtime.network import bytes_sent_by_interface, host_identity, interface_name
from placement.runtime.probe import measure_links
from placement.runtime.workloads import ReplayWorkload, TextWorkload, Workload, cut_replay
from profiler.errors import CoterieError
from profiler.loading import load_model
from profiler.profile import Profile

MODES = {
    "flat": Options(),
    "hierarchical": Options(mode="hierarchical"),
    "bf16": Options(wire_dtype=torch.bfloat16),
    "hierarchical-bf16": Options(mode="hierarchical", wire_dtype=torch.bfloat16),
}
"""Ways in which coterie's exchange can be benched, by name."""

SMALL_GRADIENT = 1e-4
"""Of the largest gradient of a step: smaller ones are compared as if they were so large, since the sums that make them
round by some 1e-9 of it."""


@dataclass(frozen=True)
class Case:
    """One row: an implementation, how it exchanges, and on which map."""

    implementation: str
    mode: str
    map: str


@dataclass(frozen=True)
class Task:
    """What every rank is told.

    Attributes:
        cases: to be run in turns.
        maps: by the name that cases give them.
        training: steps forth and back with an optimizer, instead of forward passes alone.
        decoding: steps are tokens at the end of sequences, instead of whole ones.
        steps: forward passes of one batch.
        repeats: timed ones of each case.
        model: a folder or hub id, None for the embedded one; if nothing is replayed.
        sequences: for each batch, token ids of all ranks' sequences.
        replay: a profile's folder.
        num_layers: of the replay, None for all.
        num_tokens: for each batch of a replay, tokens of a rank.
        seed: of what is random.
        tolerance: largest difference from one process that counts as exact where nothing is rounded.
    """

    cases: Sequence[Case]
    maps: Mapping[str, PlacementMap]
    training: bool
    decoding: bool
    steps: int
    repeats: int
    model: str | None
    sequences: Sequence[Sequence[Sequence[int]]]
    replay: str | None
    num_layers: int | None
    num_tokens: Sequence[int]
    seed: int
    tolerance: float


def run_task(rank: int, device: torch.device, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A bench on one rank, to be called on all of them: measured links, and for each batch what each case took."""
    task: Task = arguments["task"]
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (num_ranks, 1), mesh_dim_names=("ep", "tp"))
    some_map = next(iter(task.maps.values()))
    topology, spec = some_map.topology, some_map.model
    route = make_route(
        mesh["ep"].get_group(), topology.ranks_per_node, hierarchical=False, wire_dtype=None, meter=Meter()
    )
    links = measure_links(route, device, spec.hidden_size, spec.expert_size, "float32")
    meters = [Meter() for _ in task.cases]
    implementations: list[list[EPImplementation]] = []
    batches = []
    for workload in _workloads(task, rank, num_ranks, device):
        if not implementations:
            implementations = _implementations(task, workload, mesh, meters)
        batches.append(_run_cases(task, workload, implementations, meters, mesh["ep"].get_group(), device))
    return {"backend": dist.get_backend(), "links": asdict(links), "host": host_identity(), "batches": batches}


def _workloads(task: Task, rank: int, num_ranks: int, device: torch.device) -> Iterator[Workload]:
    if task.replay is None:
        # Float32 everywhere: the check against one process is about the exchange, not about rounding.
        model = load_model(task.model, "cpu").model.to(device)
        decoded = task.steps if task.decoding else 0
        for sequences in task.sequences:
            yield TextWorkload(model, torch.tensor(sequences[rank::num_ranks], device=device), decoded)
        return
    profile = Profile.load_from(Path(task.replay))
    spec = next(iter(task.maps.values())).model
    for count in task.num_tokens:
        needed = count * num_ranks
        tokens = cut_replay(profile.model, profile.require_tokens(), needed, task.num_layers, task.seed)
        mine = tokens.where(slice(rank * count, (rank + 1) * count))
        yield ReplayWorkload(spec, mine, task.steps, device, task.seed + rank)


def _implementations(
    task: Task, workload: Workload, mesh: DeviceMesh, meters: Sequence[Meter]
) -> list[list[EPImplementation]]:
    return [
        build_implementations(
            workload.layers,
            task.maps[case.map],
            IMPLEMENTATIONS[case.implementation],
            mesh["ep"],
            mesh["tp"],
            meter,
            MODES[case.mode],
        )
        for case, meter in zip(task.cases, meters, strict=True)
    ]


def _run_cases(
    task: Task,
    workload: Workload,
    implementations: Sequence[Sequence[EPImplementation]],
    meters: Sequence[Meter],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, Any]:
    reference = _Reference(workload, task.training, group)
    trainers = [Trainer(workload, held, group) for held in implementations] if task.training else []
    cases: list[dict[str, Any]] = [{"total": [], "phases": [], "index": []} for _ in task.cases]
    interface = interface_name()
    for repeat in range(task.repeats + 1):
        for at, (case, meter) in enumerate(zip(cases, meters, strict=True)):
            with installed(workload.layers, implementations[at]):
                if repeat == 0:  # a warm-up: checked, not timed
                    differences = reference.differences(workload, implementations[at])
                    _require_exact(task, task.cases[at], differences, float(reference.outputs.abs().max()))
                    case["max_difference"] = float(np.max(differences))  # unlike Python's own, not past NaN
                    if task.training:  # an optimizer makes its state in its first step
                        trainers[at].step()
                        _forget(workload, implementations[at])
                    continue
                action = trainers[at].step if task.training else _forward_of(workload)
                workload.reset()
                meter.reset()
                dist.barrier(group)
                before = bytes_sent_by_interface(interface) if interface else None
                dist.barrier(group)
                case["total"].append(_seconds(action, device))
                dist.barrier(group)
                after = bytes_sent_by_interface(interface) if interface else None
                case["interface"] = None if before is None or after is None else after - before
                for name in ("bytes_sent", "network_bytes_sent", "rows_sent", "rows_away", "network_rows"):
                    case[name] = getattr(meter, name)
                workload.reset()
                meter.reset()
                meter.align = lambda: dist.barrier(group)
                with torch.set_grad_enabled(task.training):
                    workload.forward()
                meter.align = None
                case["phases"].append([list(meter.seconds[name]) for name in PHASES])
                case["index"].append(meter.index_seconds)
    return {"cases": cases, "topk_ids": _encoded(reference.topk_ids)}


def _require_exact(task: Task, case: Case, differences: tuple[float, float], largest_output: float) -> None:
    """Check what a case computes before it is timed.

    Args:
        differences: as `_Reference.differences` has them.

    Raises:
        CoterieError: it is not what one process does.
    """
    rounds = MODES[case.mode].wire_dtype is not None
    bounds = task.tolerance * max(1.0, largest_output), task.tolerance
    for difference, bound in zip(differences, bounds, strict=True):
        if not (math.isfinite(difference) if rounds else difference <= bound):
            ties = " (a token whose experts' scores tie may be routed otherwise: give other text, or --replay)"
            raise CoterieError(
                f"{case.implementation} on the {case.map} map: differs by {difference:.2e} from the single-process "
                f"model, at most {bound:g} is exact; do not trust this run{'' if task.replay else ties}"
            )


def _forward_of(workload: Workload) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            workload.forward()

    return forward


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


class _Reference:
    """What one process makes of this rank's tokens: outputs, or the gradients of all ranks' losses."""

    def __init__(self, workload: Workload, training: bool, group: dist.ProcessGroup) -> None:
        self.training, self.group, self.topk_ids = training, group, []
        workload.reset()
        caught = [_Catch(layer.experts) for layer in workload.layers]
        with _one_expert_at_a_time(workload), installed(workload.layers, caught), torch.set_grad_enabled(training):
            outputs = workload.forward()
        self.topk_ids = [torch.cat(catch.ids) for catch in caught]
        self.outputs = outputs.detach()
        if training:
            workload.loss(outputs).backward()
            self.dense = [parameter.grad for parameter in workload.dense]
            self.experts = [
                {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
                for layer in workload.layers
            ]
            for gradients in self.experts:
                for gradient in gradients.values():
                    if gradient is not None:
                        dist.all_reduce(gradient, group=group)
            _forget(workload, [])

    def differences(self, workload: Workload, implementations: Sequence[EPImplementation]) -> tuple[float, float]:
        """Largest absolute difference of outputs; in training that of any gradient, over its largest value, else 0.

        Infinite where a gradient is lost, NaN where one of all these is.
        """
        workload.reset()
        with torch.set_grad_enabled(self.training):
            outputs = workload.forward()
        of_outputs = float((outputs.detach() - self.outputs).abs().max())
        if not self.training:
            return of_outputs, 0.0
        workload.loss(outputs).backward()
        pairs = [(parameter.grad, wanted) for parameter, wanted in zip(workload.dense, self.dense, strict=True)]
        for implementation, of_all in zip(implementations, self.experts, strict=True):
            rows = implementation.slots.logical_of_rank[implementation.ep_mesh.get_local_rank()]
            packed = implementation.experts._parameters
            for name, parameter in implementation.experts.named_parameters():
                gradient = of_all[name]
                if name in packed:
                    pairs.append((parameter.grad, None if gradient is None else gradient[rows]))
                    continue
                # Of a norm that experts share, each rank has the part of its own.
                part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                dist.all_reduce(part, group=self.group)
                pairs.append((part, gradient))
        # Where the true gradient is zero, as that of a router's only weight that is normalised to 1, there is rounding
        # only.
        largest = [float(wanted.abs().max()) for _, wanted in pairs if wanted is not None and wanted.numel()]
        least = SMALL_GRADIENT * float(np.max(largest, initial=0.0))
        of_gradients = [_difference(got, wanted, least) for got, wanted in pairs]
        _forget(workload, implementations)
        return of_outputs, float(np.max(of_gradients, initial=0.0))  # it does not pass over NaN


def _difference(got: torch.Tensor | None, wanted: torch.Tensor | None, least: float = 0.0) -> float:
    """Of a gradient, over its largest value, or over `least` where that is larger.

    Infinite where there is none in place of one that is not zero.
    """
    if got is None or wanted is None:
        only = wanted if got is None else got
        return math.inf if only is not None and only.any() else 0.0
    return (
        float((got - wanted).abs().max() / wanted.abs().max().clamp(min=max(least, 1e-12))) if wanted.numel() else 0.0
    )


class Trainer:
    """A training step: forward, backward, the sum of what every rank holds a copy of, and AdamW.

    Its learning rate is 0, so that all cases step from the same weights and still do the work.
    """

    def __init__(
        self, workload: Workload, implementations: Sequence[EPImplementation], group: dist.ProcessGroup
    ) -> None:
        """Take one case's parameters."""
        self.workload, self.group = workload, group
        experts = [parameter for one in implementations for parameter in one.experts.parameters()]
        packed = {id(weight) for one in implementations for weight in one.experts._parameters.values()}
        self.replicated = [*workload.dense, *(parameter for parameter in experts if id(parameter) not in packed)]
        self.optimizer = torch.optim.AdamW([*workload.dense, *experts], lr=0.0)

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        outputs = self.workload.forward()
        self.workload.loss(outputs).backward()
        gradients = [parameter.grad for parameter in self.replicated if parameter.grad is not None]
        if gradients:
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together, group=self.group)
            together /= dist.get_world_size(self.group)
            for gradient, part in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        self.optimizer.step()


class _Catch:
    """Stands before an experts module and takes down which experts it is asked for."""

    def __init__(self, experts: nn.Module) -> None:
        self.ids: list[torch.Tensor] = []
        self._forward = experts.forward

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.ids.append(ids.detach().cpu())
        out: torch.Tensor = self._forward(hidden, ids, weights)
        return out


@contextmanager
def _one_expert_at_a_time(workload: Workload) -> Iterator[None]:
    """The plainest way in which transformers runs experts."""
    configs: list[Any] = [getattr(layer.experts, "config", None) for layer in workload.layers]
    found = [(config, config._experts_implementation) for config in configs if config is not None]
    for config, _ in found:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, name in reversed(found):
            config._experts_implementation = name


def _forget(workload: Workload, implementations: Sequence[EPImplementation]) -> None:
    of_experts = [holder.experts for holder in (*workload.layers, *implementations)]
    for parameter in (*workload.dense, *(one for experts in of_experts for one in experts.parameters())):
        parameter.grad = None


def _encoded(topk_ids: Sequence[torch.Tensor]) -> list[str]:
    """int32 (T, K) of each layer."""
    return [base64.b64encode(ids.numpy().astype(np.int32).tobytes()).decode() for ids in topk_ids]
