"""The time of a forward pass under every constraint where each rank is a host on a network; see `constraints.py`."""

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.constraints import CASES, RANKS, SEEDS, WORK, make, name_of, plan_of
from placement.constraints.constrain import constrain
from placement.placement_map import PlacementMap
from placement.runtime.experts import IMPLEMENTATIONS, build_implementations, installed
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import PHASES, Meter
from placement.runtime.network import hosts
from profiler import zoo
from profiler.documents import read_documents
from profiler.families import find_moe_layers
from profiler.files import write_json
from profiler.loading import load_model

RATE = "400mbit"
REPEATS = 9
SEQUENCES_PER_RANK, SEQUENCE_LENGTH = 4, 256
MAX_DIFFERENCE = 1e-4
NUDGES, MOST_TIED = 12, 1e-3


def time_constraints() -> None:
    """Writes build/constraints/network-<seed>.json: for each constraint the seconds of every repeat, slowest rank."""
    if os.geteuid() != 0:
        print("network: needs root (Linux network namespaces), left out")
        return
    batches = load_model(None, "cpu").batches(read_documents([zoo.HELD_OUT]), SEQUENCE_LENGTH, 1)
    sequences = [batch.input_ids[0].tolist() for batch in batches if batch.num_tokens == SEQUENCE_LENGTH]
    for seed in SEEDS:
        write_json(WORK / f"network-{seed}.json", _time_seed(seed, sequences[: RANKS * SEQUENCES_PER_RANK]))


def _time_seed(seed: int, sequences: list[list[int]]) -> dict[str, Any]:
    cases = [("linear", None), *((name_of(*case), make(*case, seed=seed)) for case in CASES)]
    arguments = {"placement": plan_of(seed), "cases": cases, "sequences": sequences}
    with hosts(RANKS, RATE) as network:
        ranks = run_on_ranks(_time_rank, RANKS, arguments, network.enter)
    out: dict[str, Any] = {}
    for index, (name, _) in enumerate(cases):
        of_ranks = [rank["cases"][index] for rank in ranks]
        out[name] = {
            "max_difference": max(case["max_difference"] for case in of_ranks),
            **{key: sum(case[key] for case in of_ranks) for key in ("tied", "bytes_sent")},
            **{
                key: [max(times) for times in zip(*(case["seconds"][key] for case in of_ranks), strict=True)]
                for key in (*PHASES, "layers", "total")
            },
        }
        print(f"seed {seed}, {name}: {1e3 * statistics.median(out[name]['layers']):.0f} ms in MoE layers", flush=True)
    return out


@torch.no_grad()
def _time_rank(rank: int, device: torch.device, arguments: Mapping[str, Any]) -> dict[str, Any]:
    model = load_model(None, "cpu").model
    layers = find_moe_layers(model)
    mesh = init_device_mesh(device.type, (RANKS, 1), mesh_dim_names=("ep", "tp"))
    placement: PlacementMap = arguments["placement"]
    linear = PlacementMap.linear(placement.model, placement.topology)
    meter = Meter()
    built = {
        is_linear: build_implementations(
            layers, linear if is_linear else placement, IMPLEMENTATIONS["coterie"], mesh["ep"], mesh["tp"], meter
        )
        for is_linear in (True, False)
    }
    input_ids = torch.tensor(arguments["sequences"][rank::RANKS])
    cases: list[dict[str, Any]] = [
        {"seconds": {key: [] for key in (*PHASES, "layers", "total")}} for _ in arguments["cases"]
    ]
    for repeat in range(REPEATS + 1):
        for case, (name, constraint) in zip(cases, arguments["cases"], strict=True):
            with constrain(model, constraint):
                expected = model(input_ids=input_ids, use_cache=False).logits if repeat == 0 else None
                with installed(layers, built[name == "linear"]):
                    meter.reset()
                    dist.barrier()
                    started = time.perf_counter()
                    logits = model(input_ids=input_ids, use_cache=False).logits
                    total = time.perf_counter() - started
            if expected is not None:  # a warm-up: checked, not timed
                apart, case["tied"] = (logits - expected).abs().amax(dim=-1), 0
                if float(apart.max()) > MAX_DIFFERENCE:
                    with constrain(model, constraint):
                        tied = _tied(model, input_ids, expected)
                    case["tied"], apart[tied] = int((apart[tied] > MAX_DIFFERENCE).sum()), 0.0
                case["max_difference"] = float(apart.max())
                case["bytes_sent"] = meter.bytes_sent
                assert case["max_difference"] <= MAX_DIFFERENCE, (name, case["max_difference"])
                assert case["tied"] <= MOST_TIED * input_ids.numel(), (name, case["tied"])
                continue
            of_phases = {name: sum(calls) for name, calls in meter.seconds.items()}
            seconds = {**of_phases, "layers": sum(of_phases.values()), "total": total}
            for key, value in seconds.items():
                case["seconds"][key].append(value)
    return {"cases": cases}


def _tied(model: Any, input_ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Tokens, bool like the ids, whose logits one process itself changes when embeddings do by a millionth.

    Two experts are as good as equal for them, so that the order of a sum decides; one token in thousands.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    tied = torch.zeros_like(input_ids, dtype=torch.bool)
    for seed in range(NUDGES):
        nudge = 1e-6 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(seed))
        logits = model(inputs_embeds=embeddings * (1 + nudge), use_cache=False).logits
        tied |= (logits - expected).abs().amax(dim=-1) > MAX_DIFFERENCE
    return tied
