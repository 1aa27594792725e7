"""Several hosts on one Linux machine: a network namespace each, joined by a switch, every cable held to a rate.

    with hosts(4, "400mbit") as network:
        run_on_ranks(worker, 4, arguments, network.enter)

Nothing has a name and nothing is put into the machine's own network: namespaces, cables and switch are held by open
files of this process alone, so they are gone when it and what it started have ended, however they did.  Needs Linux,
root and iproute2.  Knows nothing of models or maps.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from profiler.errors import CoterieError

CABLE = "eth0"
"""The interface of each host."""

_T = TypeVar("_T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_OWN_NAMESPACE = "/proc/thread-self/ns/net"


@dataclass(frozen=True)
class Network:
    """Hosts that are joined.

    Attributes:
        hosts: for each, the path by which other processes enter its namespace.
        ranks_per_host: consecutive ranks that share one.
    """

    hosts: tuple[str, ...]
    ranks_per_host: int

    def enter(self, rank: int) -> None:
        """Move this thread, and all that it starts from now on, to a rank's host."""
        with Path(self.hosts[rank // self.ranks_per_host]).open() as namespace:
            _system_call("setns", namespace.fileno())
        os.environ["GLOO_SOCKET_IFNAME"] = CABLE

    def cut(self, host: int) -> None:
        """Pull the cable of a host."""
        _in_namespace(self.hosts[host], partial(_run, f"ip link set {CABLE} down"))


@contextmanager
def hosts(count: int, rate: str, ranks_per_host: int = 1) -> Iterator[Network]:
    """So many hosts 10.77.0.1, 10.77.0.2, ..., each with a cable of this rate both ways.

    Args:
        rate: as `tc` takes it, such as 400mbit or 2gbit.

    Raises:
        CoterieError: the rate is none, or this machine does not let us.
    """
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[kmg]bit", rate):
        raise CoterieError(f"network rate {rate!r}: must be a number and kbit, mbit or gbit, such as 400mbit")
    _require_tools()
    # A bucket of a few large packets, and a queue that holds what senders have under way.
    shape = f"root tbf rate {rate} burst 256kb latency 200ms"
    with ExitStack() as held:
        switch, *inside = [held.enter_context(_namespace()) for _ in range(count + 1)]
        _in_namespace(switch, partial(_run, "ip link add switch type bridge", "ip link set switch up"))
        for number, host in enumerate(inside, 1):
            port = f"port{number}"
            _in_namespace(
                switch,
                partial(
                    _run,
                    f"ip link add {port} type veth peer name {CABLE} netns {host}",
                    f"ip link set {port} master switch up",
                    f"tc qdisc add dev {port} {shape}",
                ),
            )
            _in_namespace(
                host,
                partial(
                    _run,
                    f"ip addr add 10.77.0.{number}/24 dev {CABLE}",
                    f"ip link set {CABLE} up",
                    "ip link set lo up",
                    f"tc qdisc add dev {CABLE} {shape}",
                ),
            )
        yield Network(tuple(inside), ranks_per_host)


def interface_name() -> str | None:
    """The interface that gloo or NCCL was told to use, or None."""
    return os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")


def bytes_sent_by_interface(name: str) -> int | None:
    """What the interface of this host has sent since it came up, headers included; None where Linux does not say."""
    try:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        device, colon, figures = line.partition(":")
        if colon and device.strip() == name:
            return int(figures.split()[8])  # the first eight are of what was received
    return None


def host_identity() -> str:
    """The same for all ranks whose interfaces are the same."""
    parts = [os.uname().nodename]  # containers on several machines may share it, and the first namespace its number
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.stat(_OWN_NAMESPACE).st_ino)]
    return "/".join(parts)


def _require_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise CoterieError(f"{missing[0]}: no such command; install iproute2, or leave --network out")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise CoterieError("--network makes network namespaces, which only root may; run with sudo or leave it out")


@contextmanager
def _namespace() -> Iterator[str]:
    """A new network namespace that lives as long as a file stays open; yields the file's path."""

    def make() -> int:
        _system_call("unshare", _CLONE_NEWNET)
        return os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)

    descriptor = _on_a_thread(make)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _in_namespace(path: str, action: Callable[[], None]) -> None:
    def enter() -> None:
        with Path(path).open() as namespace:
            _system_call("setns", namespace.fileno())
        action()

    _on_a_thread(enter)


def _on_a_thread(action: Callable[[], _T]) -> _T:
    """A thread's namespace is its own, so it is entered on one that ends with it."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(action).result()


def _run(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise CoterieError(f"{command}: {done.stderr.strip() or done.returncode}; is this a full Linux, and root?")


def _system_call(name: str, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, name)
    if call(argument, _CLONE_NEWNET) if name == "setns" else call(argument):
        reason = os.strerror(ctypes.get_errno())
        raise CoterieError(f"{name}: {reason}; network namespaces need root (in a container, the right CAP_SYS_ADMIN)")
