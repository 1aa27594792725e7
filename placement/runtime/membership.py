"""Joining a group of ranks, and leaving it together: a rank that fails, dies or cannot be reached ends all of them.

A collective of torch.distributed waits for minutes or hours for a rank that is gone.  Here each rank gives a sign of
life to the group's store once a second and looks for those of the others, so that everyone ends within 30 seconds, with
one line that says which rank and why.  Knows nothing of models or maps.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from profiler.errors import CoterieError

JOIN_SECONDS = 20.0
"""How long ranks wait for each other at the start."""

SILENCE_SECONDS = 12.0
"""How long a rank may give no sign of life; the thread that gives it does not wait for computations."""

LONGEST_WAIT = timedelta(hours=2)
"""For collectives, once all ranks are there: a rank may load or save for long while others wait for it."""

_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Socket", "NCCL", "recv")
"""Words in the errors of collectives that another rank's end breaks."""


def _of_this_attempt(name: str) -> str:
    """A name in the store, which torchrun keeps, with what is in it, when it starts all ranks again."""
    return f"{name} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class RankLostError(CoterieError):
    """A rank that did not come, failed or went; the message names it."""


class Membership:
    """One rank's part in a group: signs of life, and what became of the others."""

    def __init__(self, store: Store, rank: int, num_ranks: int, on_loss: Callable[[str], None]) -> None:
        """Take part; `on_loss` is called on a thread with one line when another rank is lost."""
        self.store, self.rank, self.num_ranks = PrefixStore(_of_this_attempt("coterie"), store), rank, num_ranks
        self._on_loss = on_loss
        self._own = threading.Lock()  # held by whoever reports
        self._stopped = threading.Event()
        self._parent = os.getppid()
        of_its_own: Any = store  # a store serves one thread at a time; its stub knows no clone
        watched = PrefixStore(_of_this_attempt("coterie"), of_its_own.clone())
        self._looks = 0
        self._threads = [
            threading.Thread(target=self._watch, args=(watched,), daemon=True),
            threading.Thread(target=self._guard, daemon=True),
        ]

    def await_all(self, word: str, seconds: float) -> None:
        """Post a word and wait until every rank has.

        Raises:
            CoterieError: some have not.
        """
        missing = list(range(self.num_ranks))
        deadline = time.monotonic() + seconds
        try:
            self.store.set(f"{word}/{self.rank}", "1")
            while time.monotonic() < deadline:
                missing = [rank for rank in missing if not self.store.check([f"{word}/{rank}"])]
                if not missing:
                    return
                time.sleep(0.02)
        except RuntimeError:  # the rank that keeps the store waited no longer
            pass
        raise RankLostError(
            f"{_ranks(missing, self.num_ranks)} did not join within {seconds:g} s; "
            "look at what it printed, and whether it was started and can reach the first rank's host"
        )

    def start(self) -> None:
        """Begin to give signs of life and to look for those of the others."""
        for thread in self._threads:
            thread.start()

    def explain(self, error: BaseException) -> RankLostError | None:
        """Tell the others of a failure here; if another rank's end was its cause, who that was and why."""
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
        if lost:
            # Whoever failed first says so at once; whoever died is found by its silence.
            deadline = time.monotonic() + SILENCE_SECONDS + 8  # its thread may get little of a busy processor
            while time.monotonic() < deadline and not self._stopped.is_set():
                time.sleep(0.05)
            if self._stopped.is_set():  # the thread has found out, and ends this process
                time.sleep(5)
        self._own.acquire()
        self._stopped.set()
        try:
            self.store.set(f"failed/{self.rank}", describe(error))
            self.store.add("failures", 1)
        except RuntimeError:  # the store went with the rank that kept it
            pass
        if lost:
            return RankLostError(f"rank {self.rank} of {self.num_ranks} lost another rank: {describe(error)}")
        return None

    def leave(self) -> None:
        """Wait until all ranks are done, then take part no more."""
        self.store.set(f"left/{self.rank}", "1")
        while not all(self.store.check([f"left/{rank}"]) for rank in range(self.num_ranks)):
            time.sleep(0.02)
        self._stopped.set()
        if self.rank == 0:
            time.sleep(0.2)  # the others look a last time at the store, which this process may keep

    def _watch(self, store: Store) -> None:
        beats: dict[int, bytes] = {}
        heard = dict.fromkeys(range(self.num_ranks), time.monotonic())
        beat = 0
        while not self._stopped.is_set():
            try:
                loss = self._look(store, beat, beats, heard)
            except RuntimeError as error:
                loss = (
                    f"rank {self.rank} of {self.num_ranks} cannot reach the group's store any more: {describe(error)}"
                )
            if os.getppid() != self._parent:
                loss = f"rank {self.rank} of {self.num_ranks}: the process that started it is gone"
            if loss:
                self._pass_on(store, loss)
                self._report(loss)
                return
            self._looks += 1
            beat += 1
            self._stopped.wait(0.5 if beat < 20 else 1.0)

    def _guard(self) -> None:
        """A store whose host is out of reach does not answer, and looking at it waits for good."""
        seen, silent = 0, 0.0
        while not self._stopped.wait(1.0):
            # Seconds are counted, not read from a clock, since one call may keep all threads from running for long.
            seen, silent = self._looks, silent + 1 if self._looks == seen else 0.0
            if silent >= SILENCE_SECONDS:
                self._report(
                    f"rank {self.rank} of {self.num_ranks} cannot reach the group's store any more: "
                    f"no answer for {SILENCE_SECONDS:g} s"
                )
                return

    def _pass_on(self, store: Store, loss: str) -> None:
        """Let the others say the same, before this process ends and perhaps takes the store with it."""
        try:
            store.set("lost", loss)
            store.add("failures", 1)
        except RuntimeError:  # it is gone already
            return
        if self.rank == 0:
            time.sleep(2.5)  # they look once a second

    def _report(self, loss: str) -> None:
        if self._own.acquire(blocking=False) and not self._stopped.is_set():
            self._stopped.set()
            self._on_loss(loss)

    def _look(self, store: Store, beat: int, beats: dict[int, bytes], heard: dict[int, float]) -> str | None:
        store.set(f"alive/{self.rank}", str(beat))
        now = time.monotonic()
        if store.add("failures", 0):
            for rank in range(self.num_ranks):
                if rank != self.rank and store.check([f"failed/{rank}"]):
                    return f"rank {rank} of {self.num_ranks} failed: {store.get(f'failed/{rank}').decode()}"
            if store.check(["lost"]):
                return store.get("lost").decode()
        for rank in range(self.num_ranks):
            key = f"alive/{rank}"
            if rank == self.rank or store.check([f"left/{rank}"]):
                heard[rank] = now
            elif store.check([key]) and (latest := store.get(key)) != beats.get(rank):
                beats[rank], heard[rank] = latest, now
            elif now - heard[rank] > SILENCE_SECONDS:
                return (
                    f"rank {rank} of {self.num_ranks} gave no sign of life for {SILENCE_SECONDS:g} s: "
                    "it died, was stopped, or cannot be reached"
                )
        return None


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _ranks(ranks: list[int], num_ranks: int) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {num_ranks}"


