"""A rank that fails, dies, is stopped or never comes: every process ends, soon, with a line that says which and why."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from placement.runtime.launch import run_on_ranks
from profiler import CoterieError

ROOT = Path(__file__).parents[1]
WORKER = """
import os, signal, sys, time
import torch, torch.distributed as dist
from placement.runtime.membership import joined
what = sys.argv[1]
with joined() as device:
    rank = dist.get_rank()
    print(f"pid {os.getpid()}", flush=True)
    dist.barrier()
    if rank == 1:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "raises":
            raise ValueError("the cable is out")
    if what == "waits":
        time.sleep(60)
    if what == "is slow" and rank == 1:
        time.sleep(2)
    dist.all_reduce(torch.zeros(1))
print("done", flush=True)
"""


def fail_on_rank_one(rank, _device, _arguments):
    if rank == 1:
        raise ValueError("the cable is out")
    dist.barrier()
    return {}


def die_on_rank_one(rank, _device, _arguments):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {}


def refuse_on_rank_one(rank, _device, _arguments):
    if rank == 1:
        raise CoterieError("7 experts: must be 8")
    dist.barrier()
    return {}


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (fail_on_rank_one, "^rank 1 of 2 failed: ValueError: the cable is out$"),
        (die_on_rank_one, "^rank 1 of 2 failed: died of SIGKILL$"),
        (refuse_on_rank_one, "^rank 1 of 2 failed: 7 experts: must be 8$"),
    ],
)
def test_a_failing_rank_is_one_line_and_leaves_no_file(worker, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CoterieError, match=message):
        run_on_ranks(worker, 2, {})
    assert not list(tmp_path.iterdir())


def start(rank, num_ranks, port, what, **environment):
    """One rank as torchrun would start it, but with nobody to end it."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": ROOT,
        "OMP_NUM_THREADS": 1,
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, what],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcome(processes, seconds=60):
    """Exit code and lines of `error: ` of each, all ended within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        ended = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in errors.splitlines() if line.startswith("error: ")] for _, errors in ended]
    return [process.returncode for process in processes], lines, [out for out, _ in ended]


def test_slow_ranks_are_waited_for():
    port = free_port()
    codes, lines, outs = outcome([start(rank, 3, port, "is slow") for rank in range(3)])
    assert codes == [0, 0, 0], lines
    assert all("done" in out for out in outs)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("dies", "rank 1 of 3 gave no sign of life"),
        ("stops", "rank 1 of 3 gave no sign of life"),
        ("raises", "rank 1 of 3 failed: ValueError: the cable is out"),
    ],
)
def test_the_others_end_when_one_is_lost(what, expected):
    port = free_port()
    processes = [start(rank, 3, port, what) for rank in range(3)]
    others = [processes[0], processes[2]]
    codes, lines, _ = outcome(others)
    processes[1].kill()
    processes[1].communicate()
    assert codes == [1, 1]
    for of_rank in lines:
        assert len(of_rank) == 1
        assert expected in of_rank[0]


def test_a_rank_that_never_comes_is_named():
    port = free_port()
    codes, lines, _ = outcome([start(rank, 3, port, "") for rank in (0, 2)])
    assert codes == [1, 1]
    assert all("rank 1 of 3 did not join within 20 s" in of_rank[0] for of_rank in lines), lines


def test_a_rank_that_reaches_nobody_says_so():
    codes, lines, _ = outcome([start(1, 3, free_port(), "")])
    assert codes == [1]
    assert "rank 1 of 3 cannot reach 127.0.0.1:" in lines[0][0]
