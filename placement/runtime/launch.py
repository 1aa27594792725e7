"""One function on all ranks, started here or by torchrun, and what each returns. Knows nothing of models."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from placement.runtime.membership import RankLostError, describe, joined, member_of, own_device
from profiler.errors import CoterieError
from profiler.files import temporary_folder

Worker = Callable[[int, torch.device, dict[str, Any]], dict[str, Any]]
"""Called on every rank with its number, its device and the arguments; returns what `json` can hold."""

GRACE_SECONDS = 3.0
"""How long the other ranks may take to end by themselves once one has failed."""


def run_on_ranks(
    worker: Worker,
    num_ranks: int,
    arguments: dict[str, Any],
    before_joining: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a module-level function on every rank of a fresh process group and return what each rank returned.

    NCCL where this machine has an accelerator for each rank, gloo on the CPU otherwise.  Results travel as JSON files.

    Args:
        before_joining: called on each rank with its number before it joins the group, such as to enter a network
            namespace.

    Raises:
        CoterieError: a rank failed; the message names the first error.
    """
    with temporary_folder() as folder, _environment(num_ranks):
        try:
            processes = start_processes(
                _run_rank,
                (worker, num_ranks, arguments, folder, before_joining),
                nprocs=num_ranks,
                join=False,
                start_method="spawn",
            )
            try:
                while not processes.join(grace_period=GRACE_SECONDS):
                    pass
            finally:  # interrupted, or a rank that did not end by itself
                for process in processes.processes:
                    process.kill()
                for traceback in processes.error_files:  # which a rank that failed has written, and torch has read
                    Path(traceback).unlink(missing_ok=True)
        except (ProcessRaisedException, ProcessExitedException) as error:
            # A rank that was killed leaves no line; else the first to fail is the one to name.
            if isinstance(error, ProcessExitedException) and error.exit_code < 0:
                reason = f"died of {error.signal_name}"
                raise CoterieError(f"rank {error.error_index} of {num_ranks} failed: {reason}") from error
            failures = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            unknown = f"rank {error.error_index} of {num_ranks} failed: {str(error).strip().splitlines()[-1]}"
            raise CoterieError(failures[0].read_text() if failures else unknown) from error
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def started_by_torchrun() -> bool:
    """Whether this process is one rank of a group that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined_by_torchrun() -> Iterator[torch.device | None]:
    """Be the rank that torchrun started this process as, while inside; None in place of its device if it did not."""
    if started_by_torchrun():
        with joined() as device:
            yield device
    else:
        yield None


def run_as_rank(worker: Worker, device: torch.device, arguments: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Run a function as the rank that this process has joined a group as; all ranks call it together.

    Returns:
        What each rank returned, on rank 0; None on the others.
    """
    rank = dist.get_rank()
    dist.barrier()  # waits for whoever still loads a model, as long as it takes; new groups do not
    mine = torch.frombuffer(bytearray(json.dumps(worker(rank, device, arguments)).encode()), dtype=torch.uint8)
    size = torch.tensor([len(mine)], device=device)
    sizes = size.new_empty(dist.get_world_size())
    dist.all_gather_single(sizes, size)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine.to(device)
    gathered = padded.new_empty((len(sizes), longest))
    dist.all_gather_single(gathered.view(-1), padded)
    if rank:
        return None
    return [json.loads(bytes(row[:end].tolist())) for row, end in zip(gathered.cpu(), sizes.tolist(), strict=True)]


@contextmanager
def _environment(num_ranks: int) -> Iterator[None]:
    """Share the cores between the ranks; they talk over loopback unless told otherwise."""
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    defaults = {"OMP_NUM_THREADS": threads}
    if Path("/sys/class/net/lo").exists():
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _run_rank(
    rank: int,
    worker: Worker,
    num_ranks: int,
    arguments: dict[str, Any],
    folder: str,
    before_joining: Callable[[int], None] | None,
) -> None:
    def end(line: str) -> None:
        try:
            report(line)
        finally:  # the folder is gone where the process that made it is
            os._exit(1)

    def report(line: str) -> None:
        (Path(folder) / f"{rank}.error").write_text(line)

    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was killed while this rank was starting
        os._exit(1)
    try:
        if before_joining is not None:
            before_joining(rank)
        device = own_device(rank, num_ranks)
        store = FileStore(f"{folder}/rendezvous", num_ranks)
        with member_of(store, rank, num_ranks, device, end):
            result = worker(rank, device, arguments)
            (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    except RankLostError as error:
        end(str(error))
    except Exception as error:
        reason = str(error) if isinstance(error, CoterieError) else describe(error)
        report(f"rank {rank} of {num_ranks} failed: {reason}")
        raise
