"""The same seed gives the same bytes: in another process, with other numbers of threads, with other hashes of strings.

Fine-tuned weights, routers' weights and how alike experts are stay the same for the same number of torch's threads
only: others sum in another order, and the last bits differ.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids
from test_engine_mistakes import write_valid
from tiny_models import tiny_model
from transformers import AutoTokenizer

from profiler import zoo
from profiler.counts import TOKENS_WORTH_THREADS

ENGINES = ("per_token", "vllm", "raw", "megatron")
"""Whose recordings are imported."""
INPUTS = tuple(f"{name}/" for name in ("model", "tiny", "texts", *ENGINES))
OF_TORCH = ("finetune", "profile --weights")
"""Commands whose figures' last bits go by torch's threads."""

COMMANDS = """
profile --data texts --max-tokens 2000 --sequence-length 64 --max-traced-tokens 1500 --seed 3 -o run.profile
profile split run.profile --by domain -o parts
plan run.profile --ranks 4 --nodes 2 --links h100 --kicks 1 --seed 3 -o plan.json
plan run.profile --ranks 4 --redundant-experts 8 --strategy load --kicks 1 --seed 3 -o copies.json
plan run.profile --ranks 4 --redundant-experts 8 --kicks 1 --seed 3 -o annealed.json
constrain run.profile --plan plan.json --limit 2 -o limit.safetensors
constrain run.profile --method c2r --top-t 16 -o lists.safetensors
constrain run.profile --plan plan.json --method c2r --top-t 16 -o aware.safetensors
profile --weights --data texts --max-tokens 1000 --sequence-length 64 --decode-tokens 3 --seed 3 \
--similarity alike.safetensors -o decoded.profile
profile merge run.profile decoded.profile -o merged.profile
constrain run.profile --plan plan.json --method similarity --similarity alike.safetensors --limit 2 \
-o alike-limit.safetensors
codesign tiny --data texts --max-tokens 500 --ranks 2 --top-t 3 --rounds 2 --seed 3 -o codesigned
import numpy many.npz --hidden-size 32 --expert-size 16 -o many.profile
import sglang per_token --num-hidden-layers 2 -o sglang.profile
import vllm vllm --num-experts 8 --top-k 2 -o vllm.profile
import tensorrt-llm raw -o trt.profile
import megatron megatron --num-experts 8 -o megatron.profile
plan many.profile --ranks 2 --kicks 2 --seed 3 --compare -o compared.json
plan many.profile --ranks 2 --seed 3 --strategy occult -o occult.json
plan many.profile --ranks 2 --seed 3 --strategy metis -o metis.json
plan many.profile --ranks 2 --seed 3 --strategy spectral -o spectral.json
plan many.profile --ranks 2 --seed 3 --strategy quadratic -o quadratic.json
plan many.profile --ranks 2 --seed 3 --strategy partitioning -o partitioning.json
report many.profile compared.json -o studied.html
export plan.json --to sglang -o sglang.json
export plan.json --to tensorrt-llm -o trt.yaml
export plan.json --to vllm -o vllm.json
export plan.json --to vllm-ascend -o ascend.json
export copies.json --to eplb -o eplb.safetensors
export plan.json --to checkpoint --model model -o planned
report run.profile plan.json --no-study -o page.html
finetune model --data texts --steps 2 --batch-size 2 --sequence-length 32 --constraint limit.safetensors --no-plain \
--held-out texts --held-out-tokens 64 -o tuned
"""
RUN = """
import os
import sys
commands, threads, *of_torch = sys.argv[1:]
os.cpu_count = lambda: int(threads)  # which the pools of planner and counter go by
import torch
from placement import cli
for command in open(commands):
    torch.set_num_threads(1 if command.startswith(tuple(of_torch)) else int(threads))
    sys.argv = ["coterie", *command.split()]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, command
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the inputs, without the moment of the recording and the place."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(INPUTS):
            data = path.read_bytes().replace(str(folder).encode(), b"")
            if path.name == "profile.json":
                header = json.loads(data)
                del header["header_digest"], header["provenance"]
                data = json.dumps(header).encode()
            found[name] = data
    return found


def put_inputs(here: Path) -> None:
    """The same at every call."""
    shutil.copytree(zoo.MODEL, here / "model")
    tokenizer = AutoTokenizer.from_pretrained(zoo.MODEL)
    tiny_model("olmoe", vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=None).save_pretrained(here / "tiny")
    tokenizer.save_pretrained(here / "tiny")
    (here / "texts").mkdir()
    for name in ("python", "novels"):
        text = (zoo.HELD_OUT / f"{name}.txt").read_text(encoding="utf-8")
        (here / "texts" / f"{name}.txt").write_text(text[:5000], encoding="utf-8")
    ids = random_ids(0, 3, TOKENS_WORTH_THREADS * 5 // 4, 8, 2).transpose(1, 0, 2)
    sequences = np.arange(len(ids)) // 64
    domains = (sequences % 10 == 0).astype(np.uint8)  # of the first, tokens that are worth several threads
    names, experts = np.array(["most", "few"]), np.array(8)
    np.savez(
        here / "many.npz",
        topk_ids=ids,
        sequence_ids=sequences,
        domain_ids=domains,
        domain_names=names,
        num_experts=experts,
    )
    for engine in ENGINES:
        (here / engine).mkdir()
        write_valid(engine, here / engine)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one process makes with one thread and what another makes with two."""
    (tmp_path_factory.mktemp("commands") / "list").write_text(COMMANDS.strip().replace("\\\n", "") + "\n")
    commands, out = tmp_path_factory.getbasetemp() / "commands0" / "list", []
    for threads in ("1", "2"):
        here = tmp_path_factory.mktemp(f"threads-{threads}")
        put_inputs(here)
        environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run(
            [sys.executable, "-c", RUN, commands, threads, *OF_TORCH],
            cwd=here,
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            timeout=1200,
        )
        out.append(contents(here))
    return out


def test_same_seed_same_bytes(made):
    one, two = made
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    for name in ("run.profile/counts.safetensors", "plan.json", "planned/model.safetensors", "tuned/model.safetensors"):
        assert name in one
