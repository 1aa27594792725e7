"""What a plan buys where ranks are hosts on a network: `sudo python -m benchmarks.network coterie-demo/plan.json`.

Each rank runs in a network namespace of its own, joined to the others by a bridge, both ends of every cable held to a
fixed rate.  Needs root, iproute2 and Linux; everything it makes is gone when it ends.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.record import write
from placement.placement_map import PlacementMap
from placement.runtime.bench import bench
from profiler import zoo
from profiler.calibration import read_documents

BRIDGE = "coterie-br"
RATES = ("400mbit", "2000mbit")
RUNS = 2


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def hosts(count: int, rate: str) -> Iterator[None]:
    """So many namespaces on one bridge, each cable limited at both ends."""
    shape = f"root tbf rate {rate} burst 256kb latency 200ms"
    try:
        run(f"ip link add {BRIDGE} type bridge")
        run(f"ip link set {BRIDGE} up")
        for host in range(count):
            run(f"ip netns add coterie{host}")
            run(f"ip link add coterie-v{host} type veth peer name eth0 netns coterie{host}")
            run(f"ip link set coterie-v{host} master {BRIDGE} up")
            inside = f"ip netns exec coterie{host}"
            run(f"{inside} ip addr add 10.77.0.{host + 1}/24 dev eth0")
            run(f"{inside} ip link set eth0 up")
            run(f"{inside} ip link set lo up")
            run(f"{inside} tc qdisc add dev eth0 {shape}")
            run(f"tc qdisc add dev coterie-v{host} {shape}")
        yield
    finally:
        for host in range(count):
            subprocess.run(["ip", "netns", "delete", f"coterie{host}"], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "link", "delete", f"coterie-v{host}"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, stderr=subprocess.DEVNULL)


def enter_host(rank: int) -> None:
    """Move this process into its rank's network namespace."""
    with Path(f"/run/netns/coterie{rank}").open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        clone_newnet = 0x40000000
        if libc.setns(namespace.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), "setns failed: run this as root")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def main(plan: Path) -> None:
    placement = PlacementMap.load_from(plan)
    rows = []
    for rate in RATES:
        for attempt in range(RUNS):
            with hosts(placement.topology.num_ranks, rate):
                documents = read_documents([zoo.HELD_OUT])
                result = bench(placement, None, documents, repeats=9, before_joining=enter_host)
            for row in result.rows:
                phases = (f"{phase.median:.0f}" for phase in (row.dispatch, row.expert, row.combine))
                total = f"{row.total.median:.0f} ({row.total.least:.0f} to {row.total.most:.0f})"
                sent = f"{row.bytes_sent / 1e6:.1f}"
                speed_up = f"{row.speed_up:.2f}"
                rows.append([rate, attempt + 1, row.implementation, row.map, sent, *phases, total, speed_up])
    write(
        "network",
        "A plan on a network",
        f"{placement.topology.num_ranks} hosts (network namespaces of one machine), the embedded model, "
        f"{result.tokens_per_rank} tokens a rank in one forward pass; milliseconds of the slowest rank, median of "
        f"{result.repeats} paired runs (least to most), speed-up of the total against the first row.",
        ("link", "run", "implementation", "map", "MB sent", "dispatch", "expert", "combine", "total", "speed-up"),
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
