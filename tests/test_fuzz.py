"""Broken files of every kind that a command reads: a result or one clear line, and nothing left behind.

Seeded, so that a case that fails can be run again by its number.  300 cases in the normal run; COTERIE_FUZZ says
another number (`make fuzz`: 3,000).
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_spec, make_trace, random_ids
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as to_safetensors
from test_constraints_cli import TASK
from test_engine_mistakes import ENGINES, write_valid
from test_report import bench_result
from tiny_models import tiny_model

from placement import cli
from placement.constraints import finetune as finetuning
from placement.constraints.config import FILE_NAME as CONSTRAINT
from placement.constraints.config import load as load_constraint
from placement.constraints.config import save as save_constraint
from placement.constraints.examples import instruction_examples, read_conversations, text_examples
from placement.constraints.lists import collaborator_lists
from placement.constraints.pruning import limit_ranks
from placement.constraints.similarity import SimilarityTable
from placement.exporters import eplb, sglang, tensorrt_llm, vllm_ascend
from placement.exporters.checkpoint import permute_checkpoint
from placement.exporters.contract import ServedModel, write_export
from placement.placement_map import PlacementMap
from placement.runtime import bench as runtime_bench
from placement.topology import Topology
from profiler import Profile, zoo
from profiler.documents import read_documents
from profiler.families import read_spec
from profiler.folder import content_digest, header_digest
from profiler.loading import LoadedModel, load_model
from profiler.profiling import profile_model
from profiler.spec import MoESpec

NUM_CASES = int(os.environ.get("COTERIE_FUZZ", "300"))
SECONDS = 60
"""After which a command hangs.  It has run before, on valid files, so that this is no time in which it compiles."""


class Trap:
    """Leaves a folder behind if it is ever unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("was-run",)


def a_profile(here: Path, name: str = "run.profile", seed: int = 0) -> None:
    trace = make_trace(random_ids(seed, 2, 200, 8, 2), num_sequences=8)
    Profile.from_tokens(make_spec(2, 8, 2), ["prose", "code"], trace, {"made": "up"}).save(here / name)


def a_plan(here: Path) -> PlacementMap:
    rows = np.stack([np.random.default_rng(layer).permutation(8) for layer in range(2)])
    figure = {"mean": 1.5, "worst": 2.0}
    figures = dict.fromkeys(("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share"), figure)
    metrics = {"linear": {"train": figures, "held_out": figures, "tokens_planned_on": 9, "tokens_measured_on": 9}}
    plan = PlacementMap(make_spec(2, 8, 2), Topology(1, 4, 2), rows, {"name": "any"}, metrics=metrics)
    plan.save(here / "plan.json")
    return plan


def a_foreign_map(name: str) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        a_profile(here)
        plan, served = a_plan(here), ServedModel(2)
        engines = {"json": sglang.ENGINE, "yaml": tensorrt_llm.ENGINE, "safetensors": eplb.ENGINE}
        if name == "ascend.json":
            write_export(vllm_ascend.ENGINE, plan, here / name, served)
        elif name == "map.npy":
            np.save(here / name, plan.physical_to_logical_map)
        elif name == "map.pt":
            rows = torch.from_numpy(plan.physical_to_logical_map)
            torch.save({"physical_to_logical_map": rows}, here / name)
        else:
            write_export(engines[name.partition(".")[2]], plan, here / name, served)

    return make


def a_checkpoint(here: Path) -> None:
    (here / "model").mkdir()
    spec = a_plan(here).model
    tensors: dict[str, np.ndarray] = {}
    for layer in spec.layer_ids:
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = np.ones((8, 3), np.float32)
        for expert in range(8):
            tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"] = np.ones((2, 3), np.float32)
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in tensors.items() if names[name] == file}, here / "model" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (here / "model" / "config.json").write_text(json.dumps({"model_type": "olmoe", "num_hidden_layers": 2}))


