"""Commands that are killed at a random moment: what was complete is not lost, running again finishes, nothing is left.

One kill a command in the normal run; COTERIE_FAULTS says another number (`make faults`: 20).  A kill that comes when a
command is done does not count.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids
from test_report import bench_result

from placement.placement_map import PlacementMap
from placement.runtime.results import BenchResult
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


def start(name: str, command: list[str], here: Path, mark: str) -> Any:
    """A process that has begun to work; one on hosts of its own has the first of them."""
    process = STARTER.Process(target=work, args=(command, here, mark))
    process.start()
    while name == ON_HOSTS and process.is_alive() and not namespaces([process.pid]):
        time.sleep(0.01)
    return process


def finish(name: str, command: list[str], here: Path, mark: str) -> float:
    """Run a command to its end; the seconds that took after it was started."""
    process = start(name, command, here, mark)
    started = time.monotonic()
    process.join(LIMIT)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    assert process.exitcode == 0, (here.parent / "said").read_text()
    return time.monotonic() - started


def kill_at_random(name: str, place: Path, mark: str, rng: np.random.Generator, seconds: float) -> set[str]:
    """End a command while it works, beside an older result; returns the network namespaces that it had made.

    Args:
        seconds: that it takes, about; where it is done, or done with its hosts, before it is killed, it begins again
            and has half as long.
    """
    for _ in range(30):
        shutil.rmtree(place, ignore_errors=True)
        prepare(place / "here")
        put_older(name, place / "here")
        process = start(name, COMMANDS[name], place / "here", mark)
        time.sleep(float(rng.uniform(0.0, 0.9 * seconds)))
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)  # so that it makes no namespace after these are read
        made = namespaces([process.pid])
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and bool(made) == (name == ON_HOSTS):
            return made
        assert process.exitcode in (0, -signal.SIGKILL), (place / "said").read_text()
        seconds /= 2
    raise AssertionError(f"{name}: is never seen at work")


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


def namespaces(of: list[int] | None = None) -> set[str]:
    """Network namespaces other than this process's that processes, all if None, are in or hold open."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*") if of is None else [Path("/proc", str(pid)) for pid in of]:
        with suppress(OSError):  # it has ended
            found.add(os.readlink(folder / "ns" / "net"))
            for file in (folder / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(file))
    return {name for name in found if name.startswith("net:[")} - {os.readlink("/proc/self/ns/net")}


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without what tells when a run was."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "profile.json":
                header = json.loads(data)
                data = json.dumps([header["files"], header["digest"], header["num_tokens"]]).encode()
            if path.name == "bench.json":  # its figures are never the same, but all of them are there
                data = BenchResult.load_from(path).model.encode()
            found[str(path.relative_to(folder))] = data.replace(str(folder).encode(), b"")
    return found


