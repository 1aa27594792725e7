"""Permuting a checkpoint: seconds beside copying the same files, and how much memory it takes."""

import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import peak_memory, spread, write
from placement.exporters.checkpoint import permute_checkpoint
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.spec import MoESpec

NUM_SHARDS, NUM_EXPERTS, HIDDEN_SIZE, EXPERT_SIZE = 6, 32, 2880, 720
REPEATS = 3


def make_checkpoint(folder: Path) -> int:
    """One MoE layer a shard, `gate_up_proj` packed and `down_proj` expert by expert; returns its bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    weight_map = {}
    for layer in range(NUM_SHARDS):
        block = f"model.layers.{layer}.mlp"
        packed = rng.integers(0, 2**16, (NUM_EXPERTS, 2 * EXPERT_SIZE, HIDDEN_SIZE), dtype=np.uint16)
        tensors = {f"{block}.experts.gate_up_proj": packed.view(np.float16)}
        tensors[f"{block}.router.weight"] = rng.normal(size=(NUM_EXPERTS, HIDDEN_SIZE)).astype(np.float16)
        for expert in range(NUM_EXPERTS):
            down = rng.integers(0, 2**16, (HIDDEN_SIZE, EXPERT_SIZE), dtype=np.uint16)
            tensors[f"{block}.experts.{expert}.down_proj.weight"] = down.view(np.float16)
        file = f"model-{layer + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up", "num_hidden_layers": NUM_SHARDS}))
    return sum(path.stat().st_size for path in folder.iterdir())


def run(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and MiB by which the peak memory of this fresh process rose."""
    spec = MoESpec(
        "made-up", "made-up", tuple(range(NUM_SHARDS)), NUM_EXPERTS, 4, 1, HIDDEN_SIZE, EXPERT_SIZE, "float16"
    )
    rows = np.stack([np.random.default_rng(layer).permutation(NUM_EXPERTS) for layer in spec.layer_ids])
    placement = PlacementMap(spec, Topology(1, 4, NUM_EXPERTS // 4), rows, {"name": "random"})
    before, started = peak_memory(), time.perf_counter()
    permute_checkpoint(source, target, placement)
    seconds = time.perf_counter() - started
    return seconds, (peak_memory() - before) / 2**20


def main() -> None:
    permuted, copied, risen = [], [], []
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.get_context("spawn").Pool(1, None, (), 1) as pool:
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        size = make_checkpoint(source)
        for _ in range(REPEATS):
            seconds, rise = pool.apply(run, (source, target))
            permuted.append(seconds)
            risen.append(rise)
            shutil.rmtree(target)
            started = time.perf_counter()
            shutil.copytree(source, target)
            copied.append(time.perf_counter() - started)
            shutil.rmtree(target)
    rows = [
        ["permute, to the disk", spread(permuted), spread(risen)],
        ["copy the same files, not waiting for the disk", spread(copied), "-"],
    ]
    text = f"{size / 1e9:.2f} GB in {NUM_SHARDS} shards of one layer; median (least to most) of {REPEATS} runs."
    columns = ["step", "seconds", "MiB of peak memory more than before"]
    write("permuting", "Permuting a checkpoint", text, columns, rows)


if __name__ == "__main__":
    main()