def arrays(here: Path) -> None:
    ids = random_ids(0, 2, 60, 8, 2).transpose(1, 0, 2)
    more = {"sequence_ids": np.arange(60) // 10, "domain_ids": np.arange(60) % 2, "layer_ids": np.array([0, 3])}
    weights, names = np.random.default_rng(0).random(ids.shape), np.array(["prose", "code"])
    np.savez(here / "r.npz", topk_ids=ids, topk_weights=weights, domain_names=names, num_experts=np.array(8), **more)
    np.save(here / "r.npy", ids)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo.MODEL)


def save_tiny(folder: Path) -> MoESpec:
    """A small model with some bytes of every kind that a model folder has; returns what routes in it."""
    size = {"vocab_size": len(tokenizer()), "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
    tiny_model("olmoe", **size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return read_spec(load_model(str(folder), "cpu", with_tokenizer=False).model, folder.name)


def texts(here: Path) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("Some text, and m\u00f6re of it.\n" * 20, encoding="utf-8")
    records = [{"text": "a text"}, {"text": "more"}, {"text": "b", "domain": "c"}]
    (here / "texts" / "b.jsonl").write_text("\n".join(map(json.dumps, records)))


def a_dataset(here: Path) -> None:
    import datasets

    rows = {"text": ["a text", "more", None], "domain": ["a", "b", "a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(here / "texts")


def a_model(here: Path) -> None:
    save_tiny(here / "model")
    (here / "short.txt").write_text("A little text to run.\n" * 4)
    np.save(here / "r.npy", random_ids(0, 2, 60, 8, 2).transpose(1, 0, 2))


def a_permuted_model(here: Path) -> None:
    spec = save_tiny(here / "model")
    (here / "short.txt").write_text("A little text to run.\n" * 4)
    Profile.from_tokens(spec, ["a"], make_trace(random_ids(0, 2, 60, 8, 2), num_domains=1), {}).save(
        here / "run.profile"
    )
    rows = np.stack([np.random.default_rng(layer).permutation(8) for layer in range(2)])
    plan = PlacementMap(spec, Topology(1, 2, 4), rows, {"name": "any"})
    plan.save(here / "plan.json")
    permute_checkpoint(here / "model", here / "planned", plan)


def a_tuned_model(here: Path) -> None:
    """With the constraint that it was fine-tuned under in its folder."""
    spec = save_tiny(here / "tuned")
    (here / "short.txt").write_text("A little text to run.\n" * 4)
    save_constraint(limit_ranks(PlacementMap.linear(spec, Topology(1, 2, 4)), 1), here / "tuned" / CONSTRAINT)


def tasks(here: Path) -> None:
    save_tiny(here / "model")
    (here / "short.txt").write_text("A little text to run.\n" * 4)
    (here / "tasks").mkdir()
    records = [{"question": f"{n} and 1 is", "choices": [f" {n + 1}", " no"], "answer": 0} for n in range(2)]
    (here / "tasks" / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    (here / "tasks" / "sums.yaml").write_text(TASK.replace("FILE", "tasks/sums.jsonl"))


class StopError(BaseException):
    """In place of a signal."""


def stop(*_: Any) -> None:
    raise StopError


def a_stopped_recording(here: Path) -> None:
    """After its first batch, with a checkpoint."""
    save_tiny(here / "model")
    (here / "short.txt").write_text("A little text to run.\n" * 4)

    def stop_after_one(done: int, _total: int) -> None:
        if done:
            stop()

    loaded, documents = load_model(str(here / "model"), "cpu"), read_documents([here / "short.txt"])
    with suppress(StopError):
        profile_model(
            loaded, documents, here / "run.profile", sequence_length=16, batch_size=1, on_progress=stop_after_one
        )
    assert (here / "run.profile.partial" / "checkpoint").exists()


def a_stopped_tuning(here: Path) -> None:
    """One after its first step, one behind its last step, and one that is complete."""
    save_tiny(here / "model")
    (here / "short.txt").write_text("A little text to run.\n" * 4)
    training = finetuning.Training(steps=2, batch_size=1, save_steps=1)
    for name, how in (("whole", None), ("behind", stop), ("between", stop)):
        loaded = load_model(str(here / "model"), "cpu", dtype="float32")
        examples = text_examples(loaded, read_documents([here / "short.txt"]), 16)
        with pytest.MonkeyPatch.context() as patch, suppress(StopError):
            if how:
                patch.setattr(finetuning, "put_in_place", how)
            finetuning.finetune(loaded, examples, None, training, here / name)
    shutil.rmtree(here / ".between.checkpoints" / "checkpoint-2")
    assert (here / ".behind.checkpoints" / "checkpoint-2" / finetuning.COMPLETE).exists()


def a_constraint(here: Path) -> None:
    a_profile(here)
    save_constraint(limit_ranks(a_plan(here), 2), here / "limit.safetensors")
    save_constraint(collaborator_lists(Profile.load_from(here / "run.profile"), 4), here / "lists.safetensors")
    products = np.random.default_rng(0).random((2, 8, 8))
    SimilarityTable(make_spec(2, 8, 2), products + products.transpose(0, 2, 1), 100).save(here / "alike.safetensors")


def a_bench(here: Path) -> None:
    a_profile(here)
    a_plan(here)
    bench_result().save(here / "bench.json")


def conversations(here: Path) -> None:
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    told = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Three."}]
    records = [{"messages": turns}, {"conversations": told}, {"instruction": "Add", "input": "1 1", "output": "2"}]
    (here / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))


def what_runs_a_model(here: Path) -> None:
    """Of the embedded model, which these commands load if they are named none."""
    (here / "short.txt").write_text("A little text to run, for two ranks. " * 8)
    conversations(here)
    loaded = load_model(None, "cpu")
    spec = read_spec(loaded.model, loaded.name)
    trace = make_trace(random_ids(0, spec.num_layers, 200, spec.num_experts, spec.top_k), num_sequences=8)
    Profile.from_tokens(spec, ["prose", "code"], trace, {"made": "up"}).save(here / "run.profile")
    plan = PlacementMap.linear(spec, Topology(1, 2, spec.num_experts // 2))
    plan.save(here / "plan.json")
    save_constraint(limit_ranks(plan, 1), here / "limit.safetensors")


def recording(engine: str) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        (here / "recording").mkdir()
        write_valid(engine, here / "recording")

    return make


EXPORTS = [
    ["export", "plan.json", "--to", to, *options, "-o", f"out/x{suffix}"]
    for to, suffix, options in [
        ("sglang", ".json", ["--num-hidden-layers", "4"]),
        ("tensorrt-llm", ".yaml", ["--num-hidden-layers", "4"]),
        ("vllm", ".json", []),
        ("vllm-ascend", ".json", ["--num-hidden-layers", "4"]),
        ("eplb", ".safetensors", []),
    ]
]
SHAPE = ["--num-experts", "8", "--top-k", "2", "--num-hidden-layers", "2"]
FEW = ["--sequences-per-rank", "1", "--sequence-length", "16"]
HELD_OUT = ["--sequence-length", "16", "--held-out", "short.txt"]
TUNE = [*HELD_OUT, "--no-plain", "-o", "out/tuned"]
GO_ON = [
    *("finetune", "model", "--data", "short.txt", *HELD_OUT),
    *("--steps", "2", "--batch-size", "1", "--save-steps", "1", "--resume", "-o"),
]
IMPORT_OF = {"vllm": "vllm", "tensorrt-llm": "tensorrt-llm", "raw": "tensorrt-llm", "megatron": "megatron"}
TARGETS: dict[str, tuple[Callable[[Path], Any], list[list[str]]]] = {
    "profile": (
        lambda here: (a_profile(here), a_profile(here, "more.profile", 1), a_plan(here)),
        [
            ["plan", "run.profile", "--ranks", "2", "--strategy", "load", "--kicks", "1", "-o", "out/plan.json"],
            ["evaluate", "plan.json", "run.profile"],
            ["profile", "merge", "run.profile", "more.profile", "-o", "out/merged.profile"],
            ["profile", "split", "run.profile", "--by", "domain", "-o", "out/parts"],
            ["inspect", "run.profile", "plan.json", "--no-study"],
            ["constrain", "run.profile", "--method", "c2r", "--top-t", "3", "-o", "out/lists.safetensors"],
        ],
    ),
    "plan": (
        lambda here: (a_profile(here), a_plan(here)),
        [
            ["evaluate", "plan.json", "run.profile"],
            ["inspect", "run.profile", "plan.json", "--no-study"],
            ["constrain", "run.profile", "--plan", "plan.json", "--limit", "2", "-o", "out/limit.safetensors"],
            ["report", "run.profile", "plan.json", "--no-study", "-o", "out/page.html"],
            *EXPORTS,
        ],
    ),
    "bench": (a_bench, [["report", "run.profile", "plan.json", "bench.json", "--no-study", "-o", "out/page.html"]]),
    "constraint": (
        a_constraint,
        [
            ["constraint", "limit.safetensors"],
            ["constraint", "lists.safetensors"],
            [
                *("constrain", "run.profile", "--plan", "plan.json", "--method", "similarity", "--limit", "2"),
                *("--similarity", "alike.safetensors", "-o", "out/limit.safetensors"),
            ],
        ],
    ),
    "conversations": (conversations, [["conversations", "chats.jsonl"]]),
    "model": (
        a_model,
        [
            ["import", "numpy", "r.npy", "--model", "model", "-o", "out/run.profile"],
            ["profile", "model", "--data", "short.txt", "-o", "out/run.profile"],
            ["codesign", "model", "--data", "short.txt", "--ranks", "2", "--top-t", "3", "-o", "out/both"],
            [
                *("codesign", "model", "--data", "short.txt", "--ranks", "2", "--method", "router", "--limit", "1"),
                *("--rounds", "2", "-o", "out/both"),
            ],
        ],
    ),
    "permuted model": (
        a_permuted_model,
        [
            ["export", "verify", "model", "planned", "--num-tokens", "16"],
            ["export", "verify", "model", "planned", "--num-tokens", "16", "--data", "short.txt"],
            ["export", "plan.json", "--to", "checkpoint", "--model", "planned", "--invert", "-o", "out/restored"],
            ["evaluate", "planned", "run.profile"],
        ],
    ),
    "tuned model": (
        a_tuned_model,
        [
            ["quality", "tuned", "--data", "short.txt"],
            ["finetune", "tuned", "--constraint", "tuned", "--data", "short.txt", *TUNE],
        ],
    ),
    "stopped recording": (
        a_stopped_recording,
        [
            [
                *("profile", "model", "--data", "short.txt", "--sequence-length", "16", "--batch-size", "1"),
                *("--resume", "-o", "run.profile"),
            ]
        ],
    ),
    "stopped fine-tuning": (
        a_stopped_tuning,
        [[*GO_ON, name] for name in ("between", "behind", "whole")],
    ),
    "run": (
        what_runs_a_model,
        [
            ["bench", "plan.json", "--data", "short.txt", *FEW],
            ["bench", "plan.json", "--replay", "run.profile", "--layers", "2", *FEW],
            ["finetune", "--constraint", "limit.safetensors", "--data", "short.txt", *TUNE],
            ["finetune", "--constraint", "limit.safetensors", "--instructions", "chats.jsonl", *TUNE],
            ["quality", "--constraint", "limit.safetensors", "--data", "short.txt"],
        ],
    ),
    "checkpoint": (
        a_checkpoint,
        [["export", "plan.json", "--to", "checkpoint", "--model", "model", "-o", "out/planned"], EXPORTS[0]],
    ),
    "arrays": (arrays, [["import", "numpy", name, "-o", "out/run.profile"] for name in ("r.npz", "r.npy")]),
    "texts": (texts, [["texts", "texts"]]),
    "dataset": (a_dataset, [["texts", "texts"]]),
    "tasks": (tasks, [["quality", "model", "--data", "short.txt", "--task", "sums", "--task-folder", "tasks"]]),
    **{
        name: (a_foreign_map(name), [["evaluate", name, "run.profile", "--ranks", "4"]])
        for name in ("map.json", "map.yaml", "ascend.json", "map.npy", "map.pt", "map.safetensors")
    },
    **{
        f"recording {engine}": (
            recording(engine),
            [["import", IMPORT_OF.get(engine, "sglang"), "recording", *SHAPE, "-o", "out/run.profile"]],
        )
        for engine in ENGINES
    },
}
"""By kind: what makes valid files, and the commands that read them."""
NEEDED = {"dataset": "datasets", "tasks": "lm_eval"}
"""Of optional extras, by kind."""


def mutate_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    content, kind = bytearray(data), rng.integers(7)
    place = int(rng.integers(len(content) + 1))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        for at in rng.integers(len(content), size=int(rng.integers(1, 9))) if content else ():
            content[at] = rng.integers(256)
    elif kind == 2:
        content[place:place] = rng.bytes(int(rng.integers(1, 20)))
    elif kind == 3:
        return bytes(rng.bytes(int(rng.integers(60))))
    elif kind == 4:
        content[place : place + int(rng.integers(1, 40))] = b""
    elif kind == 5:
        content[place:place] = content[: int(rng.integers(len(content) + 1))]
    else:
        content[place : place + 8] = bytes([int(rng.choice([0, 255]))]) * 8
    return bytes(content)


JUNK: list[Any] = [
    None, True, "", "x", "[/]", "../../x", "a\nb", "\ud800", -1, 0, 3, 10**30, 0.5, float("nan"), float("inf"), [], {},
    [1, "a"], [[1], [1, 2]], {"a": 1}, [[[]]], "9" * 5000, [0] * 1000,
]  # fmt: skip
ODD_ARRAYS = [
    np.zeros(0), np.full((2, 8), np.nan), np.full((2, 8), 99), np.array(3), np.array("x"), np.array([["a"]]),
    np.zeros((60, 2, 2), np.float16), np.full((60, 2, 2), 255, np.uint8), np.full((60, 2, 2), -(2**62)),
    np.array([2**63], np.uint64), np.zeros((2, 0)), np.array([True]), np.array([1j]), np.array(["law", "law"]),
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value))[:40]:
            yield from places(inner, (*path, key))


def put(rng: np.random.Generator, value: Any, path: tuple, junk: Any) -> Any:
    """With something else in one place, without it, or with it under another name."""
    if not path:
        return junk
    changed = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and rng.integers(4) == 0:
        gone = changed.pop(path[0])
        if isinstance(changed, dict) and rng.integers(2):
            changed[str(rng.choice(["more", "../x", "", "[/]"]))] = gone
        return changed
    changed[path[0]] = put(rng, value[path[0]], path[1:], junk)
    return changed


def changed_json(rng: np.random.Generator, value: Any) -> Any:
    every = list(places(value))
    return put(rng, value, every[rng.integers(len(every))], JUNK[rng.integers(len(JUNK))])


def changed_arrays(rng: np.random.Generator, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With another name, shape, values or kind for one of them."""
    name = str(rng.choice(list(held)))
    choice = rng.integers(4)
    if choice == 0:
        held[str(rng.choice(["more", "0_1", "x/../../y"]))] = held.pop(name)
    elif choice == 1:
        held[name] = held[name][..., :-1] if held[name].ndim else held[name].reshape(1)
    elif choice == 2 and held[name].dtype.kind in "iu":
        held[name] = held[name] + held[name].dtype.type(rng.integers(1, 200))
    else:
        held[name] = ODD_ARRAYS[rng.integers(len(ODD_ARRAYS))]
    return {key: np.ascontiguousarray(value) for key, value in held.items()}


def mutate_content(rng: np.random.Generator, path: Path) -> bool:
    """Well-formed, with something unfit in it; False where the file is of no such kind."""
    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(changed_json(rng, json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            at = int(rng.integers(len(lines)))
            lines[at] = json.dumps(changed_json(rng, json.loads(lines[at])))
            path.write_text("\n".join(lines))
        elif path.suffix == ".yaml":
            import yaml

            value = changed_json(rng, yaml.safe_load(path.read_text()))
            path.write_text(yaml.safe_dump(value, default_flow_style=None))
        elif path.suffix in (".npz", ".safetensors"):
            held = changed_arrays(rng, dict(np.load(path)) if path.suffix == ".npz" else load_file(path))
            if path.suffix == ".npz":
                np.savez(path, **held)
            else:
                save_file(held, path)
        elif path.name == "checkpoint":  # of a recording: arrays behind their hash, which is made to fit
            held = parse_safetensors(path.read_bytes()[32:])
            if rng.integers(2):
                note = changed_json(rng, json.loads(held["note"].tobytes()))
                held["note"] = np.frombuffer(json.dumps(note).encode(), np.uint8)
            else:
                held = changed_arrays(rng, held)
            data = to_safetensors(held)
            path.write_bytes(hashlib.sha256(data).digest() + data)
        elif path.suffix == ".npy":
            np.save(path, ODD_ARRAYS[rng.integers(len(ODD_ARRAYS))])
        elif path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
            tensors = [torch.zeros(0), torch.full((2, 8), float("nan")), torch.full((2, 30, 8), 99), torch.tensor(3)]
            tensors += [torch.ones(1, dtype=torch.int32).expand(10**7, 10**7), torch.eye(2).to_sparse()]
            junk = tensors[rng.integers(len(tensors))] if rng.integers(2) else JUNK[rng.integers(len(JUNK))]
            every = list(places(content))
            torch.save(put(rng, content, every[rng.integers(len(every))], junk), path)
        else:
            return False
    except (TypeError, ValueError, UnicodeError, SafetensorError):  # what this kind of file cannot hold
        return False
    return True


def set_trap(rng: np.random.Generator, path: Path) -> None:
    if path.suffix in (".npy", ".npz"):
        np.save(path.with_suffix(".npy"), np.array([Trap()], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").replace(path)
    elif path.suffix in (".pt", ".pth", ".bin") and rng.integers(2):
        torch.save({"records": [Trap()], "logical_count": Trap()}, path)
    elif path.suffix in (".yaml", ".json", ".jsonl"):
        depth = int(rng.choice([900, 100_000]))
        hostile = ["!!python/object/apply:os.mkdir ['was-run']", "[" * depth, '{"a":' * depth, "1" * 10_000]
        path.write_text(str(rng.choice(hostile)))
    else:
        path.write_bytes(pickle.dumps(Trap()))


def sign_again(rng: np.random.Generator, folder: Path) -> None:
    """Give a changed profile the hashes that fit, so that what is behind them is checked too."""
    header = json.loads((folder / "profile.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    value = changed_json(rng, header) if rng.integers(2) else header
    try:
        value["files"] = files
        value["digest"] = content_digest(MoESpec.from_json(value["model"]), value["domains"], files)
        value["header_digest"] = header_digest(value)
    except Exception:
        pass
    (folder / "profile.json").write_text(json.dumps(value))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def late(_signal: int, _frame: object) -> None:
        raise AssertionError(f"hangs: {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_texts(name: str) -> None:
    """What `coterie profile` does before it has a model."""
    from profiler.batches import make_batches

    for batch in make_batches(read_documents([name]), tokenizer(), 32, 4):
        assert batch.input_ids.ndim == 2


def read_chats(name: str) -> None:
    """What `coterie finetune --instructions` does before it trains."""
    loaded = LoadedModel("any", None, tokenizer())
    assert len(instruction_examples(loaded, read_conversations([Path(name)]), 64))


def read_constraint(name: str) -> None:
    """What `coterie finetune` and `quality` do before they have a model."""
    assert load_constraint(Path(name)).model.num_layers


READERS = {"texts": read_texts, "conversations": read_chats, "constraint": read_constraint}
"""In place of commands that would have to load a model first."""


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code; whatever `main` lets through comes out as it is.  Ranks are never started, and training steps only
    where they go on from a checkpoint, which is read then.
    """
    monkeypatch.setattr(sys, "argv", ["coterie", *command])
    monkeypatch.setattr(runtime_bench, "_run", lambda *_: None)  # as on a rank of torchrun that is not the first
    if "--resume" not in command:
        monkeypatch.setattr(finetuning, "train", lambda *_, **__: [1.0])
    if "--task" in command:  # listing all of the harness's own takes seconds, and it keeps data outside
        from datasets import config
        from lm_eval.tasks import TaskManager

        monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", Path.cwd().parent / "cache")
    try:
        if command[0] in READERS:
            monkeypatch.setattr(cli, "app", partial(READERS[command[0]], command[1]))
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        monkeypatch.undo()
    return 0


ENDINGS = (".partial", ".checkpoints")
"""Of what a run that was stopped leaves, to be gone on from."""


def names_of_output(command: list[str]) -> set[str]:
    """Those that a command may make, and that a run that was stopped may have left."""
    name = Path(command[command.index("-o") + 1]).parts[0] if "-o" in command else "out"
    return {name, *(f"{dot}{name}{ending}" for dot in ("", ".") for ending in ENDINGS)}


@pytest.mark.parametrize("kind", TARGETS)
def test_broken_files_are_one_line(kind, tmp_path, capsys):
    if kind in NEEDED:
        pytest.importorskip(NEEDED[kind])
    valid, commands, own = tmp_path / "valid", TARGETS[kind][1], list(TARGETS).index(kind)
    valid.mkdir()
    TARGETS[kind][0](valid)
    for number, command in enumerate(commands):  # else the cases below would prove nothing, and would compile
        here = shutil.copytree(valid, tmp_path / f"valid-{number}")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            with pytest.MonkeyPatch.context() as inner:
                assert run(command, inner) == 0, capsys.readouterr().err
    for case in range(own, NUM_CASES, len(TARGETS)):
        here = shutil.copytree(valid, tmp_path / str(case))
        fuzz(case, commands[case // len(TARGETS) % len(commands)], here, capsys)
        shutil.rmtree(here)


def test_the_normal_run_meets_every_command():
    assert 300 // len(TARGETS) >= max(len(commands) for _, commands in TARGETS.values())


def fuzz(case: int, command: list[str], here: Path, capsys: Any) -> None:
    rng = np.random.default_rng(case)
    files = sorted(path for path in here.rglob("*") if path.is_file() and not path.name.endswith(".provenance.json"))
    own = names_of_output(command)
    read = [
        path
        for path in files
        if any(path.is_relative_to(here / word) for word in command) or path.relative_to(here).parts[0] in own
    ]
    path = read[rng.integers(len(read))]
    how = rng.integers(10)
    if how == 0:
        set_trap(rng, path)
    elif how < 4 or not mutate_content(rng, path):
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    if how > 6 and path.parent.suffix == ".profile" and path.name != "profile.json":
        sign_again(rng, path.parent)
    before = contents(here)
    (here / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch, no_longer_than(SECONDS):
        patch.chdir(here)
        try:
            with pytest.MonkeyPatch.context() as inner:
                code = run(command, inner)
        except BaseException as error:
            raise AssertionError(f"case {case}, {' '.join(command)}, {path.name}: {error!r}") from error
    said = capsys.readouterr().err
    assert code in (0, 1), (case, said)
    after = contents(here)
    assert not (here / "was-run").exists(), case
    if code == 1:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (case, said)
        assert said.rstrip("\n").endswith(errors[0]), (case, said)
        assert after == before, (case, said)  # what a stopped run has left is there to be mended, or to be removed
        assert not list((here / "out").iterdir()), (case, said)
    else:
        rest, was = (
            {name: files[name] for name in files if Path(name).parts[0] not in own} for files in (after, before)
        )
        assert rest == was, case
        assert not [path.name for path in here.iterdir() if path.name in own and path.name.endswith(ENDINGS)], case
