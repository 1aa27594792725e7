"""The same seed gives the same bytes: in another process, with other numbers of threads, with other hashes of strings.

Fine-tuned weights are the same for the same number of threads only: torch sums gradients thread by thread.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from profiler import zoo

COMMANDS = """
profile --data texts --max-tokens 2000 --sequence-length 64 --max-traced-tokens 1500 --seed 3 -o run.profile
profile merge run.profile run.profile -o merged.profile
profile split run.profile --by domain -o parts
plan run.profile --ranks 4 --nodes 2 --links h100 --kicks 1 --seed 3 -o plan.json
plan run.profile --ranks 4 --redundant-experts 8 --strategy load --kicks 1 --seed 3 -o copies.json
constrain run.profile --plan plan.json --limit 2 -o limit.safetensors
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
import sys
import torch
from placement import cli
threads = int(sys.argv[2])
for command in open(sys.argv[1]):
    torch.set_num_threads(1 if command.startswith("finetune") else threads)  # its sums of gradients depend on them
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
        if path.is_file() and not name.startswith(("model/", "texts/")):
            data = path.read_bytes().replace(str(folder).encode(), b"")
            if path.name == "profile.json":
                header = json.loads(data)
                del header["header_digest"], header["provenance"]
                data = json.dumps(header).encode()
            found[name] = data
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one process makes with one thread and what another makes with two."""
    (tmp_path_factory.mktemp("commands") / "list").write_text(COMMANDS.strip().replace("\\\n", "") + "\n")
    commands, out = tmp_path_factory.getbasetemp() / "commands0" / "list", []
    for threads in ("1", "2"):
        here = tmp_path_factory.mktemp(f"threads-{threads}")
        shutil.copytree(zoo.MODEL, here / "model")
        (here / "texts").mkdir()
        for name in ("python", "novels"):
            text = (zoo.HELD_OUT / f"{name}.txt").read_text(encoding="utf-8")
            (here / "texts" / f"{name}.txt").write_text(text[:5000], encoding="utf-8")
        environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run(
            [sys.executable, "-c", RUN, commands, threads],
            cwd=here,
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            timeout=300,
        )
        out.append(contents(here))
    return out


def test_same_seed_same_bytes(made):
    one, two = made
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    for name in ("run.profile/counts.safetensors", "plan.json", "planned/model.safetensors", "tuned/model.safetensors"):
        assert name in one
