"""Quality against traffic under constrained routing: `python -m benchmarks.constraints` (all), or one of its parts.

`run` measures and fine-tunes the embedded model under every constraint, three seeds; what is done is kept in
build/constraints and not done again.  `network` times every constraint on four hosts (as root, see `network.py`).
`table` writes benchmarks/results/constraints*.
"""

import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import circumstances
from placement.compare import plan_and_compare
from placement.constraints.constrain import Constraint, constrain
from placement.constraints.examples import text_examples
from placement.constraints.finetune import Training, train
from placement.constraints.lists import collaborator_lists, device_aware_lists
from placement.constraints.pruning import limit_ranks
from placement.constraints.quality import perplexity
from placement.constraints.similarity import RouterSimilarity
from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.solvers import Options
from placement.topology import Topology
from profiler import zoo
from profiler.documents import read_documents
from profiler.files import write_json
from profiler.loading import LoadedModel, load_model
from profiler.profile import Profile
from profiler.profiling import profile_model
from profiler.recorder import Recorder

WORK = Path("build/constraints")
MADE_BY = WORK / "made-by.txt"
"""The commit whose runs these are."""
RANKS = 4
SEEDS = (0, 1, 2)
HELD_OUT_TOKENS = 16_384
TRAINING = {"steps": 40, "batch_size": 16, "learning_rate": 5e-5, "warmup_steps": 4, "save_steps": 0}

CASES = (
    ("none", 0),
    *((method, limit) for limit in (2, 1, 3) for method in ("router", "similarity")),
    *((method, top_t) for top_t in (31, 47, 23, 7, 15, 39, 55) for method in ("c2r", "aware")),
)
"""Method, and its N or T."""

NAMES = {
    "none": "no constraint",
    "router": "router-based pruning, N={}",
    "similarity": "similarity-based pruning, N={}",
    "c2r": "C2R, T={}",
    "aware": "device-aware C2R, T={}",
}


def name_of(method: str, size: int) -> str:
    return NAMES[method].format(size)


def _begin_anew_if_changed() -> None:
    """What another state of the code has left would be taken for what this one does."""
    commit = str(circumstances()["commit"])
    if WORK.exists() and ("with changes" in commit or not MADE_BY.exists() or MADE_BY.read_text() != commit):
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True, exist_ok=True)
    MADE_BY.write_text(commit)


def prepare() -> None:
    """What all runs share: the profile, the similarity table, a plan for each seed."""
    WORK.mkdir(parents=True, exist_ok=True)
    loaded = load_model(None, "cpu")
    if not (WORK / "similarity.npy").exists():
        with RouterSimilarity(loaded.model) as similarity:
            profile_model(loaded, read_documents([zoo.CALIBRATION]), WORK / "calibration.profile")
        np.save(WORK / "similarity.npy", similarity.table().similarity)
    profile = Profile.load_from(WORK / "calibration.profile")
    for seed in SEEDS:
        if not (WORK / f"plan-{seed}.json").exists():
            topology = Topology.for_experts(zoo.NUM_EXPERTS, RANKS)
            plan_and_compare(profile, topology, "search", Options(seed=seed), strategies=["linear"]).save(
                WORK / f"plan-{seed}.json"
            )


def make(method: str, size: int, seed: int) -> Constraint | None:
    profile, placement = Profile.load_from(WORK / "calibration.profile"), plan_of(seed)
    if method == "none":
        return None
    if method == "c2r":
        return collaborator_lists(profile, size)
    if method == "aware":
        return device_aware_lists(profile, placement, size)
    return limit_ranks(placement, size, np.load(WORK / "similarity.npy") if method == "similarity" else None)


def plan_of(seed: int) -> PlacementMap:
    return PlacementMap.load_from(WORK / f"plan-{seed}.json")


def measure(loaded: LoadedModel, constraint: Constraint | None, seed: int) -> dict[str, Any]:
    """Perplexity and traffic of held-out text."""
    batches = loaded.batches(read_documents([zoo.HELD_OUT]), 256, 8, HELD_OUT_TOKENS)
    with constrain(loaded.model, constraint), Recorder(loaded.model) as recorder:
        quality = perplexity(loaded.model, batches, "cpu")
    metrics = evaluate(plan_of(seed), recorder.trace())
    return {
        "perplexity": quality.overall,
        "of_domain": quality.of_domain,
        **{key: float(getattr(metrics, key).mean()) for key in ("fan_out", "busiest_ingress", "imbalance_ratio")},
    }


def run_one(method: str, size: int, seed: int) -> str:
    """Measure, fine-tune and measure again under one constraint with one seed; writes its own file."""
    torch.set_num_threads(1)
    path = WORK / "runs" / f"{method}-{size}-{seed}.json"
    loaded = load_model(None, "cpu")
    constraint = make(method, size, seed)
    before = measure(loaded, constraint, seed)
    examples = text_examples(loaded, read_documents([zoo.CALIBRATION]), 256)
    losses = train(loaded.model, examples, constraint, Training(**TRAINING, seed=seed), WORK / path.stem)
    after = measure(loaded, constraint, seed)
    write_json(
        path,
        {"method": method, "size": size, "seed": seed, "before": before, "losses": losses, "after": after},
    )
    name = name_of(method, size)
    return f"seed {seed}, {name}: perplexity {before['perplexity']:.3f}, {after['perplexity']:.3f} after"


def run(workers: int) -> None:
    _begin_anew_if_changed()
    prepare()
    tasks = [(*case, seed) for case in CASES for seed in SEEDS]
    left = [task for task in tasks if not (WORK / "runs" / f"{task[0]}-{task[1]}-{task[2]}.json").exists()]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(run_one, *task) for task in left]
        for number, done in enumerate(as_completed(running), 1):
            print(f"{number} of {len(left)}: {done.result()}", file=sys.stderr, flush=True)


def main() -> None:
    parts = sys.argv[1:] or ["run", "network", "table"]
    if "run" in parts:
        run(os.cpu_count() or 1)
    if "network" in parts:
        from benchmarks.constraints_network import time_constraints

        time_constraints()
    if "table" in parts:
        from benchmarks.constraints_table import write_tables

        write_tables()


if __name__ == "__main__":
    main()
