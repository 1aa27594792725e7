"""Start one process for each rank on this machine and collect what each returns. Knows nothing of models."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from profiler.errors import CoterieError

Worker = Callable[[int, torch.device, dict[str, Any]], dict[str, Any]]
"""Called on every rank with its number, its device and the arguments; returns what `json` can hold."""


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
    with tempfile.TemporaryDirectory(prefix="coterie-") as folder, _environment(num_ranks):
        try:
            start_processes(
                _run_rank,
                (worker, num_ranks, arguments, folder, before_joining),
                nprocs=num_ranks,
                start_method="spawn",
            )
        except (ProcessRaisedException, ProcessExitedException) as error:
            # One rank's failure breaks the others' exchanges: the first to fail is the one to name.
            failures = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            rank = failures[0].stem if failures else str(error.error_index)
            reason = failures[0].read_text() if failures else str(error).strip().splitlines()[-1]
            raise CoterieError(f"rank {rank} of {num_ranks} failed: {reason}") from error
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


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
    if before_joining is not None:
        before_joining(rank)
    if torch.accelerator.device_count() >= num_ranks:
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        device = torch.device(accelerator.type, rank)
        torch.accelerator.set_device_index(rank)
    else:
        device = torch.device("cpu")
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    try:
        result = worker(rank, device, arguments)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    except Exception as error:
        reason = str(error).strip().splitlines()
        (Path(folder) / f"{rank}.error").write_text(f"{type(error).__name__}: {reason[0] if reason else 'no message'}")
        raise
    finally:
        dist.destroy_process_group()