@contextmanager
def member_of(
    store: Store, rank: int, num_ranks: int, device: torch.device, on_loss: Callable[[str], None]
) -> Iterator[None]:
    """Be one rank of a process group while inside.

    Raises:
        RankLostError: a rank does not join or cannot be reached, or another rank's end broke this one's work.
    """
    membership = Membership(store, rank, num_ranks, on_loss)
    membership.await_all("joined", JOIN_SECONDS)
    membership.start()
    backend = dist.get_default_backend_for_device(device)
    try:
        try:
            seconds = timedelta(seconds=JOIN_SECONDS)
            dist.init_process_group(
                backend,
                store=PrefixStore(_of_this_attempt("group"), store),
                rank=rank,
                world_size=num_ranks,
                timeout=seconds,
            )
        except (RuntimeError, ValueError) as error:
            raise RankLostError(
                f"rank {rank} of {num_ranks} cannot connect to the others over {backend} ({describe(error)}); "
                "check the firewall, and the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
            ) from error
        wait_long(dist.group.WORLD)
        yield
        membership.leave()
        dist.destroy_process_group()
    except Exception as error:
        cause = membership.explain(error)
        if cause is None:
            raise
        raise cause from error


def wait_long(group: dist.ProcessGroup | None) -> None:
    """Let a group's collectives wait for `LONGEST_WAIT`; torch gives each new one, as of a mesh, 10 or 30 minutes."""
    dist.distributed_c10d._set_pg_timeout(LONGEST_WAIT, group)


def own_device(local_rank: int, num_local_ranks: int) -> torch.device:
    """This rank's accelerator where its machine has one for each of its ranks, else the CPU."""
    if torch.accelerator.device_count() < num_local_ranks:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)


@contextmanager
def joined() -> Iterator[torch.device]:
    """Be the rank that `torchrun` started this process as, while inside; gives the device to work on.

    A lost rank or an error of the project's ends the process with one line and exit code 1; other errors keep their
    traceback.
    """
    try:
        with _joined_by_environment() as device:
            yield device
    except RankLostError as error:
        _print_line(str(error))
        os._exit(1)  # what a broken exchange left behind may wait for the lost rank for ever
    except CoterieError as error:
        _print_line(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} failed: {error}")
        raise SystemExit(1) from error


@contextmanager
def _joined_by_environment() -> Iterator[torch.device]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise RankLostError(f"{missing[0]} is not set; start with torchrun, as in docs/runtime.md")
    rank, num_ranks, local_rank, num_local, port = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    )
    host = os.environ["MASTER_ADDR"]
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not keeps_store:
            _await_host(host, port)
        store = TCPStore(host, port, num_ranks, keeps_store, timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise RankLostError(
            f"rank {rank} of {num_ranks} cannot reach {host}:{port} within {JOIN_SECONDS:g} s ({describe(error)}); "
            "check MASTER_ADDR, MASTER_PORT and the firewall"
        ) from error
    device = own_device(local_rank, num_local)

    def end(line: str) -> None:
        _print_line(line)
        os._exit(1)

    with member_of(store, rank, num_ranks, device, end):
        yield device


def _await_host(host: str, port: int) -> None:
    """Wait until somebody listens; the store itself may try for longer than it was told."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _print_line(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