def within(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """A file, or those of a folder, by their names in it."""
    return {
        path.removeprefix(name): data for path, data in files.items() if path == name or path.startswith(f"{name}/")
    }


def require_complete(
    name: str, was: Mapping[str, bytes], left: Mapping[str, bytes], whole: Mapping[str, bytes]
) -> None:
    """What has the name of the result is all of the older or all of the new one, and all inputs are as they were."""
    out = COMMANDS[name][-1]
    older, found, new = (within(files, out) for files in (was, left, whole))
    if not found:  # between two renames
        found = within(left, f".{out}.replaced")
    elif found.get("/profile.json") == new.get("/profile.json"):
        found.pop("/checkpoint", None)  # goes last
    assert found in (older, new), sorted(found)
    unfinished = (f".{out}.", f"{out}.partial")
    inputs = {
        path: data for path, data in was.items() if path.partition("/")[0] != out and not path.startswith(unfinished)
    }
    assert {path: left.get(path) for path in inputs} == inputs
    more = [path for path in left.keys() - was.keys() if path.partition("/")[0] != out]
    assert all(path.startswith(unfinished) for path in more), more


SMALL = ["--max-tokens", "1500", "--sequence-length", "64", "--batch-size", "2"]
BENCH = ["--replay", "base.profile", "--hidden-size", "16", "--expert-size", "8", "--layers", "1", "--repeats", "1"]
TUNE = ["--steps", "4", "--batch-size", "1", "--sequence-length", "16", "--save-steps", "1"]
ON_HOSTS = "bench on hosts"
HAS_HOSTS = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
COMMANDS: dict[str, list[str]] = {
    "profile": ["profile", "--data", "texts", *SMALL, "--resume", "-o", "made.profile"],
    "plan": ["plan", "base.profile", "--ranks", "4", "-o", "made.json"],
    "export": ["export", "base.json", "--to", "checkpoint", "--model", "model", "-o", "made"],
    "export to a file": ["export", "base.json", "--to", "vllm", "-o", "made.json"],
    "finetune": ["finetune", *TUNE, "--data", "texts", "--held-out", "texts", "--held-out-tokens", "64", "-o", "made"],
    "bench": ["bench", "base.json", *BENCH, "--sequence-length", "16", "-o", "bench.json"],
    ON_HOSTS: ["bench", "base.json", *BENCH, "--sequence-length", "16", "--network", "1gbit", "-o", "bench.json"],
}
KILLED = {
    "bench": pytest.mark.skipif(bool(HAS_HOSTS), reason="is killed on hosts, which has all of this in it"),
    ON_HOSTS: pytest.mark.skipif(not HAS_HOSTS, reason="needs root and iproute2: no namespace was made"),
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
    elif name == "finetune":
        shutil.copytree(zoo.MODEL, here / "made")
        (here / "made" / "finetune.json").write_text(json.dumps({"model": "older"}))
    elif name == "export":  # never writes over one that is complete; this is what it does write over
        (here / "made").mkdir()
        (here / ".made.partial").mkdir()
        (here / ".made.partial" / "model.safetensors").write_bytes(b"half of")
    else:
        bench_result().save(here / "bench.json")


def again(name: str, here: Path) -> list[str]:
    """The command to run after a kill: `finetune --resume` is refused where there is nothing to go on from."""
    begun = (here / ".made.checkpoints" / "finetune.json").exists()
    done = (here / "made" / "finetune.json").exists() and "losses" in (here / "made" / "finetune.json").read_text()
    return [*COMMANDS[name], "--resume"] if name == "finetune" and (begun or done) else COMMANDS[name]


@pytest.mark.parametrize("name", [pytest.param(name, marks=KILLED.get(name, ())) for name in COMMANDS])
def test_killed_and_run_again(name, tmp_path):
    mark = f"{os.getpid()} {name}"
    prepare(tmp_path / "whole" / "here")
    if name in KILLED:  # starting ranks takes long
        seconds, whole = 10.0, contents(tmp_path / "whole" / "here") | {"bench.json": zoo.NAME.encode()}
    else:
        seconds = finish(name, COMMANDS[name], tmp_path / "whole" / "here", mark)
        whole = contents(tmp_path / "whole" / "here")
    rng = np.random.default_rng(len(name))
    for kill in range(NUM_KILLS):
        place = tmp_path / str(kill)
        here = place / "here"
        prepare(tmp_path / "was" / "here")
        put_older(name, tmp_path / "was" / "here")
        was = contents(tmp_path / "was" / "here")
        made = kill_at_random(name, place, mark, rng, seconds)
        require_complete(name, was, contents(here), whole)
        deadline = time.monotonic() + 30
        while processes(mark) or namespaces() & made:
            assert time.monotonic() < deadline, (kill, "ranks or namespaces are left")
            time.sleep(0.1)
        for folder in (place / "temporary").iterdir():
            os.utime(folder, (0, 0))  # as if an hour had gone
        if name != "export" or not within(contents(here), "made"):  # it never writes over a checkpoint that is complete
            took = finish(name, again(name, here), here, mark)
            seconds = took if name in KILLED else seconds
        assert contents(here) == whole, kill
        temporary = [path.name for path in (place / "temporary").iterdir()]
        assert not [name for name in temporary if not name.startswith("torchinductor")], kill  # torch's own cache
        shutil.rmtree(place)
        shutil.rmtree(tmp_path / "was")
