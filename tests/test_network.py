"""Hosts made of namespaces: what they send is counted, a pulled cable ends all ranks, and nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_spec
from test_membership import ROOT, WORKER, outcome

from placement.placement_map import PlacementMap
from placement.runtime.launch import run_on_ranks
from placement.runtime.network import CABLE, bytes_sent_by_interface, host_identity, hosts
from placement.topology import Topology
from profiler import CoterieError

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root and iproute2"
)
SENT = 2**20


def send_a_mebibyte(rank, _device, _arguments):
    before = bytes_sent_by_interface(CABLE)
    started = time.perf_counter()
    received = torch.empty(SENT, dtype=torch.uint8)
    halves = [SENT, 0] if rank else [0, SENT]
    dist.all_to_all_single(received, torch.zeros(SENT, dtype=torch.uint8), halves, halves)
    seconds = time.perf_counter() - started
    dist.barrier()
    return {"sent": bytes_sent_by_interface(CABLE) - before, "host": host_identity(), "seconds": seconds}


@needs_root
def test_hosts_have_interfaces_and_rates_of_their_own():
    with hosts(2, "40mbit") as network:
        made = {os.stat(host).st_ino for host in network.hosts}
        results = run_on_ranks(send_a_mebibyte, 2, {}, network.enter)
    assert len({result["host"] for result in results}) == 2
    for result in results:
        assert SENT < result["sent"] < 1.05 * SENT
        assert result["seconds"] > 0.1  # 0.21 s at the rate, less what the bucket lets through at once
    assert not namespaces() & made


@needs_root
@pytest.mark.parametrize("cut", ["from the start", "later"])
def test_a_pulled_cable_ends_all_ranks_with_a_line(cut):
    with hosts(3, "100mbit") as network:
        if cut == "from the start":
            network.cut(1)
        processes = [start_on(network, rank) for rank in range(3)]
        if cut == "later":
            for process in processes:
                assert process.stdout.readline().startswith("pid")
            network.cut(1)
        codes, lines, _ = outcome(processes, seconds=45)
    assert codes == [1, 1, 1], lines
    assert all(len(of_rank) == 1 for of_rank in lines), lines
    if cut == "later":
        assert all("rank 1 of 3 gave no sign of life" in lines[rank][0] for rank in (0, 2)), lines
        assert "rank 1 of 3" in lines[1][0]
    else:
        assert all("rank 1 of 3 did not join" in lines[rank][0] for rank in (0, 2)), lines
        assert "rank 1 of 3 cannot reach 10.77.0.1:29511" in lines[1][0]


def start_on(network, rank):
    environment = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "10.77.0.1"}
    environment |= {"MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": CABLE, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        ["nsenter", f"--net={network.hosts[rank]}", sys.executable, "-c", WORKER, "waits"],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def namespaces():
    """Network namespaces that any process is in, by their number."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.stat(link).st_ino)
        except OSError:  # it ended meanwhile
            continue
    return found


@needs_root
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_bench_that_is_ended_leaves_nothing(tmp_path, how):
    spec = make_spec(2, 8, 2)
    PlacementMap.linear(spec, Topology(1, 2, 4)).save(tmp_path / "plan.json")
    code = (
        "import signal, time, placement.runtime.network as network\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background may ignore it
        "from placement.runtime.launch import run_on_ranks\n"
        "from test_network import sleep\n"
        "if __name__ == '__main__':\n"
        "    with network.hosts(2, '100mbit') as made:\n"
        "        run_on_ranks(sleep, 2, {'path': __import__('sys').argv[1]}, made.enter)\n"
    )
    (tmp_path / "run.py").write_text(code)
    before = namespaces()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "pids"], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    process.send_signal(how)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or namespaces() - before:
        assert time.monotonic() < deadline, "ranks or namespaces are left"
        time.sleep(0.2)


def sleep(_rank, _device, arguments):
    with Path(arguments["path"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(120)
    return {}


@pytest.mark.parametrize("rate", ["fast", "400", "0mbit", "400mbit; reboot", "-1mbit"])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(CoterieError, match="must be a number and kbit, mbit or gbit"), hosts(2, rate):
        pass


def test_without_root_it_says_so(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/sbin/{tool}")
    with pytest.raises(CoterieError, match="only root may"), hosts(2, "400mbit"):
        pass


def test_without_iproute2_it_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _tool: None)
    with pytest.raises(CoterieError, match="install iproute2"), hosts(2, "400mbit"):
        pass
