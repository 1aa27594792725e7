"""Disks that are full, or that nothing may be written to: one line, exit code 1, and nothing left that is not whole.

Real ones, a tmpfs that is smaller than the result and a read-only mount, in a mount namespace of one process that runs
every command that writes, one after another: importing takes longer than all of them.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids
from test_engine_mistakes import write_valid
from test_fuzz import a_permuted_model, contents, what_runs_a_model
from test_report import bench_result

from placement import cli
from placement.runtime import bench as runtime_bench
from profiler import Profile

ROOT = Path(__file__).parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")
"""What a file on a tmpfs takes at the least."""
SPLIT = "profile split run.profile --by domain -o out"
"""The one command whose result is several: those that are whole stay."""
TUNE = "finetune tiny/model --data short.txt --held-out short.txt --steps 1 --save-steps 0 -o out/tuned"
COMMANDS = [
    "profile tiny/model --data short.txt --sequence-length 16 -o out/run.profile",
    "profile tiny/model --data short.txt --similarity out/alike.safetensors -o other.profile",
    "profile merge run.profile more.profile -o out/merged.profile",
    SPLIT,
    "import numpy r.npy -o out/run.profile",
    "import vllm vllm --num-experts 8 --top-k 2 -o out/run.profile",
    "plan run.profile --ranks 2 --kicks 1 -o out/plan.json",
    "constrain run.profile --plan plan.json --limit 1 -o out/limit.safetensors",
    "export plan.json --to sglang -o out/experts.json",
    "export plan.json --to tensorrt-llm -o out/experts.yaml",
    "export plan.json --to vllm -o out/experts.json",
    "export plan.json --to vllm-ascend -o out/experts.json",
    "export plan.json --to eplb -o out/experts.safetensors",
    "export tiny/plan.json --to checkpoint --model tiny/model -o out/planned",
    "export tiny/plan.json --to checkpoint --invert --model tiny/planned -o out/restored",
    "bench plan.json -o out/bench.json",
    "bench plan.json --figure out/bench.png",
    "report run.profile plan.json --no-study -o out/page.html",
    "codesign tiny/model --data short.txt --ranks 2 --top-t 3 --rounds 1 -o out",
    TUNE,
]


def put_inputs(here: Path) -> None:
    what_runs_a_model(here)
    (here / "tiny").mkdir()
    a_permuted_model(here / "tiny")
    recorded = Profile.load_from(here / "run.profile")
    reversed_ids = recorded.require_tokens().topk_ids[:, ::-1]
    tokens = replace(recorded.require_tokens(), topk_ids=reversed_ids)
    Profile.from_tokens(recorded.model, recorded.domains, tokens, {}).save(here / "more.profile")
    np.save(here / "r.npy", random_ids(0, 2, 60, 8, 2).transpose(1, 0, 2))
    (here / "vllm").mkdir()
    write_valid("vllm", here / "vllm")


def run(command: str) -> tuple[int | None, str]:
    """Exit code and stderr; None and a traceback for what `main` lets through."""
    said = io.StringIO()
    sys.argv = ["coterie", *shlex.split(command)]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
        except BaseException:
            return None, said.getvalue() + traceback.format_exc()
    return 0, said.getvalue()


@contextlib.contextmanager
def mounted(out: Path, *options: str):
    subprocess.run(["mount", *options, out], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", out], check=True)


def on_mounts() -> None:
    """Every command on every mount; writes what came of it.  In a mount namespace, in an empty folder."""
    here, out = Path.cwd(), Path.cwd() / "out"
    put_inputs(here)
    runtime_bench.bench = lambda *_: bench_result(2)
    results = {}
    for command in COMMANDS:
        out.mkdir()
        code, said = run(command)
        assert code == 0, said
        whole = {path.name: contents(path) for path in out.iterdir() if path.is_dir()}
        pages = sum(-(-path.stat().st_size // PAGE) for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        out.mkdir()

        def outcome(command: str = command, whole: dict = whole) -> list:
            code, said = run(command)
            for part in list(out.iterdir()) if command == SPLIT else ():
                if contents(part) == whole.get(part.name):
                    shutil.rmtree(part)
            return [code, said, sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.name != "filler")]

        results[command] = {"full": [], "read-only": []}
        for free in sorted({0, pages // 3, pages - 1}):
            with mounted(out, "-t", "tmpfs", "-o", f"size={(1 + free) * PAGE}", "none"):
                (out / "filler").write_bytes(bytes([1]) * PAGE)  # a tmpfs has a page at least
                results[command]["full"].append(outcome())
        with mounted(out, "--bind", out):
            subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
            results[command]["read-only"].append(outcome())
        out.rmdir()
    (here / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    here = tmp_path_factory.mktemp("mounts")
    allowed = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("unshare") and shutil.which("mount")
    trial = ["unshare", "-m", "mount", "-t", "tmpfs", "none", here]
    if not allowed or subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("needs root on Linux, and leave to mount")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", "import test_full_disk; test_full_disk.on_mounts()"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((here / "results.json").read_text())


@pytest.mark.parametrize(
    ("disk", "message"), [("full", "No space left on device"), ("read-only", "no writable folder")]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_line_and_nothing_left(results, command, disk, message):
    for code, said, left in results[command][disk]:
        assert code == 1, said
        *notes, last = said.strip().splitlines()
        assert last.startswith("error: "), said
        assert message in last
        assert not [line for line in notes if line.startswith(("error: ", "Traceback"))], said
        assert left == [], said
