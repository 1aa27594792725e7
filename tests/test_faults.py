"""Commands that are killed at a random moment: nothing that was complete is lost, running again finishes, nothing is left.

One kill a command in the normal run; COTERIE_FAULTS says another number (`make faults`: 20).
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids

from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler import Profile, zoo

NUM_KILLS = int(os.environ.get("COTERIE_FAULTS", "1"))
LIMIT = 240
"""Seconds after which a command hangs."""

# Processes that have imported what takes seconds, so that kills hit the work.
STARTER = multiprocessing.get_context("forkserver")
STARTER.set_forkserver_preload(
    [
        "placement.cli",
        "placement.solvers",
        "profiler.loading",
        "transformers.models.auto.modeling_auto",
        "transformers.models.olmoe.modeling_olmoe",
        "transformers.trainer",
    ]
)


def work(command: list[str], here: Path, mark: str) -> None:
    """Be the command line, in a folder and with a folder for temporary files."""
    os.chdir(here)
    os.environ["COTERIE_FAULT"] = mark  # ranks have it from here
    os.environ["TMPDIR"], tempfile.tempdir = str(here.parent / "temporary"), None
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(here.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    import profiler.writer
    from placement import cli

    torch.set_num_threads(1)

    profiler.writer.CHECKPOINT_SECONDS, profiler.writer.CHECKPOINT_SHARE = 0.1, 1e9
    sys.argv = ["coterie", *command]
    cli.main()


def start(command: list[str], here: Path, mark: str) -> Any:
    process = STARTER.Process(target=work, args=(command, here, mark))
    process.start()
    return process


def finish(command: list[str], here: Path, mark: str) -> float:
    """Run a command to its end; the seconds that took."""
    started = time.monotonic()
    process = start(command, here, mark)
    process.join(LIMIT)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    assert process.exitcode == 0, (here.parent / "said").read_text()
    return time.monotonic() - started


def processes(mark: str) -> list[int]:
    """Those that a command has started, such as its ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"COTERIE_FAULT={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def namespaces() -> set[int]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(link.stat().st_ino)
        except OSError:
            continue
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without what tells when a run was."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "profile.json":
                header = json.loads(data)
                data = json.dumps([header["files"], header["digest"], header["num_tokens"]]).encode()
            name = str(path.relative_to(folder))
            found[name] = b"" if name == "bench.json" else data.replace(str(folder).encode(), b"")
    return found


SMALL = ["--max-tokens", "1500", "--sequence-length", "64", "--batch-size", "2"]
BENCH = ["--replay", "base.profile", "--hidden-size", "16", "--expert-size", "8", "--layers", "1", "--repeats", "1"]
TUNE = ["--steps", "4", "--batch-size", "1", "--sequence-length", "16", "--save-steps", "1"]
NETWORK = ["--network", "1gbit"] if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("tc") else []
COMMANDS: dict[str, list[str]] = {
    "profile": ["profile", "--data", "texts", *SMALL, "--resume", "-o", "made.profile"],
    "plan": ["plan", "base.profile", "--ranks", "4", "-o", "made.json"],
    "export": ["export", "base.json", "--to", "checkpoint", "--model", "model", "-o", "made"],
    "export to a file": ["export", "base.json", "--to", "vllm", "-o", "made.json"],
    "finetune": ["finetune", *TUNE, "--data", "texts", "--held-out", "texts", "--held-out-tokens", "64", "-o", "made"],
    "bench": ["bench", "base.json", *BENCH, "--sequence-length", "16", *NETWORK, "-o", "bench.json"],
}


def prepare(here: Path) -> None:
    """What the commands read."""
    here.mkdir(parents=True)
    (here.parent / "temporary").mkdir()
    spec = replace(make_spec(4, 64, 8), name=zoo.NAME)  # as an older recording of the same model
    trace = make_trace(random_ids(0, 4, 400, 64, 8), num_sequences=8)
    Profile.from_tokens(spec, ["prose", "code"], trace, {"made": "up"}).save(here / "base.profile")
    rows = np.stack([np.random.default_rng(layer).permutation(64) for layer in range(4)])
    PlacementMap(spec, Topology(1, 2, 32), rows, {"name": "any"}).save(here / "base.json")
    shutil.copytree(zoo.MODEL, here / "model")
    (here / "texts").mkdir()
    for name in ("python", "novels"):
        text = (zoo.HELD_OUT / f"{name}.txt").read_text(encoding="utf-8")
        (here / "texts" / f"{name}.txt").write_text(text[:4000], encoding="utf-8")


def put_older(name: str, here: Path) -> None:
    """A complete result of that name, which must not be lost."""
    if name == "profile":
        shutil.copytree(here / "base.profile", here / "made.profile")
    elif name in ("plan", "export to a file"):
        shutil.copyfile(here / "base.json", here / "made.json")


def again(name: str, here: Path) -> list[str]:
    """The command to run after a kill: `finetune --resume` is refused where there is nothing to go on from."""
    begun = (here / ".made.checkpoints" / "finetune.json").exists() or (here / "made").exists()
    return [*COMMANDS[name], "--resume"] if name == "finetune" and begun else COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(name, tmp_path):
    mark = f"{os.getpid()} {name}"
    prepare(tmp_path / "whole" / "here")
    if name == "bench":  # its figures are never the same, and starting ranks takes long
        seconds, whole = 10.0, contents(tmp_path / "whole" / "here") | {"bench.json": b""}
    else:
        seconds = finish(COMMANDS[name], tmp_path / "whole" / "here", mark)
        whole = contents(tmp_path / "whole" / "here")
    before = namespaces()
    rng = np.random.default_rng(len(name))
    for kill in range(NUM_KILLS):
        place = tmp_path / str(kill)
        here = place / "here"
        prepare(here)
        put_older(name, here)
        was = contents(here)
        process = start(COMMANDS[name], here, mark)
        time.sleep(float(rng.uniform(0.0, seconds)))
        process.kill()
        process.join()
        left = contents(here)
        for path in was.keys() - left.keys():  # between two renames it has the other name
            assert left[".made.profile.replaced" + path.removeprefix("made.profile")] == was[path], (kill, path)
        for path, data in left.items():  # what has its name is as it was or as it shall be
            unfinished = path.startswith(".") or path.startswith("made.profile.partial")
            assert unfinished or data in (was.get(path), whole.get(path)), (kill, path)
        deadline = time.monotonic() + 30
        while processes(mark) or namespaces() - before:
            assert time.monotonic() < deadline, (kill, "ranks or namespaces are left")
            time.sleep(0.1)
        for folder in (place / "temporary").iterdir():
            os.utime(folder, (0, 0))  # as if an hour had gone
        if name != "export" or not (here / "made").exists():  # it never writes over a checkpoint that is complete
            finish(again(name, here), here, mark)
        assert contents(here) == whole, kill
        temporary = [path.name for path in (place / "temporary").iterdir()]
        assert not [name for name in temporary if not name.startswith("torchinductor")], kill  # torch's own cache
        shutil.rmtree(place)
